"""Masses of the cells from orbits, and their squared relative error with an honest error bar; docs/math.md (8), (19).

An orbit is one observation: its points depend on each other, those of two orbits do not. A source without symmetry has
orbits of one point. Legend: n atoms, S orbits of T points, M = S T samples, k winners that share a sample. On a grid
every process adds the samples of its column and keeps the masses of its own cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from distot.grid import Axis, Split
from distot.power import Array

LEVEL = 0.95
KEPT = 1 << 21  # winners of some orbits, evenly spread over all, that are remembered for the variance
MEETINGS = 4e6  # pairs of orbits with a cell in common, of which its second part is estimated


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float

    def lower(self, level: float = LEVEL) -> float:
        """One-sided lower confidence limit."""
        return self.value - NormalDist().inv_cdf(level) * self.error


class Masses:
    """What ``samples`` samples say about the masses of cells; ``size``: points T of an orbit.

    ``sum``, after all of them were added, makes the masses those of the samples of all processes.
    """

    def __init__(self, split: Split, size: int, samples: int) -> None:
        self.split, self.size, self.samples = split, size, samples
        # sum_s c_is, with c_is the share that atom i has of orbit s, 0 <= c_is <= T; and sum_s c_is²
        self.total, self.squares = np.zeros(split.count), np.zeros(split.count)
        self._kept: list[NDArray[np.float64]] = []  # (3, m): orbit, atom, share

    def add(self, first: int, index: Tensor, share: Tensor) -> None:
        """Whole orbits, one after another, from sample number ``first``: winners (B, k) and their shares (B, k) of each
        sample, which sum to 1."""
        points, k = index.shape
        row = np.repeat(np.arange(points // self.size, dtype=np.int64), self.size * k)
        entries = (share.double().flatten().cpu().numpy(), (row, index.flatten().cpu().numpy()))
        found = sparse.csr_array(entries, shape=(points // self.size, self.split.n))
        own = slice(self.split.first, self.split.first + self.split.count)
        self.total += found.sum(axis=0)[own]
        self.squares += found.power(2).sum(axis=0)[own]
        stride, orbit = 1 + self.samples * k // KEPT, first // self.size
        begin = -orbit % stride
        kept = found[begin::stride].tocoo()
        self._kept.append(np.stack([orbit + begin + stride * kept.row.astype(np.int64), kept.col, kept.data]))

    def sum(self, axis: Axis) -> None:
        """Adds up what the processes of the sample axis have found."""
        self.total, self.squares = axis.sum(torch.from_numpy(np.stack([self.total, self.squares]))).numpy()
        self._kept = [axis.gather(torch.from_numpy(np.concatenate(self._kept, axis=1).T)).T.numpy()]

    def chi2(self, mass: Array) -> Estimate:
        """Unbiased chi2 (19), from pairs of orbits, with its standard error; mass: of own atoms.

        It is a U-statistic with kernel g(s, s') = sum_i c_is c_is' / (T² nu_i) - 1, so its variance is
        (4 (S - 2) z1 + 2 z2) / (S (S - 1)) with z1 = Var E[g | s] and z2 = Var g. z2 is the variance over all pairs of
        some orbits, and no smaller than (n - 1) / T², its value for independent points at the solution; z1 is the
        variance over orbits of their mean g with all others, less what z2 adds to it.

        Raises ValueError for fewer than two orbits.
        """
        t, axis, n = self.size, self.split.axis, self.split.n
        m = axis.total(float(self.total.sum()))
        orbits = round(m / t)
        if orbits < 2:
            raise ValueError(f"chi2 needs at least two samples, not {m:.0f}; from orbits of {t}, {2 * t}")
        pairs = axis.total(float(((self.total**2 - self.squares) / mass).sum())) / (m * (m - t))
        orbit, atom, share = np.concatenate(self._kept, axis=1)
        atoms, column = np.unique(atom.astype(np.int64), return_inverse=True)
        kept = sparse.csr_array((share, (np.unique(orbit, return_inverse=True)[1], column)))
        own = torch.from_numpy(np.stack([self.total / mass, 1 / mass], axis=1))
        weight, inverse = self.split.pick(own, torch.from_numpy(atoms)).T.numpy()
        mean = (kept @ weight - kept.power(2) @ inverse) / (t * (m - t))
        meetings = float((np.bincount(kept.indices).astype(np.float64) ** 2).sum())
        part = kept[:: int(np.ceil(max(1.0, meetings / MEETINGS) ** 0.5))]
        met = part @ sparse.diags_array(inverse) @ part.T
        others = part.shape[0] * (part.shape[0] - 1)
        squares = float((met.data**2).sum() - (met.diagonal() ** 2).sum()) / (others * t**4)
        z2 = max(squares - pairs**2, (n - 1.0) / t**2)
        z1 = max(float(mean.var(ddof=1)) - z2 / (orbits - 1), 0.0)
        return Estimate(pairs - 1, float(np.sqrt((4 * (orbits - 2) * z1 + 2 * z2) / (orbits * (orbits - 1)))))


def upper(found: Estimate, level: float = LEVEL) -> float:
    """One-sided upper confidence limit of chi2.

    The estimate and its error rise and fall together, so value + z error falls short of the truth too often; the
    second-order term of the limit on the logarithmic scale, value exp(z error / value), mends that.
    """
    reach = NormalDist().inv_cdf(level) * found.error
    return found.value + reach + reach**2 / (2 * max(found.value, found.error))
