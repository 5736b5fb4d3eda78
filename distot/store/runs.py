"""Runs on disk: configuration, log, checkpoints, what is known of the cells, and the writer's lock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import zarr
from numpy.typing import NDArray

from distot.errors import StoreError
from distot.grid import Axis
from distot.store.arrays import Arrays, load, write_vector
from distot.store.files import check_plain, explained, new_folder, write_atomically
from distot.store.forms import (
    MOST,
    REASON,
    Count,
    Each,
    Form,
    Malformed,
    Maybe,
    Name,
    Newer,
    Real,
    Text,
    check,
    sealed,
    unsealed,
)
from distot.store.latents import copy_latents
from distot.store.lock import Fence, writer
from distot.store.log import Log, records
from distot.store.places import Place, as_place, typed, zarr_store
from distot.store.shelf import Checkpoint, Part, Shelf

FORMAT, VERSION = "distot-run", 2
KEEP = 2  # checkpoints kept in a run
LOST = "this run cannot be continued, start a new one"

CONFIG: Form = {
    "format": Annotated[str, FORMAT],
    "version": Annotated[int, (VERSION, VERSION)],
    "distot": str,
    "created": str,
    "folder": Maybe(Count),  # its number in the file system
    "latents": Text,
    "fingerprint": Text,
    "shape": Annotated[list[Annotated[int, (1, MOST - 1)]], 2],
    "mass": bool,
    "masses": Maybe(Text | None),  # a hash of those in effect, where they are not equal ones
    "merged": Maybe(bool),  # whether latents that float32 scores cannot tell apart are one atom
    "init": bool,
    "source": dict[str, Any],
    "source_arrays": list[Name],
    "options": dict[str, float | str | bool | None],
}
LOOK: Form = {
    "samples": Annotated[int, (1, MOST - 1)],
    **dict.fromkeys(("looked", "step"), Count),
    **dict.fromkeys(("chi2", "error", "upper"), Real),
    "close": bool,
}
CHECKPOINT: Form = {
    **dict.fromkeys(("margin", "damping", "floor", "error", "time", "since"), Maybe(Real)),
    **dict.fromkeys(("step", "samples", "next_check"), Count),
    "drawn": list[Count],
    "history": Each(LOOK),
    "started": bool,
    "reason": REASON | None,
}
CERTIFICATE: Form = {"step": Count, "heights": Maybe(Text)}
CELLS: Form = dict.fromkeys(("step", "samples", "orbits"), Count)
SOURCE: Form = {"kind": Name}
SHAPES: dict[str, Form] = {
    "gaussian": {},
    "cube": {"low": Real, "high": Real},
    "ball": {"radius": Real},
    "sphere": {"radius": Real},
}


class Run:
    """A run folder. Readers need no lock; a writer holds ``lock()``."""

    def __init__(self, path: str | Place, config: dict[str, Any] | None = None) -> None:
        self.path = as_place(path)
        self._fence: Fence = _open
        self._log = Log(self.path)
        none = f"no checkpoint of {self.path} is left, start a new run, or restore them from a copy"
        self.checkpoints = Shelf(self.path, "checkpoints", "LATEST", KEEP, CHECKPOINT, none)
        again = f"delete {self.path / 'cells'} and LATEST_CELLS beside it, and cells are measured anew"
        self.cells = Shelf(self.path, "cells", "LATEST_CELLS", 1, CELLS, again)
        self.config = self._configuration() if config is None else config

    def __reduce__(self) -> tuple[type[Run], tuple[Place, dict[str, Any]]]:
        return Run, (self.path.resolve(), self.config)

    def anywhere(self) -> Run:
        """The same run, found from any folder; it is not read again."""
        return Run(self.path.resolve(), self.config)

    @classmethod
    def create(cls, path: str | Place, config: dict[str, Any], arrays: Arrays, latents: tuple[Any, Any] | None) -> Run:
        """A new run folder with its configuration, the arrays it needs and, if given, a copy of (rows, mass).

        Raises StoreError if something is there already.
        """
        path = as_place(path)
        if path.exists():
            raise StoreError(
                f"{path} exists already; continue it with `distot resume {typed(path)}`, or choose another name for a "
                "new run"
            )
        with new_folder(path) as folder:
            group = zarr.create_group(zarr_store(folder), attributes={"format": FORMAT, "version": VERSION})
            for name, values in arrays.items():
                write_vector(group, name, values)
            if latents is not None:
                rows, mass = latents
                copy_latents(rows, mass, folder / "latents.zarr", "copied from memory by distot.solve")
            config = {"format": FORMAT, "version": VERSION} | config
            if isinstance(folder, Path):
                (folder / "checkpoints").mkdir()
                config["folder"] = folder.stat().st_ino
                with writer(folder):  # where no lock can be had, nothing is left behind
                    pass
            write_atomically(folder / "config.json", _text(sealed(config)))  # last: it makes a run of it
        return cls(path)

    def _configuration(self) -> dict[str, Any]:
        """What config.json says. Raises StoreError unless this is a run, of plain files, and that is sound."""
        file = self.path / "config.json"
        with explained("read", self.path):
            if not file.is_file():
                what = "is not a run folder (it has no config.json)" if self.path.exists() else "does not exist"
                raise StoreError(f"{self.path} {what}; start one with: distot solve LATENTS.zarr {typed(self.path)}")
            for entry in sorted(self.path.iterdir()) if isinstance(self.path, Path) else ():
                check_plain(entry)
        try:
            config = unsealed(file)
            if config.get("version") != VERSION and isinstance(config.get("distot"), str):
                raise StoreError(f"{self.path} was written by distot {config['distot']}; read it with that version")
            check(config, CONFIG)
            check_source(config["source"], config["shape"][1])
        except Newer as error:
            raise StoreError(f"{file} {error}") from error
        except Malformed as error:
            raise StoreError(f"{file} is damaged ({error}); {LOST}") from error
        return config

    def save_config(self, changes: dict[str, Any]) -> None:
        """Replaces values of the configuration."""
        self.config |= changes
        self.save_json("config.json", sealed(self.config))

    def move_latents(self, place: str) -> None:
        """Says where the latents are now, as who writes to this folder has said."""
        folder = {"folder": self.path.stat().st_ino} if isinstance(self.path, Path) else {}
        self.save_config({"latents": place} | folder)

    @property
    def settled(self) -> bool:
        """Whether this is the folder in which the run was written, and no copy of it: a folder has a number of its own,
        which who makes a copy cannot know."""
        return isinstance(self.path, Path) and self.config.get("folder") == self.path.stat().st_ino

    def array(self, name: str) -> NDArray[Any]:
        """An array stored with the configuration. Raises StoreError if it is missing or damaged."""
        if not (self.path / name).exists():
            raise StoreError(f"{self.path / name} is missing; {LOST}")
        return load(self.path / name, whole=True)

    @contextmanager
    def lock(self, group: str | None = None) -> Iterator[None]:
        """Refuses a second writer; ``group`` as in ``lock.writer``."""
        with writer(self.path, group) as self._fence:
            self.checkpoints.clear_debris()
            self.cells.clear_debris()
            try:
                yield
            finally:
                self._log.close()
                self._fence = _open

    def log(self, record: dict[str, Any]) -> None:
        """Adds an event to the log."""
        self._log.append(record)

    def records(self) -> list[dict[str, Any]]:
        """The log; a last line cut off by a crash is left out, a damaged one is an event "damaged" with its number."""
        return records(self.path)

    def save_json(self, name: str, value: dict[str, Any]) -> None:
        with explained("write", self.path / name):
            write_atomically(self.path / name, _text(value))

    def load_json(self, name: str) -> dict[str, Any] | None:
        file = self.path / name
        try:
            record = unsealed(file)
            check(record, CERTIFICATE, others=True)
            return record
        except FileNotFoundError:
            return None
        except Malformed as error:
            raise StoreError(f"{file} is damaged ({error}); delete it, distot certify makes it anew") from error

    def save_checkpoint(self, step: int, part: Part, scalars: dict[str, Any], world: Axis) -> str:
        """As ``Shelf.save``."""
        return self.checkpoints.save(step, part, scalars, world, self._fence)

    def load_checkpoint(self, world: Axis | None = None) -> Checkpoint | None:
        """As ``Shelf.load``. Raises StoreError also if the log tells of checkpoints of which nothing is there."""
        found = self.checkpoints.load(world)
        if found is None:
            written = [event["name"] for event in self.records() if event["event"] == "checkpoint"]
            if written and self.checkpoints.load(world) is None:  # none has come meanwhile
                raise StoreError(
                    f"log.jsonl tells of the checkpoint {written[-1]}, and {self.path / 'checkpoints'} has none; "
                    f"{self.checkpoints.remedy}"
                )
        return found

    def save_cells(self, step: int, part: Part, scalars: dict[str, Any], world: Axis) -> None:
        """What is known of the cells at a step, as ``Shelf.save``."""
        self.cells.save(step, part, scalars, world, self._fence)


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2) + "\n"


def check_source(spec: dict[str, Any], dim: int) -> None:
    """Raises Malformed unless this can be what a source of this dimension says of itself."""
    check(spec, SOURCE, others=True)
    if spec["kind"] in SHAPES:
        check(spec, {"kind": str, "dim": Annotated[int, (dim, dim)], **SHAPES[spec["kind"]]})
    for part in ("first", "second") if spec["kind"] == "product" else ():
        check(spec, {part: dict[str, Any]}, others=True)
        check(spec[part], SOURCE, others=True)


def _open() -> None:
    """The fence of a run that nobody writes to."""
