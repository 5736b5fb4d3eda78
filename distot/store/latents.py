"""Latents on disk: rows in shards with a checksum for each chunk, read by range, written in a stream."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from distot.errors import InputError, StoreError
from distot.fingerprint import Fingerprint
from distot.store.arrays import (
    check_complete,
    meaningful,
    missing_chunks,
    open_node,
    read,
    readable,
    refusals,
    write_vector,
)
from distot.store.files import need_space, new_folder
from distot.store.forms import Form, Malformed, Text, check
from distot.store.places import Place, as_place, zarr_store

FORMAT, VERSION = "distot-latents", 1
ATTRIBUTES: Form = {
    "version": Annotated[int, (VERSION, VERSION)],
    "dtype": Annotated[str, "b?float16|float32|float64"],
    "fingerprint": Text,
    "origin": str | None,
}
CHUNK_BYTES, CHUNKS_PER_SHARD = 2 << 20, 32
PACKED = {"scale_factor": 1, "add_offset": 0}  # of the CF conventions, with the value that changes nothing
TEXT = re.compile(r"values of type .*(string|utf|datetime|timedelta|'.?[USMm]\d)")  # arrays that can be no latents


class Latents:
    """Rows of a latents store or of any 2-D zarr array, read by range; satisfies ``atoms.Rows``, ``atoms.Stored``."""

    def __init__(
        self,
        path: Place,
        array: zarr.Array[Any],
        mass: NDArray[Any] | None,
        attributes: dict[str, Any],
        left: Sequence[str] = (),
    ) -> None:
        self.path, self.array, self.mass, self.attributes, self.left = path, array, mass, attributes, left
        self.place = path.resolve()  # also from another folder
        self.bfloat16 = attributes.get("dtype") == "bfloat16"
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype[Any] = np.dtype(np.float32) if self.bfloat16 else array.dtype

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        values = read(self.array, rows, self.path)
        return _from_bfloat16(values) if self.bfloat16 else values

    def take(self, index: NDArray[np.int64]) -> NDArray[Any]:
        """The rows of ``index`` (any number,), in that order."""
        distinct, inverse = np.unique(index, return_inverse=True)
        with readable(self.array, self.path):
            values = np.asarray(self.array.get_orthogonal_selection((distinct, slice(None))))
        return (_from_bfloat16(values) if self.bfloat16 else values)[inverse]

    @property
    def stored(self) -> str:
        """Name of the dtype on disk."""
        return "bfloat16" if self.bfloat16 else str(self.dtype.name)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is stored."""
        return int(self.shape[1] * self.array.dtype.itemsize)

    def held(self, span: slice) -> HeldRows:
        """A range of the rows in memory, as they are stored, numbered as before."""
        return HeldRows(self, span.start, read(self.array, span, self.path))

    @property
    def grains(self) -> tuple[int, ...]:
        """Rows that lie together, most first: in a file, and in a piece of it that is read at once."""
        return tuple(its[0] for its in (self.array.shards, self.array.chunks) if its)

    @property
    def fingerprint(self) -> str | None:
        return self.attributes.get("fingerprint")

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What its user should know of an array from elsewhere: chunks that are not there, which zarr does not mind,
        what else lies beside it, and what its attributes say of its numbers."""
        if self.attributes.get("format") == FORMAT:  # was checked when it was opened
            return ()
        notes = []
        if self.left:
            rest = ", ".join(self.left[:20]) + (", ..." if self.left[20:] else "")
            notes.append(f"the array {self.path} is read; left out beside it: {rest}")
        for name in ("_FillValue", "missing_value"):
            if (value := self.array.attrs.get(name)) is not None and not _is_nan(value):
                notes.append(f"{name} of {self.path} says that {value} means none; it is read as a number")
        missing = missing_chunks(self.path, self.array)
        fill = f"{self.array.fill_value!s}" if missing else ""
        note = (
            f"{missing:,} chunks of {self.path} are not stored, and are read as {fill}, its fill value; if that is not "
            "meant, the copy is not complete: copy it again"
        )
        return (*notes, note) if missing else tuple(notes)


class HeldRows:
    """Rows of ``latents`` from number ``first`` on, in memory as they are stored; satisfies ``atoms.Rows``."""

    def __init__(self, latents: Latents, first: int, values: NDArray[Any]) -> None:
        self.shape, self.dtype = latents.shape, latents.dtype
        self.bfloat16, self.first, self.values = latents.bfloat16, first, values

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        values = self.values[rows.start - self.first : rows.stop - self.first]
        return _from_bfloat16(values) if self.bfloat16 else values


def open_latents(path: str | Place, array: str | None = None, links: bool = True) -> Latents:
    """Opens a latents store, a group with one 2-D array, or a 2-D array (``array`` names one of several).

    links: whether its files may be symbolic links to files. Raises StoreError if there is nothing readable, or a piece
    of a latents store is missing.
    """
    path = as_place(path)
    node = open_node(path, foreign=True, links=links)
    if isinstance(node, zarr.Array):
        return _foreign(path, node)
    with meaningful(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Object at .* is not recognized")  # those that are refused
        attributes, arrays = dict(node.attrs), dict(node.arrays())
        groups = [f"{name}/" for name in node.group_keys()]
    if attributes.get("format") == "distot-run":
        raise InputError(f"{path} is a run, not latents; give the latents it was solved for")
    if attributes.get("unfinished") and "written" in attributes:
        raise StoreError(f"{path} is not complete; the command that was writing it goes on when it is given again")
    if attributes.get("unfinished"):
        raise StoreError(f"{path} is not complete: it is being written, or its writer was killed; delete it")
    refused = refusals(node)
    if attributes.get("format") == FORMAT:
        return _own(path, arrays, refused, attributes)
    if array is not None and "/" in array.strip("/") and array.split("/")[0] in node:
        first, _, rest = array.partition("/")
        return open_latents(path / first, rest, links)
    strange = [name for name, why in refused.items() if not TEXT.search(why)]
    names = [array] if array else [name for name, a in arrays.items() if a.ndim >= 2]
    if len(names) == 1 and names[0] in arrays and (array or not strange):
        left = [] if array else sorted([*(name for name in arrays if name != names[0]), *refused, *groups])
        return _foreign(path / names[0], arrays[names[0]], left)
    if refused and (array in refused or (array is None and not names)):
        raise StoreError(refused[array or min(refused)])
    beside = f" and the groups {sorted(groups)}" if groups else ""
    beside += f", and what cannot be read ({', '.join(sorted(strange))})" if strange else ""
    raise InputError(f"{path} holds the arrays {sorted(arrays)}{beside}; name the one with the latents (ingest --key)")


def _foreign(path: Place, array: zarr.Array[Any], left: Sequence[str] = ()) -> Latents:
    """An array that another program has written. Raises InputError if its numbers are others than those stored."""
    packed = [f"{name} = {array.attrs[name]}" for name, none in PACKED.items() if array.attrs.get(name, none) != none]
    if packed:
        raise InputError(
            f"the numbers of {path} are packed ({', '.join(packed)}); save them unpacked, as xarray has them in memory"
        )
    return Latents(path, array, None, {}, left)


def _is_nan(value: Any) -> bool:
    """Whether an attribute is NaN, in any of the ways that zarr and xarray write it."""
    return value != value or str(value) in ("NaN", "AAAAAAAA+H8=", "AADAfw==")


def _own(path: Place, arrays: dict[str, zarr.Array[Any]], refused: dict[str, str], about: dict[str, Any]) -> Latents:
    """A store that says that distot has written it. Raises StoreError if it is damaged."""
    try:
        check(about, ATTRIBUTES, others=True)
        if refused:
            raise Malformed(next(iter(refused.values())))
        if "z" not in arrays or ("mass" not in arrays and (path / "mass").exists()):
            raise Malformed(f"the array {'mass' if 'z' in arrays else 'z'} is missing")
        z, mass = arrays["z"], arrays.get("mass")
        stored = "uint16" if about["dtype"] == "bfloat16" else about["dtype"]
        if z.ndim != 2 or str(z.dtype) != stored:
            raise Malformed(f"z has shape {z.shape} and type {z.dtype}, where two axes and {stored} were announced")
        if mass is not None and (mass.shape, str(mass.dtype)) != (z.shape[:1], "float64"):
            raise Malformed(f"there are masses of shape {mass.shape} and type {mass.dtype} for {z.shape[0]:,} latents")
    except Malformed as error:
        raise StoreError(
            f"a zarr.json in {path} is damaged: {error}; restore it, or ingest the latents again"
        ) from error
    check_complete(path, *[z] if mass is None else [z, mass])
    return Latents(path, z, None if mass is None else read(mass, ..., path), about)


class LatentsWriter:
    """Takes latents row block by row block and writes whole shards, in constant memory; made by ``new_latents``."""

    def __init__(self, folder: Place, shape: tuple[int, int], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        stored = np.dtype("<u2" if dtype == "bfloat16" else dtype)
        n, d = shape
        chunk = max(1, min(n, CHUNK_BYTES // (d * stored.itemsize)))
        self.shard = chunk * max(1, min(CHUNKS_PER_SHARD, -(-n // chunk)))
        self.fingerprint = Fingerprint(shape, np.dtype(np.float32) if dtype == "bfloat16" else stored)
        self.written = self.filled = 0
        self.buffer = np.empty((self.shard, d), dtype=stored)
        self.group = zarr.create_group(zarr_store(folder), attributes={"format": FORMAT, "unfinished": True})
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
        write_vector(self.group, "mass", np.asarray(mass, dtype=np.float64))

    def _flush(self) -> None:
        self.array[self.written : self.written + self.filled] = self.buffer[: self.filled]
        self.written, self.filled = self.written + self.filled, 0

    def close(self, origin: str, more: Mapping[str, str]) -> None:
        """Writes what is left, and the attributes. Raises StoreError if rows are missing."""
        if self.filled:
            self._flush()
        if self.written != self.shape[0]:
            raise StoreError(
                f"{self.written:,} rows came where {self.shape[0]:,} were announced; the source was cut short"
            )
        about: dict[str, Any] = {**more, "format": FORMAT, "version": VERSION, "dtype": self.dtype, "origin": origin}
        self.group.attrs.put(about | {"fingerprint": self.fingerprint.hexdigest()})


@contextmanager
def new_latents(
    path: str | Place, shape: tuple[int, int], dtype: str, origin: str, about: Mapping[str, str] | None = None
) -> Iterator[LatentsWriter]:
    """A latents store under construction; it appears at ``path`` when the block ends without an error.

    dtype: float16, bfloat16, float32 or float64. ``origin`` says in words where the rows come from,
    ``about`` has further attributes, such as the fingerprint of an encoder.
    Raises StoreError if ``path`` exists, the disk is too small, or fewer rows than ``shape[0]`` were written.
    """
    path = as_place(path)
    if dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise InputError(f"latents cannot be stored as {dtype}; choose float16, bfloat16, float32 or float64")
    need_space(path, shape[0] * shape[1] * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize))
    with new_folder(path) as folder:
        writer = LatentsWriter(folder, shape, dtype)
        yield writer
        writer.close(origin, about or {})


def _to_bfloat16(rows: NDArray[Any]) -> NDArray[np.uint16]:
    """Rounds to nearest, ties to even."""
    bits = np.ascontiguousarray(rows, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def copy_latents(rows: Any, mass: NDArray[Any] | None, path: Place, origin: str) -> None:
    """Writes rows in memory as a latents store."""
    dtype = rows.dtype.name if rows.dtype.name in ("float16", "float32", "float64") else "float64"
    with new_latents(path, (rows.shape[0], rows.shape[1]), dtype, origin) as writer:
        for start in range(0, rows.shape[0], writer.shard):
            writer.write(rows[start : start + writer.shard])
        if mass is not None:
            writer.write_mass(mass)
