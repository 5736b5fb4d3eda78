"""Latents from a file into a latents store, as a stream of row blocks: nothing here grows with N but the masses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distot.errors import InputError
from distot.readers import FLOATS, Reader, open_reader
from distot.store import Place, as_place, check_out, new_latents, open_latents
from distot.target import check_mass, check_rows
from distot.wanted import Wanted

BFLOAT16_TOP = np.float32(float.fromhex("0x1.ffp127"))  # the smallest number that rounds to Inf in bfloat16


@dataclass(frozen=True)
class Ingested:
    """What was stored, and remarks on what was done to it."""

    path: Place
    shape: tuple[int, int]
    dtype: str
    fingerprint: str
    notes: tuple[str, ...]


def ingest(
    source: str | Place,
    destination: str | Place,
    *,
    key: str | None = None,
    mass: str | Place | None = None,
    mass_key: str | None = None,
    dtype: str | None = None,
    flatten: bool = False,
    on_rows: Callable[[int, int], None] | None = None,
) -> Ingested:
    """Stores the latents of ``source`` (npy, npz, safetensors, parquet, zarr) at ``destination``, in constant memory.

    ``key`` names one of several arrays. Masses come from the file ``mass``, or from the array ``mass_key`` of it or of
    the source; a latents store keeps its own. ``on_rows(done, total)`` is called after each block.
    Raises InputError for what cannot be used, StoreError if ``destination`` exists or cannot be written; then nothing
    is left there.
    """
    source, destination = as_place(source), as_place(destination)
    check_out(destination, source, None if mass is None else as_place(mass))
    reader = open_reader(source, Wanted(key, besides=mass_key if mass is None else None))
    reader.check_numbers()
    shape = _row_shape(reader, flatten)
    check_rows(np.broadcast_to(np.float32(0), shape))
    stored, notes = _stored_dtype(reader, dtype)
    with new_latents(destination, shape, stored, origin=source.name + reader.name.removeprefix(str(source))) as writer:
        masses, told = reader.mass, reader.notes
        if mass is not None or mass_key is not None:
            masses, more = _masses(as_place(mass or source), mass_key, shape[0])
            told += more
        if masses is not None:
            notes += check_mass(masses, shape[0])[1]
            writer.write_mass(masses)
        done = bad = first = 0
        for block in reader.rows():
            block = block.reshape(len(block), shape[1])
            finite = np.isfinite(block).all(axis=1)
            if not finite.all():
                first = first if bad else done + int((~finite).argmax())
                bad += int((~finite).sum())
            if not bad:
                writer.write(_converted(block, stored, reader, done))
            done += len(block)
            if on_rows is not None:
                on_rows(done, shape[0])
        if bad:
            raise InputError(
                f"{bad:,} of {done:,} latents in {reader.name} contain NaN or Inf, the first is row {first:,}; "
                "remove or mend these rows"
            )
    fingerprint = open_latents(destination).fingerprint
    return Ingested(destination, shape, stored, str(fingerprint), (*told, *notes))


def _row_shape(reader: Reader, flatten: bool) -> tuple[int, int]:
    """Shape of the latents as rows. Raises InputError if each latent is not a row and may not be flattened."""
    if len(reader.shape) < 2:
        raise InputError(f"{reader.name} has shape {reader.shape}; latents need (N, d), reshape numbers to (N, 1)")
    rows = (reader.shape[0], prod(reader.shape[1:]))
    if max(rows) >= 2**48 or prod(rows) >= 2**60:
        raise InputError(f"{reader.name} claims the shape {reader.shape}, which no file can hold; make it anew")
    if len(reader.shape) > 2 and not flatten:
        raise InputError(f"{reader.name} has shape {reader.shape}; flatten each latent to a row with --flatten: {rows}")
    return rows


def _stored_dtype(reader: Reader, wanted: str | None) -> tuple[str, list[str]]:
    """The dtype to store, and a note if integers become floats."""
    if reader.dtype in FLOATS:
        return wanted or reader.dtype, []
    stored = wanted or "float32"
    note = f"{reader.name} holds {reader.dtype} integers; they are stored as {stored}, rounded if that has fewer digits"
    return stored, [note]


def _converted(rows: NDArray[Any], dtype: str, reader: Reader, start: int) -> NDArray[Any]:
    """Finite rows in the stored dtype (float32 for bfloat16). Raises InputError if a value is too large for it."""
    with np.errstate(over="ignore"):
        narrow = rows.astype("float32" if dtype == "bfloat16" else dtype, copy=False)
    top = BFLOAT16_TOP if dtype == "bfloat16" else np.inf
    if narrow.max() >= top or narrow.min() <= -top:
        row = start + int((np.abs(narrow) >= top).any(axis=1).argmax())
        wider = reader.dtype if reader.dtype in FLOATS else "float32"
        raise InputError(f"row {row:,} of {reader.name} is too large for {dtype}; keep {wider} (--dtype {wider})")
    return narrow


def _masses(path: Place, key: str | None, n: int) -> tuple[NDArray[Any], tuple[str, ...]]:
    """The masses (N,) as the user gave them, and notes of their reader."""
    reader = open_reader(path, Wanted(key, vector=True))
    reader.check_numbers()
    if reader.shape != (n,):
        raise InputError(f"{reader.name} has shape {reader.shape}; the masses need one value for each latent, ({n},)")
    return np.concatenate(list(reader.rows())), reader.notes
