"""What is written: under a name that is free, and never over, or into, what is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.format import write_array_header_1_0
from numpy.typing import DTypeLike, NDArray

from distot.errors import InputError, StoreError
from distot.store.files import explained, need_space, new_file
from distot.store.places import Place, Url


def check_out(out: Place, *read: object, goes_on: bool = False) -> None:
    """Raises InputError if ``out`` is, or lies in, a place that is read, however either is spelled; StoreError if
    something is there, unless the writer ``goes_on`` with what it finds."""
    with explained("write", out):
        for place in read:
            if isinstance(place, Path | Url) and _lies_in(out, place):
                raise InputError(f"writing {out} would change {place}, which is read; choose another name")
        if not goes_on:
            check_free(out)


def check_free(out: Place) -> None:
    """Raises StoreError if something is there, a link that leads nowhere included."""
    if out.exists() or (isinstance(out, Path) and out.is_symlink()):
        raise StoreError(f"{out} exists already; delete it first, or choose another name")


def check_holder(folder: Place) -> None:
    """Raises StoreError if the folder for several runs or files is one of these itself."""
    if any((folder / name).is_file() for name in ("config.json", "zarr.json", ".zgroup", ".zarray")):
        raise StoreError(f"{folder} is a run, or another store; choose another name for a folder of several")


def _lies_in(out: Place, place: Place) -> bool:
    if isinstance(out, Url) or isinstance(place, Url):
        same = isinstance(out, Url) and isinstance(place, Url) and (out.scheme, out.root) == (place.scheme, place.root)
        return same and f"{out.key}/".startswith(f"{place.key}/" if place.key else "")  # type: ignore[union-attr]
    if not place.exists():
        return False
    while any((place.parent / name).is_file() for name in ("zarr.json", ".zgroup")):
        place = place.parent  # an array in a store: the whole store is read
    real = Path(os.path.realpath(out))  # the file system sees through hard links and the case of letters
    return any(its.exists() and its.samefile(place) for its in (real, *real.parents))


@contextmanager
def fresh_file(path: Place) -> Iterator[Path]:
    """As ``new_file``, for a name that must be free before and after the file is written.

    Raises StoreError if it is not.
    """
    check_free(path)
    with new_file(path, over=False) as partial:
        yield partial


@contextmanager
def new_npy(path: Place, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[Callable[[NDArray[Any]], None]]:
    """An npy file under construction: takes its rows, in order, and appears when all were written and flushed.

    Raises StoreError if the name is not free, or the disk is too small.
    """
    kind = np.dtype(dtype)
    need_space(path, int(np.prod(shape, dtype=np.float64)) * kind.itemsize)
    with fresh_file(path) as partial, partial.open("wb") as file:
        write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
        )
        left = shape[0]

        def write(rows: NDArray[Any]) -> None:
            nonlocal left
            if rows.shape[1:] != shape[1:] or len(rows) > left:
                raise ValueError(f"rows of shape {rows.shape} where {(left, *shape[1:])} are left")
            _write(file, np.ascontiguousarray(rows, dtype=kind))
            left -= len(rows)

        yield write
        if left:
            raise ValueError(f"{left:,} rows were announced and not written")


def _write(file: IO[bytes], rows: NDArray[Any]) -> None:
    """By plain writes: a memory map would end the process where the disk is full, and numpy's say nothing of why."""
    file.write(rows.reshape(-1).view(np.uint8).data)


def save_npy(path: Place, values: NDArray[Any]) -> None:
    """Writes an array as an npy file. Raises StoreError if the name is not free, or the disk is too small."""
    with new_npy(path, values.shape, values.dtype) as write:
        write(values)
