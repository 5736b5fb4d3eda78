"""Checkpoints: vectors that the processes of a grid write together, committed by a manifest, verified when read."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

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
from distot.store.files import explained, flush, flush_tree, remove, write_atomically
from distot.store.lock import Fence
from distot.store.places import Place, Url, digest, zarr_store

FORMAT, VERSION = "distot-checkpoint", 2
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
        return hashed_heights(self.read("average", slice(0, sum(part["count"] for part in self.written))))

    def read(self, array: str, rows: slice) -> NDArray[Any]:
        """Values of a vector over all atoms, from whatever parts hold them. Raises StoreError if they are gone."""
        found = []
        for part in self.written:
            begin, end = (min(max(row - part["first"], 0), part["count"]) for row in (rows.start, rows.stop))
            if begin < end:
                found.append(self._load(part, array, slice(begin, end)))
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
    stay, and the file ``latest`` of the run names the newest, as a hint."""

    def __init__(self, run: Place, name: str, latest: str, keep: int) -> None:
        self.run, self.path, self.latest, self.keep = run, run / name, run / latest, keep

    def save(self, step: int, part: Part, scalars: dict[str, Any], world: Axis, fence: Fence) -> str:
        """Writes and flushes a checkpoint, every process its part; the first one commits it, if ``fence`` lets it, and
        drops all but the newest. Raises StoreError in all processes if it fails in one."""
        name = world.objects(f"step-{step:09d}-{secrets.token_hex(4)}")[0]
        folder = self.path / name
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
            manifest |= {"sha256": _digest(manifest)}
            write_atomically(folder / "MANIFEST.json", json.dumps(manifest, indent=1))
            write_atomically(self.latest, folder.name + "\n")
        for old in self.committed()[self.keep :]:
            with suppress(OSError, StoreError):  # what cannot be deleted does no harm
                (old / "MANIFEST.json").unlink()
                remove(old)

    def clear_debris(self) -> None:
        """Deletes checkpoints without a manifest, and files under names of their own making."""
        if isinstance(self.path, Url):
            names = self.path.files()
            for debris in {name.split("/")[0] for name in names}:
                if f"{debris}/MANIFEST.json" not in names:
                    remove(self.path / debris)
            return
        for folder in self.path.glob("*"):
            if folder.is_dir() and not (folder / "MANIFEST.json").exists():
                remove(folder)
        if isinstance(self.run, Path):
            for partial in self.run.glob(".*.partial"):
                partial.unlink()

    def committed(self) -> list[Place]:
        """Folders of committed self.path, newest first."""
        found: list[tuple[str, float, Place]] = []
        if isinstance(self.path, Url):
            for name, (_, written) in self.path.files().items():
                if name.endswith("/MANIFEST.json"):
                    found.append((name[:14], written.timestamp(), self.path / name.split("/")[0]))
        else:
            for manifest in self.path.glob("step-*/MANIFEST.json"):
                with suppress(FileNotFoundError):  # a writer drops old ones while we look
                    found.append((manifest.parent.name[:14], manifest.stat().st_mtime, manifest.parent))
        return [folder for *_, folder in sorted(found, key=lambda entry: entry[:2], reverse=True)]

    def load(self, world: Axis | None = None) -> Checkpoint | None:
        """The newest checkpoint that verifies, with remarks on those that did not; None if none was committed.

        The processes of ``world`` verify some parts each. Raises StoreError if checkpoints were committed and every one
        of them is damaged.
        """
        world = world or Axis()
        remarks: list[str] = []
        latest, committed = world.objects((self._latest(), self.committed()))[0]
        for folder in committed:
            try:
                found = _agreed(world, lambda folder=folder: _verified(folder, world))[0]  # type: ignore[misc]
            except StoreError as error:
                if not world.objects((folder / "MANIFEST.json").exists())[0]:
                    return self.load(world)  # a writer has dropped it, after it had committed newer ones
                remarks.append(str(error))
                continue
            if remarks:
                remarks.append(f"using the checkpoint before it, {folder.name}")
            return replace(found, remarks=tuple(remarks))
        if remarks:
            raise StoreError("; ".join(remarks) + f"; no checkpoint of {self.run} is left, start a new run")
        if world.objects(self._latest())[0] != latest:
            return self.load(world)  # a writer has replaced them all while we looked
        return None

    def _latest(self) -> bytes:
        """What the hint says; nothing before the first checkpoint."""
        try:
            return self.latest.read_bytes()
        except FileNotFoundError:
            return b""


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
    files = {f"{name}/{file}": its for file, its in sorted(store.files.items())}
    return {"name": name, "first": part.first, "count": part.count, "arrays": sorted(part.arrays), "files": files}


def _verified(folder: Place, world: Axis) -> Checkpoint:
    """A checkpoint; every file of the parts that fall to this process has the size and hash of the manifest."""
    file = folder / "MANIFEST.json"
    try:
        manifest = json.loads(file.read_bytes())
        sound = manifest.pop("sha256") == _digest(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise StoreError(f"checkpoint {folder.name} is damaged: {file} fails its checksum")
    for part in manifest["parts"][world.rank :: world.size]:
        for name, expected in part["files"].items():
            file = folder / name
            try:
                sound = digest(file) == expected
            except OSError as error:
                raise StoreError(
                    f"checkpoint {folder.name} is damaged: {file} cannot be read ({error.strerror})"
                ) from error
            if not sound:
                raise StoreError(f"checkpoint {folder.name} is damaged: {file} fails its checksum")
    return Checkpoint(folder, manifest["parts"], manifest["scalars"])


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
