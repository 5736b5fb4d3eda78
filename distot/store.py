"""Latents, runs and checkpoints on disk; the only user of zarr. The layout is described in docs/developers.md.

Nothing is ever half there: a store appears under its name by one rename, a checkpoint by the rename of its manifest,
and both only after every byte below them has been flushed to disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import zarr
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from distot.errors import InputError, StoreError
from distot.target import Fingerprint

LATENTS, RUN = "distot-latents", "distot-run"
VERSION = 1
CHUNK_BYTES, CHUNKS_PER_SHARD = 2 << 20, 32
VECTOR_CHUNK = 1 << 20  # values in a chunk of a vector: 8 MiB of float64
KEEP = 2  # checkpoints kept in a run

Arrays = dict[str, NDArray[Any]]


# ---------------------------------------------------------------------------------------------- files


@contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """Turns what the operating system says into one sentence with the remedy."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        remedy = {
            errno.ENOSPC: "the disk is full; free some space or choose another disk",
            errno.EDQUOT: "your disk quota is used up; free some space or choose another disk",
            errno.EFBIG: "the file would grow past the size limit of this process (ulimit -f); raise it",
            errno.EACCES: "permission denied; choose a folder you may write to",
            errno.EPERM: "permission denied; choose a folder you may write to",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.ENOTDIR: "a part of that path is a file, not a folder; choose another path",
            errno.EEXIST: "a part of that path is a file, not a folder; choose another path",
            errno.ENOTEMPTY: "another process has made it in the meantime; choose another name",
            errno.ENOENT: "no such file or folder; check the path",
        }.get(error.errno or 0, str(error))
        raise StoreError(f"cannot {doing} {path}: {remedy}") from error


def flush(path: Path) -> None:
    """Forces a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            flush(Path(root, name))
        flush(Path(root))


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that a reader, or a crash, sees the old text or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name only when filled and flushed. Raises StoreError if the name is taken."""
    if path.exists():
        raise StoreError(f"{path} exists already; choose another name or delete it first")
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
        try:
            yield partial
            flush_tree(partial)
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        flush(path.parent)


def need_space(path: Path, wanted: int) -> None:
    """Raises StoreError if the disk of ``path`` has fewer than ``wanted`` bytes free."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise StoreError(
            f"{path} needs about {wanted / 2**20:,.1f} MiB and its disk has {free / 2**20:,.1f} MiB free; "
            "free some space or choose another disk"
        )


# -------------------------------------------------------------------------------------------- latents


class Latents:
    """Rows of a latents store or of any 2-D zarr array, read by range; satisfies ``target.Rows``."""

    def __init__(
        self, path: Path, array: zarr.Array[Any], mass: NDArray[Any] | None, attributes: dict[str, Any]
    ) -> None:
        self.path, self.array, self.mass, self.attributes = path, array, mass, attributes
        self.bfloat16 = attributes.get("dtype") == "bfloat16"
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype[Any] = np.dtype(np.float32) if self.bfloat16 else array.dtype

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        values = _read(self.array, rows, self.path)
        return _from_bfloat16(values) if self.bfloat16 else values

    def take(self, index: NDArray[np.int64]) -> NDArray[Any]:
        """The rows of ``index`` (any number,), in that order."""
        distinct, inverse = np.unique(index, return_inverse=True)
        with _readable(self.array, self.path):
            values = np.asarray(self.array.get_orthogonal_selection((distinct, slice(None))))
        return (_from_bfloat16(values) if self.bfloat16 else values)[inverse]

    @property
    def fingerprint(self) -> str | None:
        return self.attributes.get("fingerprint")


def open_latents(path: str | Path, array: str | None = None) -> Latents:
    """Opens a latents store, a group with one 2-D array, or a 2-D array (``array`` names one of several).

    Raises StoreError if there is nothing readable, or a piece of a latents store is missing.
    """
    path = Path(path)
    node = _open(path)
    if isinstance(node, zarr.Array):
        return Latents(path, node, None, {})
    attributes = dict(node.attrs)
    if attributes.get("format") == RUN:
        raise InputError(f"{path} is a run, not latents; give the latents it was solved for")
    ours = attributes.get("format") == LATENTS
    with _meaningful(path):
        arrays = dict(node.arrays())  # those that zarr recognises
        if ours:
            found, mass = arrays["z"], arrays["mass"] if (path / "mass").exists() else None
    if ours:
        for pieces in [found] if mass is None else [found, mass]:
            _complete(path, pieces)
        weights = None if mass is None else _read(mass, ..., path)
        return Latents(path, found, weights, attributes)
    names = [array] if array else [name for name, a in arrays.items() if a.ndim == 2]
    if len(names) != 1 or names[0] not in arrays:
        raise InputError(f"{path} holds the arrays {sorted(arrays)}; name the one with the latents (--key)")
    return Latents(path / names[0], arrays[names[0]], None, {})


class LatentsWriter:
    """Takes latents row block by row block and writes whole shards, in constant memory; made by ``new_latents``."""

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        stored = np.dtype("<u2" if dtype == "bfloat16" else dtype)
        n, d = shape
        chunk = max(1, min(n, CHUNK_BYTES // (d * stored.itemsize)))
        self.shard = chunk * max(1, min(CHUNKS_PER_SHARD, -(-n // chunk)))
        self.fingerprint = Fingerprint(shape, np.dtype(np.float32) if dtype == "bfloat16" else stored)
        self.written = self.filled = 0
        self.buffer = np.empty((self.shard, d), dtype=stored)
        self.group = zarr.create_group(str(folder))
        self.array = self.group.create_array(
            "z",
            shape=shape,
            dtype=stored,
            chunks=(chunk, d),
            shards=(self.shard, d),
            compressors=[Crc32cCodec()],
            fill_value=0 if dtype == "bfloat16" else float("nan"),
        )

    def write(self, rows: NDArray[Any]) -> None:
        """Appends rows (any number, d)."""
        if self.dtype == "bfloat16":
            rows = _to_bfloat16(rows)
            self.fingerprint.update(_from_bfloat16(rows))
        else:
            rows = np.ascontiguousarray(rows, dtype=self.buffer.dtype)
            self.fingerprint.update(rows)
        while len(rows):
            part, rows = rows[: self.shard - self.filled], rows[self.shard - self.filled :]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            if self.filled == self.shard:
                self._flush()

    def write_mass(self, mass: NDArray[Any]) -> None:
        """Stores one mass for each latent (N,)."""
        _vector(self.group, "mass", np.asarray(mass, dtype=np.float64))

    def _flush(self) -> None:
        self.array[self.written : self.written + self.filled] = self.buffer[: self.filled]
        self.written, self.filled = self.written + self.filled, 0

    def close(self, origin: str) -> None:
        """Writes what is left, and the attributes. Raises StoreError if rows are missing."""
        if self.filled:
            self._flush()
        if self.written != self.shape[0]:
            raise StoreError(
                f"{self.written:,} rows came where {self.shape[0]:,} were announced; the source was cut short"
            )
        self.group.attrs.update(
            format=LATENTS, version=VERSION, dtype=self.dtype, fingerprint=self.fingerprint.hexdigest(), origin=origin
        )


@contextmanager
def new_latents(path: str | Path, shape: tuple[int, int], dtype: str, origin: str) -> Iterator[LatentsWriter]:
    """A latents store under construction; it appears at ``path`` when the block ends without an error.

    dtype: float16, bfloat16, float32 or float64. ``origin`` says in words where the rows come from.
    Raises StoreError if ``path`` exists, the disk is too small, or fewer rows than ``shape[0]`` were written.
    """
    path = Path(path)
    if dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise InputError(f"latents cannot be stored as {dtype}; choose float16, bfloat16, float32 or float64")
    need_space(path, shape[0] * shape[1] * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize))
    with new_folder(path) as folder:
        writer = LatentsWriter(folder, shape, dtype)
        yield writer
        writer.close(origin)


def _to_bfloat16(rows: NDArray[Any]) -> NDArray[np.uint16]:
    """Rounds to nearest, ties to even."""
    bits = np.ascontiguousarray(rows, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ----------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its arrays, the scalars saved with them, and remarks on damaged newer ones."""

    name: str
    arrays: Arrays
    scalars: dict[str, Any]
    remarks: tuple[str, ...] = ()


class Run:
    """A run folder. Readers need no lock; a writer holds ``lock()``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "config.json"
        if not file.is_file():
            what = "is not a run folder (it has no config.json)" if self.path.exists() else "does not exist"
            raise StoreError(f"{self.path} {what}; start one with: distot solve LATENTS.zarr {self.path}")
        with explained("read", file):
            text = file.read_bytes()
        try:
            self.config: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise StoreError(f"{file} is damaged ({error}); this run cannot be continued, start a new one") from error
        if self.config.get("version") != VERSION:
            raise StoreError(
                f"{self.path} was written by distot {self.config.get('distot')}; read it with that version"
            )

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any], arrays: Arrays, latents: tuple[Any, Any] | None) -> Run:
        """A new run folder with its configuration, the arrays it needs and, if given, a copy of (rows, mass)."""
        path = Path(path)
        if path.exists():
            raise StoreError(
                f"{path} exists already; continue it with `distot resume {path}`, or choose another name for a new run"
            )
        with new_folder(path) as folder:
            group = zarr.create_group(str(folder), attributes={"format": RUN, "version": VERSION})
            for name, values in arrays.items():
                _vector(group, name, values)
            if latents is not None:
                rows, mass = latents
                copy_latents(rows, mass, folder / "latents.zarr", "copied from memory by distot.solve")
            (folder / "checkpoints").mkdir()
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return cls(path)

    def array(self, name: str) -> NDArray[Any]:
        """An array stored with the configuration. Raises StoreError if it is missing or damaged."""
        return _load(self.path / name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Refuses a second writer, on this machine or on a shared file system with POSIX locks."""
        owner = self.path / "owner.json"
        lock = FileLock(self.path / ".lock")
        with explained("lock", self.path):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                who = self.load_json("owner.json") or {"pid": "unknown", "host": "unknown", "since": "just now"}
                raise StoreError(
                    f"{self.path} is being written by process {who['pid']} on host {who['host']} since {who['since']}; "
                    "wait for it or stop it"
                ) from None
        try:
            me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            with explained("write", owner):
                write_atomically(owner, json.dumps(me))
            for debris in (self.path / "checkpoints").iterdir():
                if not (debris / "MANIFEST.json").exists():
                    shutil.rmtree(debris, ignore_errors=True)
            for partial in self.path.glob(".*.partial"):
                partial.unlink()
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to log.jsonl, in place of a last one that a crash or a full disk has cut off."""
        file = self.path / "log.jsonl"
        with explained("write", file), file.open("a+b") as stream:
            size = stream.tell()
            if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":
                stream.truncate(file.read_bytes().rfind(b"\n") + 1)
            stream.write(json.dumps(record).encode() + b"\n")

    def records(self) -> list[dict[str, Any]]:
        """The log; a last line cut off by a crash is left out."""
        file = self.path / "log.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def save_json(self, name: str, value: dict[str, Any]) -> None:
        with explained("write", self.path / name):
            write_atomically(self.path / name, json.dumps(value, indent=2) + "\n")

    def load_json(self, name: str) -> dict[str, Any] | None:
        file = self.path / name
        try:
            with explained("read", file):
                text = file.read_bytes() if file.exists() else b"null"
            value: dict[str, Any] | None = json.loads(text)
        except ValueError as error:
            raise StoreError(f"{file} is damaged ({error}); delete it, distot certify makes it anew") from error
        return value

    def save_checkpoint(self, step: int, arrays: Arrays, scalars: dict[str, Any]) -> str:
        """Writes, flushes and commits a checkpoint, then drops all but the newest KEEP."""
        name = f"step-{step:09d}-{secrets.token_hex(4)}"
        folder = self.path / "checkpoints" / name
        try:
            with explained("write the checkpoint", folder):
                group = zarr.create_group(str(folder))
                for key, values in arrays.items():
                    _vector(group, key, values)
                files = {str(f.relative_to(folder)): _describe(f) for f in sorted(folder.rglob("*")) if f.is_file()}
                flush_tree(folder)
                flush(folder.parent)
                manifest = {"format": "distot-checkpoint", "version": VERSION, "written": time.time()}
                manifest |= {"arrays": sorted(arrays), "files": files, "scalars": scalars}
                manifest |= {"sha256": _digest(manifest)}
                write_atomically(folder / "MANIFEST.json", json.dumps(manifest, indent=1))
                write_atomically(self.path / "LATEST", name + "\n")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        for old in self._committed()[KEEP:]:
            with suppress(OSError):  # what cannot be deleted does no harm
                (old / "MANIFEST.json").unlink()
                shutil.rmtree(old)
        return name

    def _committed(self) -> list[Path]:
        """Folders of committed checkpoints, newest first."""
        found = []
        for manifest in (self.path / "checkpoints").glob("step-*/MANIFEST.json"):
            with suppress(FileNotFoundError):  # a writer drops old ones while we look
                found.append((manifest.parent.name[:14], manifest.stat().st_mtime_ns, manifest.parent))
        return [folder for *_, folder in sorted(found, reverse=True)]

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, with remarks on those that did not; None if none was committed.

        Raises StoreError if checkpoints were committed and every one of them is damaged.
        """
        remarks: list[str] = []
        for folder in self._committed():
            try:
                arrays, scalars = _verified(folder)
            except StoreError as error:
                if not (folder / "MANIFEST.json").exists():
                    return self.load_checkpoint()  # a writer has dropped it, after it had committed newer ones
                remarks.append(str(error))
                continue
            if remarks:
                remarks.append(f"using the checkpoint before it, {folder.name}")
            return Checkpoint(folder.name, arrays, scalars, tuple(remarks))
        if remarks:
            raise StoreError("; ".join(remarks) + f"; no checkpoint of {self.path} is left, start a new run")
        return None


def copy_latents(rows: Any, mass: NDArray[Any] | None, path: Path, origin: str) -> None:
    """Writes rows in memory as a latents store."""
    dtype = rows.dtype.name if rows.dtype.name in ("float16", "float32", "float64") else "float64"
    with new_latents(path, (rows.shape[0], rows.shape[1]), dtype, origin) as writer:
        for start in range(0, rows.shape[0], writer.shard):
            writer.write(rows[start : start + writer.shard])
        if mass is not None:
            writer.write_mass(mass)


def _verified(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and scalars of a checkpoint whose every file has the size and hash of the manifest."""
    file = folder / "MANIFEST.json"
    try:
        manifest = json.loads(file.read_bytes())
        sound = manifest.pop("sha256") == _digest(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise StoreError(f"checkpoint {folder.name} is damaged: {file} fails its checksum")
    for name, expected in manifest["files"].items():
        file = folder / name
        try:
            sound = _describe(file) == expected
        except OSError as error:
            raise StoreError(
                f"checkpoint {folder.name} is damaged: {file} cannot be read ({error.strerror})"
            ) from error
        if not sound:
            raise StoreError(f"checkpoint {folder.name} is damaged: {file} fails its checksum")
    arrays = {name: _load(folder / name) for name in manifest["arrays"]}
    if not (folder / "MANIFEST.json").exists():  # the first thing a writer deletes; zarr fills in what is missing
        raise StoreError(f"checkpoint {folder.name} was deleted while it was read")
    return arrays, manifest["scalars"]


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


# ----------------------------------------------------------------------------------------------- zarr


def _vector(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    chunks = tuple(max(1, min(VECTOR_CHUNK, n)) for n in values.shape)
    fill = float("nan") if values.dtype.kind == "f" else 0
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=[Crc32cCodec()], fill_value=fill
    )
    array[...] = values


def _open(path: Path) -> zarr.Array[Any] | zarr.Group:
    try:
        with _meaningful(path):
            return zarr.open(str(path), mode="r")
    except FileNotFoundError:
        what = "is not a zarr store" if path.exists() else "does not exist"
        data, store = (path, path.with_suffix(".zarr")) if path.is_file() else ("DATA.npy", path)
        raise StoreError(f"{path} {what}; make one with: distot ingest {data} {store}") from None


@contextmanager
def _meaningful(path: Path) -> Iterator[None]:
    """Turns what zarr says of damaged metadata into one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise StoreError(
            f"a zarr.json in {path} is damaged ({type(error).__name__}: {error}); restore it, or make {path} anew"
        ) from error


def _read(array: zarr.Array[Any], rows: slice | EllipsisType, path: Path) -> NDArray[Any]:
    with _readable(array, path):
        return np.asarray(array[rows])


@contextmanager
def _readable(array: zarr.Array[Any], path: Path) -> Iterator[None]:
    """Turns what zarr says of damaged chunks into one sentence that names the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise StoreError(f"{_culprit(array, path, error)}; restore it from a copy, or make it anew") from error


def _load(path: Path) -> NDArray[Any]:
    node = _open(path)
    if not isinstance(node, zarr.Array):
        raise StoreError(f"{path} is not a zarr array; this folder was not written by distot")
    return _read(node, ..., path)


def _pieces(array: zarr.Array[Any], path: Path) -> Iterator[tuple[slice, Path]]:
    """Row ranges and files of the stored objects of an array with default chunk keys."""
    step = (array.shards or array.chunks)[0]
    folder = path / array.basename if array.basename and path.name != array.basename else path
    for i in range(-(-array.shape[0] // step)):
        yield slice(i * step, (i + 1) * step), folder.joinpath("c", str(i), *["0"] * (array.ndim - 1))


def _culprit(array: zarr.Array[Any], path: Path, error: Exception) -> str:
    """Names the first file of an array that cannot be read."""
    for rows, file in _pieces(array, path):
        try:
            array[rows]
        except (ValueError, LookupError, TypeError, OSError):
            return f"{file} is damaged or cut short"
    return f"{path} cannot be read ({error})"


def _complete(path: Path, array: zarr.Array[Any]) -> None:
    for _, file in _pieces(array, path):
        if not file.exists() or not file.stat().st_size:
            raise StoreError(f"{file} is missing or empty; restore this file from a copy, or ingest the latents again")
