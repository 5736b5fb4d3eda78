"""Files of latents, read as a stream: npy, npz, safetensors, parquet, zarr.

A reader knows from the header alone what an array is, and gives its rows in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from distot.errors import InputError
from distot.parquet import read_table
from distot.store import Place, Url, check_npy, npy_header, open_latents
from distot.wanted import PIECE_BYTES, Blocks, Shape, Wanted, library, ranges, reading

BLOCK_BYTES = 32 << 20  # of a block as float64

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
SAFETENSORS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}
PACKED = ("scale", "scale_factor", "scaling_factor", "shift", "shift_factor", "add_offset", "zero_point")


@dataclass(frozen=True)
class Reader:
    """One array of a source: what its header says, and ``blocks(step)``, its rows in order, at most ``step`` a time."""

    name: str
    shape: Shape
    dtype: str
    blocks: Callable[[int], Blocks]
    notes: tuple[str, ...] = ()
    mass: NDArray[Any] | None = None

    def check_numbers(self) -> None:
        """Raises InputError if the values are not real numbers that numpy and the store know."""
        if self.dtype not in FLOATS + INTEGERS:
            raise InputError(f"{self.name} holds values of type {self.dtype}; save them as float32 numbers")

    def rows(self) -> Blocks:
        """All rows, in blocks of at most BLOCK_BYTES (or one row)."""
        return self.blocks(max(1, BLOCK_BYTES // (8 * max(1, prod(self.shape[1:])))))


def open_reader(path: Place, wanted: Wanted) -> Reader:
    """The reader for a file or folder, by its suffix. Raises InputError if it is missing or of no known format."""
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path")
    suffix = path.suffix.lower()
    if isinstance(path, Url):
        if suffix != ".zarr":
            raise InputError(f"{path} is in an object store, from where only zarr is read; copy the file here first")
        return _zarr(path, wanted)
    if path.is_dir():
        zarr = suffix == ".zarr" or any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup"))
        suffix = ".zarr" if zarr else ".parquet" if any(path.rglob("*.parquet")) else "folder"
    formats = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".parquet": _parquet, ".zarr": _zarr}
    if suffix not in formats:
        raise InputError(
            f"{path} is of no known format; give .npy, .npz, .safetensors, .parquet, a folder of .parquet or .zarr"
        )
    with reading(path):
        return formats[suffix](path, wanted)


def _npy(path: Path, wanted: Wanted) -> Reader:
    wanted.refuse_key(path, "holds a single array without a name")
    (shape, fortran, dtype), offset = check_npy(path)

    def blocks(step: int) -> Blocks:
        n, width = shape[0], prod(shape[1:])
        for rows in ranges(n, step):
            count = rows.stop - rows.start
            with reading(path):
                if fortran:
                    starts = [offset + (column * n + rows.start) * dtype.itemsize for column in range(width)]
                    block = np.stack([np.fromfile(path, dtype, count, offset=start) for start in starts], axis=1)
                else:
                    block = np.fromfile(path, dtype, count * width, offset=offset + rows.start * width * dtype.itemsize)
                block = block.reshape((count, *shape[1:]), order="F" if fortran else "C")
            yield block

    return Reader(str(path), shape, dtype.name, blocks)


def _npz(path: Path, wanted: Wanted) -> Reader:
    headers, rest = {}, []
    with ZipFile(path) as archive:
        members = archive.infolist()
        if members and (before := min(member.header_offset for member in members)):
            raise InputError(
                f"{path} has {before:,} bytes before its first array, as where two files were joined; save it anew"
            )
        for name in archive.namelist():
            if not name.endswith(".npy"):
                rest.append(name)
            elif name.removesuffix(".npy") in headers:
                raise InputError(f"{path} holds several arrays of the name {name.removesuffix('.npy')}; save it anew")
            else:
                with archive.open(name) as stream:
                    headers[name.removesuffix(".npy")] = npy_header(stream)
    shapes = {name: header[0] for name, header in headers.items()}
    odd = {name: f"values of type {its.name}" for name, (shape, _, its) in headers.items() if _odd(its, shape, wanted)}
    key = wanted.choose(path, {name: shape for name, shape in shapes.items() if name not in odd}, odd)
    shape, fortran, dtype = headers[key]
    if fortran:
        raise InputError(f"{path}: {key} is stored column by column; save it with numpy.ascontiguousarray, or as .npy")

    def blocks(step: int) -> Blocks:
        with reading(path), ZipFile(path) as archive, archive.open(f"{key}.npy") as stream:
            npy_header(stream)
            for rows in ranges(shape[0], step):
                block = np.empty((rows.stop - rows.start, *shape[1:]), dtype)
                flat = block.reshape(-1).view(np.uint8)
                for part in ranges(len(flat), PIECE_BYTES):
                    piece = stream.read(part.stop - part.start)
                    if len(piece) < part.stop - part.start:
                        raise EOFError(f"{key} ends too soon")
                    flat[part] = np.frombuffer(piece, np.uint8)
                yield block
            if stream.read(1):  # reading to the end also verifies the checksum
                raise ValueError(f"{key} is longer than its header says")

    return Reader(f"{path}: {key}", shape, dtype.name, blocks, wanted.left(path, [key], [*shapes, *rest]))


def _odd(dtype: np.dtype[Any], shape: Shape, wanted: Wanted) -> bool:
    """Whether an array might hold latents that numpy can only show as objects, records or complex numbers."""
    return dtype.kind in "OVc" and len(shape) == 1 and not wanted.vector


def _safetensors(path: Path, wanted: Wanted) -> Reader:
    tensors = library("safetensors")
    with reading(path, tensors.SafetensorError), tensors.safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
        key = wanted.choose(path, shapes)
        code = file.get_slice(key).get_dtype()
        about = file.metadata() or {}
    shape, letters = shapes[key], code.rstrip("0123456789")
    dtype = SAFETENSORS.get(letters, letters) + code.removeprefix(letters)

    def blocks(step: int) -> Blocks:
        for rows in ranges(shape[0], step):  # opened anew for each block, lest the pages read pile up
            with reading(path, tensors.SafetensorError), tensors.safe_open(path, framework="pt") as file:
                tensor = file.get_slice(key)[rows]
                block = np.array((tensor.float() if dtype == "bfloat16" else tensor).numpy())
            yield block

    notes = wanted.left(path, [key], shapes)
    if packed := [f"{name} {about[name]}" for name in PACKED if name in about]:
        notes += (f"metadata of {path} say {', '.join(packed)}; its numbers are stored as they are, without that",)
    return Reader(f"{path}: {key}", shape, dtype, blocks, notes)


def _zarr(path: Place, wanted: Wanted) -> Reader:
    with reading(path, KeyError, TypeError):
        latents = open_latents(path, wanted.key)
    if latents.attributes:
        wanted.refuse_key(path, "is a latents store, whose masses are taken over")
    chunk = latents.array.chunks[0] if latents.shape else 1

    def blocks(step: int) -> Blocks:
        with reading(path):
            for rows in ranges(latents.shape[0], max(1, step // chunk) * chunk):  # whole chunks, each decoded once
                block = latents[rows]
                yield from (block[part] for part in ranges(len(block), step))

    dtype = "bfloat16" if latents.bfloat16 else latents.dtype.name
    name = str(path) if wanted.key is None else f"{path}: {wanted.key}"
    return Reader(name, latents.shape, dtype, blocks, latents.notes, mass=latents.mass)


def _parquet(path: Path, wanted: Wanted) -> Reader:
    table = read_table(path, wanted)
    return Reader(table.name, table.shape, table.dtype, table.blocks, table.notes)
