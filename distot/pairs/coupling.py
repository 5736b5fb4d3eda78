"""The coupling of a solution, sample by sample: noise by its number, and the latent that goes with it.

Legend: B samples, N latents, n atoms (equal latents are one), d dimension, k winners.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.assign import Winners
from distot.atoms import SHARE, Rows, available
from distot.entropic import Soft
from distot.errors import StoreError
from distot.given import array
from distot.orbit import Orbit
from distot.pairs.noise import Chance, Noise, check_seed
from distot.solution import Solution
from distot.solver import entropic_part
from distot.store import Latents, Opened, Place, open_latents
from distot.target import check_mass

Index = NDArray[np.int64]


class Coupling:
    """Numbered samples of a solution's source with their latents.

    orbits: whether the samples come in orbits of the source, which cost a fraction and depend on each other.
    """

    def __init__(self, solution: Solution, seed: int, orbits: bool = True) -> None:
        check_seed(seed, 0)
        self.solution, self.problem = solution, solution.problem
        self.basis = self.problem.basis if orbits else None
        source = self.problem.source
        whole = Orbit(source.dim, "none", self.problem.seed) if self.basis is None else self.problem.orbit
        self.noise = Noise(source, whole, seed)
        rows, kept = solution.held.latents, self.problem.target.atoms.kept
        self.opened = Opened(rows.place) if isinstance(rows, Latents) and kept == "disk" else None
        self.soft: Soft | None = entropic_part(self.problem, solution.options)

    @property
    def latents(self) -> int:
        """N."""
        return self.problem.target.latents

    @cached_property
    def mass(self) -> NDArray[np.float64]:
        """Wanted masses of the latents (N,)."""
        held = self.solution.held
        mass = held.latents.mass if held.mass is None and isinstance(held.latents, Latents) else held.mass
        return check_mass(None if mass is None else array(mass, "mass"), self.latents)[0]

    @cached_property
    def groups(self) -> tuple[Index, Index]:
        """Latents of positive mass, atom by atom (m,), and where those of each atom begin (n + 1,)."""
        atom_of = self.problem.target.atom_of
        kept = np.flatnonzero(atom_of >= 0)
        order = kept[np.argsort(atom_of[kept], kind="stable")]
        return order, np.searchsorted(atom_of[order], np.arange(self.problem.target.n + 1))

    @cached_property
    def _ends(self) -> NDArray[np.float64]:
        """Masses of those latents, summed up (m + 1,)."""
        return np.concatenate([[0.0], np.cumsum(self.mass[self.groups[0]])])

    def search(self, epoch: int, first: int, last: int, k: int) -> tuple[Tensor, Winners]:
        """Samples ``first`` to ``last`` of an epoch, (B, d) float64 in user units, with their k best atoms."""
        if self.opened is not None:
            self.opened.check()
        z = self.noise.draws(epoch, first, last)
        x = self.noise.points(z, first, last)
        heights = self.solution.held.progress.state.average
        exact = self.solution.held.assigner.exact
        if self.basis is None:
            return x, exact(self.problem.frame.source_in(x).to(heights.device), heights, k)
        near = exact(self.noise.orbit.of(z, self.basis), heights, k)
        begin = first // self.noise.orbit.size * self.noise.orbit.size
        own = slice(first - begin, last - begin)
        return x, Winners(near.index[own], near.score[own])

    def pairs(self, epoch: int, first: int, last: int) -> tuple[Tensor, Index]:
        """Samples ``first`` to ``last`` of an epoch, (B, d) float64 in user units, and their latents (B,).

        At a fixed epsilon the latent is drawn from the softmax of the best ones, by the largest score + epsilon G with
        Gumbel's G, math (22).
        """
        x, near = self.search(epoch, first, last, 1 if self.soft is None else self.soft.top_k)
        atom = near.index[:, 0]
        if self.soft is not None:
            u = self.noise.chances(Chance.SOFT, epoch, first, last, near.index.shape[1])
            chance = -torch.log(-torch.log(torch.from_numpy(np.maximum(u, 2.0**-54)))).to(near.score.device)
            best = (near.score.double() / self.soft.epsilon + chance).argmax(dim=1, keepdim=True)
            atom = near.index.gather(1, best)[:, 0]
        return x, self.pick(atom.cpu().numpy(), epoch, first)

    def pick(self, atom: Index, epoch: int, first: int) -> Index:
        """A latent of each atom (B,), in proportion to the masses of equal ones, for the samples from ``first`` on."""
        target = self.problem.target
        if target.n == np.count_nonzero(target.atom_of >= 0):
            return target.original[atom]
        order, starts = self.groups
        u = self.noise.chances(Chance.COPY, epoch, first, first + len(atom))[:, 0]
        begin, end = self._ends[starts[atom]], self._ends[starts[atom + 1]]
        place = np.searchsorted(self._ends, begin + u * (end - begin), side="right") - 1
        return order[np.clip(place, starts[atom], starts[atom + 1] - 1)]


class Shelf:
    """Latents by their index, as float32 tensors; a store that fits is read into memory once."""

    def __init__(self, rows: Rows) -> None:
        self.rows: Rows | Latents = rows
        self.opened = Opened(rows.place) if isinstance(rows, Latents) else None
        if isinstance(rows, Latents):
            size = rows.shape[0] * rows.shape[1] * rows.dtype.itemsize
            if size <= SHARE * available(torch.device("cpu")):
                self.rows, self.opened = rows[0 : rows.shape[0]], None

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, which opens a store again."""
        if self.opened is None or not isinstance(self.rows, Latents):
            return Shelf, (self.rows,)
        return _opened_shelf, (self.opened.place, self.rows.fingerprint)

    def __deepcopy__(self, memo: object) -> Shelf:
        return self

    def take(self, index: Index) -> Tensor:
        """(B, d) for any numbers of latents (B,)."""
        if self.opened is not None:
            self.opened.check()
        found = self.rows.take(index) if isinstance(self.rows, Latents) else np.asarray(self.rows)[index]
        return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))


def _opened_shelf(place: Place, fingerprint: str | None) -> Shelf:
    rows = open_latents(place)
    if rows.fingerprint != fingerprint:
        raise StoreError(f"the latents at {place} are others than before (their fingerprint differs); put those back")
    return Shelf(rows)
