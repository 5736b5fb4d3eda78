"""Candidates in bfloat16, decided in float32: the winners and scores of the plain search, bit for bit, in less time.

Products of bfloat16 numbers come at twice the rate where a processor has them (AVX512-BF16). What they may be off by is
known for every atom and sample, math (35), so none that could win is left out.
Legend: B samples, n atoms, d dimension, k winners.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from distot import _native
from distot.assign import Winners

UNIT = 2.0**-24  # relative error of rounding to float32
CUT = 4  # parts of the coordinates along the principal axes of the atoms: these and the others
BOUNDS = 4  # numbers of a row that bound what the others have lost
ROWS = 8192  # of atoms that are made narrow at once
KNOWN = 65_536  # atoms that the axes are taken from
LEAST_ATOMS, LEAST_DIM = 2000, 16  # from which it may be worth its while
TRIAL = 1024  # samples of a call from which there is a choice: to turn and round a few costs more than it saves


def row_bytes(dim: int) -> int:
    """That an atom takes beside its own."""
    return 4 * ((dim + 1) // 2) + 2 * BOUNDS


class Narrow:
    """Atoms (n, d) in bfloat16, along their principal axes, with bounds of what that takes from their scores.

    With ~ for what bfloat16 keeps, <x, y> - <x~, y~> is at most |x| |y - y~| + |x - x~| |y~|, and so it is in each part
    of the coordinates. Most of the length of atoms is along few axes, where samples are short: bounds of two parts
    together are far smaller than one of the whole. They go to the end of the rows, so that the product of two rows is
    the largest that <x, y> may be.
    """

    def __init__(self, atoms: Tensor) -> None:
        n, d = atoms.shape
        self.atoms = atoms
        self.rounding = 2.2 * (d + 16) * UNIT  # share of |h| + |x| |y| that sums in float32 may be off by, both of them
        some = atoms[:: -(-n // KNOWN)].double()
        self.axes = torch.linalg.eigh(some.T @ some).eigenvectors.flip(1)  # (d, d)
        self.rows = torch.empty(n, row_bytes(d) // 4, dtype=torch.int32)
        for first in range(0, n, ROWS):
            own = slice(first, first + ROWS)
            turned = atoms[own].double() @ self.axes
            kept = turned.bfloat16().double()
            lost = _lengths(turned - kept) + self.rounding * turned.norm(dim=1, keepdim=True)
            self.rows[own] = _narrow(turned, lost, _lengths(kept))

    def __call__(self, x: Tensor, heights: Tensor, near: Winners, isa: str) -> None:
        """Fills ``near`` with the winners of samples x (B, d) among all atoms, heights (n,) float32."""
        turned = x.double() @ self.axes
        rows = _narrow(turned, _lengths(turned), _lengths(turned - turned.bfloat16().double()))
        bound = heights + (self.rounding * heights.abs().clamp_max(1e30) + 1e-30)
        found, narrow = (near.index, near.score), (rows, self.rows, bound)
        _native.search_narrow(x[:, None], self.atoms[:, None], heights, torch.get_num_threads(), isa, *found, *narrow)


def _narrow(values: Tensor, *bounds: Tensor) -> Tensor:
    """Rows (m, pairs) of values (m, d) to the nearest bfloat16, and of bounds (m, 2) rounded up."""
    m, d = values.shape
    narrow = torch.zeros(m, (d + 1) // 2 * 2 + BOUNDS, dtype=torch.bfloat16)
    narrow[:, :d] = values
    narrow[:, -BOUNDS:] = torch.cat(bounds, dim=1) * (1 + 2.0**-7)
    return narrow.view(torch.int32)


def _lengths(rows: Tensor) -> Tensor:
    """Of the two parts of rows (m, d): (m, 2)."""
    return torch.stack([rows[:, :CUT].norm(dim=1), rows[:, CUT:].norm(dim=1)], dim=1)


class Race:
    """Which of two ways to the same result is the faster one, by the clock, on the work itself.

    Calls 1, 2, 4, 8, ... take the way that is due to be tried; the others the faster one so far. Small calls take the
    first way and do not count.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.pace = [torch.inf, torch.inf]  # seconds a sample, of the newest trial

    @property
    def ahead(self) -> int:
        """Number of the faster way, 0 or 1."""
        return int(self.pace[1] < self.pace[0])

    def __call__(self, samples: int, ways: tuple[Callable[[], object], Callable[[], object]]) -> None:
        if samples < TRIAL:
            ways[0]()
            return
        self.calls += 1
        trial = not self.calls & (self.calls - 1)
        way = self.calls.bit_length() % 2 if trial else self.ahead
        began = time.perf_counter()
        ways[way]()
        if trial:
            self.pace[way] = (time.perf_counter() - began) / samples
