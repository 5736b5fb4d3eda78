"""Pairs of noise and data for flow matching, by the optimal coupling of the whole data set.

Legend: B samples of a batch, E of an epoch, N latents, d dimension.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from distot.api import load
from distot.errors import InputError
from distot.pairs.balance import Balanced, balance, balanced_index
from distot.pairs.coupling import Coupling, Shelf
from distot.pairs.loader import LARGE, Batch, Loader, Plan
from distot.pairs.turns import Ledger
from distot.solution import Solution
from distot.store import Place


class Pairs(Loader):
    """Batches (noise (B, d) float32, latent (B, d) float32, index (B,) int64) without end of searches by hand.

    Noise has the law of the source, in your units; the latent is T(noise), and index its number, as ``solution.assign``
    says it. Of equal latents one is drawn in proportion to their masses; at a fixed epsilon the latent is drawn from
    the softmax of the best ``top_k``.

        for noise, latent, index in DataLoader(distot.Pairs("run.zarr"), batch_size=None, num_workers=2): ...

    solution: a Solution, or the path of a run; source: of a run that draws from your callable.
    samples: E, samples of an epoch; default N. Every epoch has other noise, and every iteration is the next epoch;
        epoch, ``set_epoch``: which one. endless: epoch follows epoch.
    orbits: samples of a symmetric source come in orbits, which costs a fraction of the search; each one has exactly the
        law of the source, but those of an orbit depend on each other, and lie in one pool of some thousand that is
        shuffled. False: all are independent.
    balance: over an epoch every latent gets exactly its share of the samples, the largest remainders rounded up; costs
        a search of the whole epoch beforehand, in every rank, and E integers; ``balanced`` says what it changed. The
        search is done by ``set_epoch``, or else by the first worker that comes to the epoch.
    latents: False leaves them out, index says all.
    rank, world, start, drop_last: see ``Plan`` and ``Loader``.

    A pickle, for spawned workers say, has the heights, and the absolute path of the latents or, if they were given as
    an array, these.

    Raises InputError for arguments that make no sense, StoreError as ``load`` does.
    """

    def __init__(
        self,
        solution: Solution | str | Place,
        batch: int = 256,
        *,
        seed: int = 0,
        samples: int | None = None,
        epoch: int = 0,
        start: int = 0,
        endless: bool = False,
        drop_last: bool | None = None,
        orbits: bool = True,
        balance: bool = False,
        latents: bool = True,
        rank: int | None = None,
        world: int | None = None,
        source: object = None,
    ) -> None:
        its = solution if isinstance(solution, Solution) else load(solution, source=source)
        self._solution, self._orbits, self._latents = its, orbits, latents
        count = its.facts.shape[0] if samples is None else samples
        super().__init__(Plan(count, batch, seed, endless=endless), epoch, start, rank, world, drop_last)
        if balance and endless:
            raise InputError("balance looks at whole epochs: leave out endless, and call set_epoch for each")
        if self.coupling.problem.target.atoms.whole is None:
            self.pool = LARGE
        _ = self.shelf  # read once, before workers are forked
        self.balanced: Balanced | None = None
        self._index = Ledger(count) if balance else None
        self.prepare(epoch)

    @cached_property
    def coupling(self) -> Coupling:
        return Coupling(self._solution, self.plan.seed, self._orbits)

    @cached_property
    def shelf(self) -> Shelf | None:
        return Shelf(self.coupling.solution.held.latents) if self._latents else None

    def prepare(self, epoch: int) -> None:
        """Balances an epoch."""

        def find() -> NDArray[np.int64]:
            self.balanced = balance(self.coupling, epoch, self.plan.used)
            return balanced_index(self.coupling, self.balanced, epoch)

        if self._index is not None:
            self._index.fill(epoch, self.plan.used, find)

    def make(self, epoch: int, first: int, last: int) -> Batch:
        if get_worker_info() is not None and self.coupling.problem.target.atoms.device.type == "cuda":
            raise InputError("latents on a GPU are searched by this process alone: use num_workers=0")
        if self._index is not None:
            x, index = self.coupling.noise.samples(epoch, first, last), self._index.read(epoch, slice(first, last))
        else:
            x, index = self.coupling.pairs(epoch, first, last)
        return batch_of(x, index, self.shelf)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked: the heights, and where latents are, which are opened again there."""
        state = super().__getstate__() | {"_solution": handed_on(self._solution)}
        return {name: value for name, value in state.items() if name not in ("coupling", "shelf")}


def handed_on(solution: Solution, saving: str = 'save it (solution.save("run.zarr"))') -> Solution:
    """What another process needs of a solution. Raises InputError if it would have to take latents from memory."""
    if solution.run is None:
        raise InputError(
            "these pairs come from a solution in memory, which only forked workers can have; "
            f"{saving} and give the path"
        )
    return solution.slim()


def batch_of(x: Tensor, index: np.ndarray[Any, np.dtype[np.int64]], shelf: Shelf | None) -> Batch:
    """What is handed out of samples (B, d) and their latents (B,)."""
    numbers = torch.from_numpy(np.ascontiguousarray(index))
    noise = x.to(torch.float32)
    return (noise, numbers) if shelf is None else (noise, shelf.take(index), numbers)
