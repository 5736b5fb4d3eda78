"""zarr arrays: written with checksums, read with errors that name the file at fault."""

from __future__ import annotations

import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from distot.errors import StoreError
from distot.store.numbers import NumbersOnly
from distot.store.places import Place, sizes, typed, zarr_store

CHUNK_NAME = re.compile(r"(?:c[/.])?(\d+(?:[/.]\d+)*)")  # of a stored object, in zarr 2 and 3
VECTOR_CHUNK = 1 << 20  # values in a chunk of a vector: 8 MiB of float64

DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, OSError, RuntimeError),
    *(TypeError, ValueError, lzma.LZMAError, zlib.error),
)
"""What zarr and its codecs raise for files that are damaged."""

Arrays = dict[str, NDArray[Any]]


def write_vector(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    chunks = tuple(max(1, min(VECTOR_CHUNK, n)) for n in values.shape)
    fill = float("nan") if values.dtype.kind == "f" else 0
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=[Crc32cCodec()], fill_value=fill
    )
    array[...] = values


def open_node(path: Place, foreign: bool = False, links: bool = False) -> zarr.Array[Any] | zarr.Group:
    """Opens what distot has written, or any zarr if it may be ``foreign``; ``links`` as in ``NumbersOnly``.

    Raises StoreError if there is none, its metadata is damaged, or it is an array of something else than numbers.
    """
    store = NumbersOnly(zarr_store(path, read_only=True), path, links)
    try:
        with meaningful(path):
            node = zarr.open(store, mode="r", zarr_format=None if foreign else 3)
            if not foreign:
                _raise(store.refused)
            return node
    except FileNotFoundError:
        _raise(store.refused)
        what = "is not a zarr store" if path.exists() else "does not exist"
        file = isinstance(path, Path) and path.is_file()
        data, store_name = (path, f"{str(path).removesuffix(path.suffix)}.zarr") if file else ("DATA.npy", path)
        raise StoreError(f"{path} {what}; make one with: distot ingest {typed(data)} {typed(store_name)}") from None


def open_to_write(path: Place) -> zarr.Group:
    """A group that distot has written, to go on with."""
    store = NumbersOnly(zarr_store(path), path)
    with meaningful(path):
        return zarr.open_group(store, mode="r+", zarr_format=3)


def refusals(group: zarr.Group) -> dict[str, str]:
    """Why some arrays of a group that was opened here are not in it, by their names."""
    assert isinstance(group.store, NumbersOnly)
    return group.store.refused


def _raise(refused: dict[str, str]) -> None:
    if refused:
        raise StoreError(next(iter(refused.values())))


@contextmanager
def meaningful(path: Place) -> Iterator[None]:
    """Turns what zarr says of damaged metadata into one sentence."""
    try:
        yield
    except (FileNotFoundError, StoreError):
        raise
    except DAMAGE as error:
        raise StoreError(
            f"a zarr.json in {path} is damaged ({type(error).__name__}: {error}); restore it, or make {path} anew"
        ) from error


def read(array: zarr.Array[Any], rows: slice | EllipsisType, path: Place) -> NDArray[Any]:
    with readable(array, path):
        return np.asarray(array[rows])


@contextmanager
def readable(array: zarr.Array[Any], path: Place) -> Iterator[None]:
    """Turns what zarr says of damaged chunks into one sentence that names the file."""
    try:
        yield
    except StoreError:
        raise
    except DAMAGE as error:
        raise StoreError(f"{_culprit(array, path, error)}; restore it from a copy, or make it anew") from error


def load(path: Place, rows: slice | EllipsisType = ..., whole: bool = False) -> NDArray[Any]:
    """Reads an array that distot has written, of which, if it is known to be ``whole``, no file is missing."""
    node = open_node(path)
    if not isinstance(node, zarr.Array):
        raise StoreError(f"{path} is not a zarr array; this folder was not written by distot")
    if whole and node.dtype.kind == "f":  # zarr leaves out files of integers that are all 0
        check_complete(path, node)
    return read(node, rows, path)


def pieces(array: zarr.Array[Any], path: Place) -> Iterator[tuple[slice | EllipsisType, str]]:
    """Row ranges and names, from ``path``, of the stored objects of an array with default chunk keys."""
    folder = f"{array.basename}/" if array.basename and path.name != array.basename else ""
    if not array.ndim:
        yield ..., f"{folder}c"
        return
    step = (array.shards or array.chunks)[0]
    for i in range(-(-array.shape[0] // step)):
        yield slice(i * step, (i + 1) * step), "/".join([f"{folder}c", str(i), *["0"] * (array.ndim - 1)])


def _culprit(array: zarr.Array[Any], path: Place, error: Exception) -> str:
    """Names the first file of an array that cannot be read."""
    for rows, name in pieces(array, path):
        try:
            array[rows]
        except DAMAGE:
            return f"{path / name} is damaged or cut short"
    return f"{path} cannot be read ({error})"


def check_complete(path: Place, *arrays: zarr.Array[Any]) -> None:
    """Raises StoreError if a file of these arrays is missing."""
    there = sizes(path)
    for array in arrays:
        for _, name in pieces(array, path):
            if not there.get(name):
                raise StoreError(
                    f"{path / name} is missing or empty; restore this file from a copy, or ingest the latents again"
                )


def missing_chunks(path: Place, array: zarr.Array[Any]) -> int:
    """Stored objects that the array at ``path`` lacks: zarr reads its fill value there, be it meant or a file lost."""
    grid = [-(-n // max(1, step)) for n, step in zip(array.shape, array.shards or array.chunks, strict=True)]
    found = set()
    for name, size in sizes(path).items():
        if size and (match := CHUNK_NAME.fullmatch(name)):
            place = tuple(int(digits) for digits in re.split("[/.]", match[1]))
            if len(place) == len(grid) and all(i < n for i, n in zip(place, grid, strict=True)):
                found.add(place)
    return prod(grid) - len(found)
