"""Checkpoints: vectors that the processes of a grid write together, committed by a manifest, verified when read."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import WrapperStore

from distot.errors import StoreError
from distot.fingerprint import hashed_heights
from distot.grid import Axis
from distot.store.arrays import Arrays, load, write_vector
from distot.store.files import check_plain, content, explained, flush, flush_tree, remove, write_atomically
from distot.store.forms import Count, Form, Malformed, Name, Seconds, check, fits, sealed, unsealed
from distot.store.lock import Fence
from distot.store.places import Place, Url, digest, sizes, zarr_store

FORMAT, VERSION = "distot-checkpoint", 2
NAME = re.compile(r"step-(\d{9,18})-[0-9a-f]{8}")  # of a folder
PARTIAL = re.compile(r"\.[\w-]+(\.[\w-]+)*\.[0-9a-f]{8}\.partial")
KEPT = "LOST"  # a file in what is left of a checkpoint that was committed; nobody deletes that
PART: Form = {
    "name": Annotated[str, r"part-\d{5,9}"],
    "first": Count,
    "count": Count,
    "arrays": list[Name],
    "files": dict[str, dict[str, Any]],
}
FILE = Annotated[str, r"part-\d{5,9}(/\w[\w.-]*)+"]
MANIFEST: Form = {
    "format": Annotated[str, FORMAT],
    "version": Annotated[int, (VERSION, VERSION)],
    "written": Seconds,
    "parts": list[dict[str, Any]],
    "scalars": dict[str, Any],
}
T = TypeVar("T")


class Dropped(StoreError):
    """A checkpoint was deleted while it was read, as newer ones had been committed."""


@dataclass(frozen=True)
class Part:
    """What one process writes into a checkpoint: of vectors over all atoms the values from number ``first`` on."""

    first: int
    count: int
    arrays: Arrays


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, with remarks on damaged newer ones. Its parts may come from any number of processes."""

    folder: Place
    written: list[dict[str, Any]]  # of each part: name, first, count, arrays
    scalars: dict[str, Any]
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def heights(self) -> str:
        """The hash of the heights of all atoms, by which what belongs to them knows them again."""
        return hashed_heights(self.read("average", slice(0, self.count)))

    @property
    def count(self) -> int:
        """Atoms whose values it has."""
        return sum(part["count"] for part in self.written)

    def read(self, array: str, rows: slice) -> NDArray[Any]:
        """Values of a vector over all atoms, from whatever parts hold them. Raises StoreError if they are gone."""
        found = []
        for part in self.written:
            begin, end = (min(max(row - part["first"], 0), part["count"]) for row in (rows.start, rows.stop))
            if begin < end:
                found.append(self._load(part, array, slice(begin, end)))
                if found[-1].shape[:1] != (end - begin,) or found[-1].dtype.kind != "f":
                    raise StoreError(
                        f"checkpoint {self.name} is damaged: its {array} are not {part['count']:,} numbers"
                    )
        return np.concatenate(found) if found else np.empty(0)

    def parts(self, *arrays: str) -> Iterator[tuple[NDArray[Any], ...]]:
        """Arrays of every part."""
        for part in self.written:
            yield tuple(self._load(part, array) for array in arrays)

    def _load(self, part: dict[str, Any], array: str, rows: slice = slice(None)) -> NDArray[Any]:
        """An array of a part. Raises Dropped if the checkpoint was deleted meanwhile, however that showed."""
        try:
            return load(self.folder / part["name"] / array, rows)
        finally:
            if not (self.folder / "MANIFEST.json").is_file():  # the first thing that goes; zarr fills in the rest
                raise Dropped(f"checkpoint {self.name} was deleted while it was read")


class Shelf:
    """A folder of checkpoints in a run, each written once by all processes and committed by one; the newest ``keep``
    stay, and the file ``latest`` of the run names the newest. ``scalars`` is what each has to say."""

    def __init__(self, run: Place, name: str, latest: str, keep: int, scalars: Form, remedy: str) -> None:
        self.run, self.path, self.latest, self.keep = run, run / name, run / latest, keep
        self.form, self.remedy = scalars, remedy

    def save(self, step: int, part: Part, scalars: dict[str, Any], world: Axis, fence: Fence) -> str:
        """Writes and flushes a checkpoint, every process its part; the first one commits it, if ``fence`` lets it, and
        drops all but the newest. Raises StoreError in all processes if it fails in one."""
        name = world.objects(f"step-{step:09d}-{secrets.token_hex(4)}")[0]
        folder = self.path / name
        check_plain(self.path)
        try:
            written = _agreed(world, lambda: _write_part(folder, world.rank, part))
            _agreed(world, lambda: self._commit(folder, written, scalars, fence) if world.rank == 0 else None)
        except BaseException:
            if world.rank == 0:
                remove(folder)
            raise
        return name

    def _commit(self, folder: Place, parts: list[dict[str, Any]], scalars: dict[str, Any], fence: Fence) -> None:
        fence()
        with explained("write the checkpoint", folder):
            if isinstance(folder, Path):
                flush_tree(folder, files=False)
                flush(folder.parent)
            manifest = {"format": FORMAT, "version": VERSION, "written": time.time()}
            manifest |= {"parts": parts, "scalars": scalars}
            write_atomically(folder / "MANIFEST.json", json.dumps(sealed(manifest), indent=1))
            write_atomically(self.latest, folder.name + "\n")
        for old in self.committed()[self.keep :]:
            with suppress(OSError, StoreError):  # what cannot be deleted does no harm
                check_plain(old)
                (old / "MANIFEST.json").unlink()
                remove(old)

    def clear_debris(self) -> None:
        """Deletes what writers that were killed have left: checkpoints without a manifest, and files not yet in place.

        A checkpoint that was committed, and has lost its manifest since, is marked and kept.
        """
        check_plain(self.path)
        debris = [folder for folder in self._folders() if not _has(folder, "MANIFEST.json", KEPT)]
        if debris and self.lost() is not None:
            for folder in debris:
                write_atomically(folder / KEPT, f"{folder.name} was committed and has no MANIFEST.json any more\n")
            debris = []
        for folder in debris:
            remove(folder)
        for partial in self.run.glob(".*.partial") if isinstance(self.run, Path) else ():
            if PARTIAL.fullmatch(partial.name) and not partial.is_dir():
                partial.unlink()

    def _folders(self) -> list[Place]:
        """Folders of checkpoints, whole or not; a link is none."""
        if isinstance(self.path, Url):
            names = {name.split("/")[0] for name in self.path.files()}
            return [self.path / name for name in sorted(names) if name.startswith("step-")]
        found = [folder for folder in self.path.glob("step-*") if NAME.fullmatch(folder.name)]
        return [folder for folder in found if folder.is_dir() and not folder.is_symlink()]

    def committed(self) -> list[Place]:
        """Folders of committed checkpoints, newest first."""
        found: list[tuple[int, float, Place]] = []
        if isinstance(self.path, Url):
            for name, (_, written) in self.path.files().items():
                folder, _, file = name.partition("/")
                if file == "MANIFEST.json" and (match := NAME.fullmatch(folder)):
                    found.append((int(match[1]), written.timestamp(), self.path / folder))
        else:
            for manifest in self.path.glob("step-*/MANIFEST.json"):
                with suppress(FileNotFoundError):  # a writer drops old ones while we look
                    if match := NAME.fullmatch(manifest.parent.name):
                        found.append((int(match[1]), manifest.lstat().st_mtime, manifest.parent))
        return [folder for *_, folder in sorted(found, key=lambda entry: entry[:2], reverse=True)]

    def lost(self) -> str | None:
        """What is wrong if the newest checkpoint, which was committed, is so no more; None if nothing is."""
        return self._lost(self._latest(), self.committed())

    def _lost(self, named: str | None, committed: list[Place]) -> str | None:
        """The same, of what LATEST said before it was looked which are committed."""
        if named is None or any(folder.name == named for folder in committed):
            return None
        if self._latest() != named:
            return self.lost()  # a writer has replaced it while we looked
        if not NAME.fullmatch(named):
            return f"{self.latest} is damaged: it names no checkpoint"
        folder = self.path / named
        what = f"its {folder / 'MANIFEST.json'} is missing" if folder.is_dir() else f"{folder} is missing"
        return f"the checkpoint that {self.latest.name} names is incomplete: {what}"

    def load(self, world: Axis | None = None) -> Checkpoint | None:
        """The newest checkpoint that verifies, with remarks on those that did not; None if none was committed.

        The processes of ``world`` verify some parts each. Raises StoreError if checkpoints were committed and every one
        of them is damaged.
        """
        world = world or Axis()
        latest, committed = world.objects((self._latest(), self.committed()))[0]
        lost = world.objects(self._lost(latest, committed))[0]
        remarks = [] if lost is None else [lost]
        for folder in committed:
            try:
                found = _agreed(world, lambda folder=folder: _verified(folder, world, self.form))[0]  # type: ignore[misc]
            except StoreError as error:
                if not world.objects((folder / "MANIFEST.json").exists())[0]:
                    return self.load(world)  # a writer has dropped it, after it had committed newer ones
                remarks.append(str(error))
                continue
            if remarks:
                remarks.append(f"using the checkpoint before it, {folder.name}")
            return replace(found, remarks=tuple(remarks))
        if world.objects(self._latest())[0] != latest:
            return self.load(world)  # a writer has replaced them all while we looked
        if remarks:
            raise StoreError("; ".join(remarks) + f"; {self.remedy}")
        return None

    def _latest(self) -> str | None:
        """What the hint says; None before the first checkpoint."""
        try:
            return content(self.latest).decode(errors="replace").strip()
        except FileNotFoundError:
            return None


def _agreed(world: Axis, work: Callable[[], T]) -> list[T]:
    """What the work of every process gave. Raises StoreError in all of them if it failed in one."""
    done, failure = None, None
    try:
        done = work()
    except StoreError as error:
        failure = error
    results = world.objects((done, None if failure is None else type(failure)(str(failure))))
    if failure is not None:
        raise failure
    for _, other in results:
        if other is not None:
            raise other
    return [done for done, _ in results]


class _Hashed(WrapperStore[Store]):
    """Remembers size and hash of every file that zarr writes."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.files: dict[str, dict[str, Any]] = {}

    async def set(self, key: str, value: Buffer) -> None:
        await self._store.set(key, value)
        self._note(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await self._store.set_if_not_exists(key, value)
        self._note(key, value)

    def _note(self, key: str, value: Buffer) -> None:
        self.files[key] = {"bytes": len(value), "sha256": hashlib.sha256(value.as_buffer_like()).hexdigest()}


def _write_part(folder: Place, number: int, part: Part) -> dict[str, Any]:
    """Writes and flushes the arrays of a part; its entry in the manifest."""
    name = f"part-{number:05d}"
    with explained("write the checkpoint", folder):
        store = _Hashed(zarr_store(folder / name))
        group = zarr.create_group(store)
        for key, values in part.arrays.items():
            write_vector(group, key, values)
        if isinstance(folder, Path):
            flush_tree(folder / name)
        if set(sizes(folder / name)) - set(store.files):
            raise StoreError(
                f"zarr has written files to {folder / name} that were not hashed; use another version of it"
            )
    files = {f"{name}/{file}": its for file, its in sorted(store.files.items())}
    return {"name": name, "first": part.first, "count": part.count, "arrays": sorted(part.arrays), "files": files}


def _verified(folder: Place, world: Axis, scalars: Form) -> Checkpoint:
    """A checkpoint; every file of the parts that fall to this process has the size and hash of the manifest."""
    check_plain(folder)
    file = folder / "MANIFEST.json"
    try:
        manifest = unsealed(file)
        check(manifest, MANIFEST)
        check(manifest["scalars"], scalars, others=True)
        _check_parts(manifest["parts"])
    except (OSError, Malformed) as error:
        raise StoreError(f"checkpoint {folder.name} is damaged: {file} fails its checksum ({error})") from error
    for part in manifest["parts"][world.rank :: world.size]:
        for name, expected in part["files"].items():
            file = folder / name
            try:
                sound = digest(file) == expected if _has_size(folder, name, expected["bytes"]) else False
            except OSError as error:
                raise StoreError(f"checkpoint {folder.name} is damaged: {file} cannot be read ({error})") from error
            if not sound:
                raise StoreError(f"checkpoint {folder.name} is damaged: {file} fails its checksum")
    return Checkpoint(folder, manifest["parts"], manifest["scalars"])


def _check_parts(parts: list[dict[str, Any]]) -> None:
    """Raises Malformed unless these are parts of one checkpoint, with no file outside of them."""
    end = 0
    for part in sorted(parts, key=lambda its: its["first"] if isinstance(its.get("first"), int) else 0):
        check(part, PART)
        if part["count"] and part["first"] != end:
            raise Malformed("its parts do not make a whole")
        end += part["count"]
        named = {f"{part['name']}/{array}/zarr.json" for array in part["arrays"]}
        if not named <= set(part["files"]) or not all(fits(name, FILE) for name in part["files"]):
            raise Malformed("its files are not those of its parts")
        for its in part["files"].values():
            check(its, {"bytes": Count, "sha256": Annotated[str, "[0-9a-f]{64}"]})
    if len({part["name"] for part in parts}) != len(parts):
        raise Malformed("it has two parts of one name")


def _has_size(folder: Place, name: str, wanted: int) -> bool:
    """Whether a file of a checkpoint is one, without a link on the way to it, and as large as it should be."""
    if isinstance(folder, Url):
        return True
    for part in [*reversed(PurePosixPath(name).parents)][1:]:
        check_plain(folder / part)
    check_plain(folder / name)
    return (folder / name).lstat().st_size == wanted


def _has(folder: Place, *names: str) -> bool:
    return any((folder / name).exists() for name in names)
