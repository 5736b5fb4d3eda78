"""What latents must be at the cost -log<x, y>: unit vectors, none of them with more mass than it can be reached by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distot.atoms import Reader, Rows, blocks
from distot.errors import InputError
from distot.grid import Axis
from distot.power import Array

UNIT = 2.0**-8  # by which the length of a unit vector may be off: that of one in bfloat16 is, by less


def check_unit(rows: Rows, span: slice, axis: Axis, cache: dict[Any, Any]) -> None:
    """Raises InputError for rows whose length is not 1, to ``UNIT``."""
    key = "unit", span.start, span.stop
    if key not in cache:
        wrong, first, its, read = 0, -1, 0.0, Reader(rows)
        for block in blocks(span.stop - span.start, rows.shape[1]):
            begin = span.start + block.start
            y = np.asarray(read(begin, span.start + block.stop), dtype=np.float64)
            length = np.sqrt((y**2).sum(axis=1))
            bad = ~(np.abs(length - 1) <= UNIT)
            if bad.any() and not wrong:
                first, its = begin + int(bad.argmax()), float(length[bad.argmax()])
            wrong += int(bad.sum())
        cache[key] = wrong, first, its
    reports = axis.objects(cache[key])
    if total := sum(count for count, *_ in reports):
        _, row, length = next(report for report in reports if report[0])
        raise InputError(
            f"{total:,} of {rows.shape[0]:,} latents are not unit vectors, as the cost 'log' needs them; the first is "
            f"row {row:,}, of length {length:.6g}; normalise them, latents / |latents|"
        )


def check_half(mass: Array, row: NDArray[np.int64], axis: Axis) -> None:
    """Raises InputError for an atom of more than half of all mass. mass, row: of own ones."""
    heavy = mass > 0.5 + 1e-9
    reports = axis.objects([(int(i), float(m)) for i, m in zip(row[heavy], mass[heavy], strict=True)])
    for i, m in (report for its in reports for report in its):
        raise InputError(
            f"latent {i:,} has the mass {m:.6g}, and -log<x, y> is finite on half of the sphere only: every plan costs "
            "infinitely much; give it less, or take the cost 'quadratic'"
        )
