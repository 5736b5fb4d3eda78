"""Pairs of noise and data for flow matching, by the optimal coupling of the whole data set.

Legend: B samples of a batch, E of an epoch, N latents, d dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from distot.api import load
from distot.errors import InputError
from distot.pairs.balance import Balanced, balance, balanced_index
from distot.pairs.coupling import Coupling, Shelf
from distot.pairs.loader import LARGE, Batch, Loader, Plan
from distot.solution import Solution
from distot.store import Place


class Pairs(Loader):
    """Batches (noise (B, d) float32, latent (B, d) float32, index (B,) int64) without end of searches by hand.

    Noise has the law of the source, in your units; the latent is T(noise), and index its number, as ``solution.assign``
    says it. Of equal latents one is drawn in proportion to their masses; at a fixed epsilon the latent is drawn from
    the softmax of the best ``top_k``.

        for noise, latent, index in DataLoader(distot.Pairs("run.zarr"), batch_size=None, num_workers=2): ...

    solution: a Solution, or the path of a run; source: of a run that draws from your callable.
    samples: E, samples of an epoch; default N. epoch, ``set_epoch``: which one; every epoch has other noise. endless:
        epoch follows epoch.
    orbits: samples of a symmetric source come in orbits, which costs a fraction of the search; each one has exactly the
        law of the source, but those of an orbit depend on each other, and lie in one pool of some thousand that is
        shuffled. False: all are independent.
    balance: over an epoch every latent gets exactly its share of the samples, the largest remainders rounded up; costs
        a search of the whole epoch beforehand, in every rank, and E integers; ``balanced`` says what it changed.
    latents: False leaves them out, index says all.
    rank, world, start, drop_last: see ``Plan`` and ``Loader``.

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
        drop_last: bool = False,
        orbits: bool = True,
        balance: bool = False,
        latents: bool = True,
        rank: int | None = None,
        world: int | None = None,
        source: object = None,
    ) -> None:
        found = solution if isinstance(solution, Solution) else load(solution, source=source)
        self.coupling = Coupling(found, seed, orbits)
        count = self.coupling.latents if samples is None else samples
        super().__init__(Plan(count, batch, seed, rank, world, endless, drop_last), epoch, start)
        if found.problem.target.atoms.whole is None:
            self.pool = LARGE
        if balance and endless:
            raise InputError("balance looks at whole epochs: leave out endless, and call set_epoch for each")
        self.shelf = Shelf(found.held.latents) if latents else None
        self.balanced: Balanced | None = None
        self._index = torch.empty(count if balance else 0, dtype=torch.int64).share_memory_()
        self._balance()

    def _balance(self) -> None:
        if len(self._index):
            self.balanced = balance(self.coupling, self.epoch, self.plan.samples)
            self._index.copy_(torch.from_numpy(balanced_index(self.coupling, self.balanced, self.epoch)))

    def set_epoch(self, epoch: int) -> None:
        changed = epoch != self.epoch
        super().set_epoch(epoch)
        if changed:
            self._balance()

    def make(self, epoch: int, first: int, last: int) -> Batch:
        if get_worker_info() is not None and self.coupling.problem.target.atoms.device.type == "cuda":
            raise InputError("latents on a GPU are searched by this process alone: use num_workers=0")
        if len(self._index):
            x, index = self.coupling.noise.samples(epoch, first, last), self._index[first:last].numpy()
        else:
            x, index = self.coupling.pairs(epoch, first, last)
        return batch_of(x, index, self.shelf)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked: the run is opened again there."""
        solution = self.coupling.solution
        if solution.run is None:
            raise InputError(
                "these pairs come from a solution in memory, which only forked workers can have; save it "
                '(solution.save("run.zarr")) and give distot.Pairs the path'
            )
        orbits = self.coupling.noise.orbit.size > 1 or self.coupling.problem.orbit.size == 1
        sampler = None if solution.problem.source.kind != "sampler" else solution.problem.source
        state = {name: value for name, value in self.__dict__.items() if name not in ("coupling", "shelf")}
        return state | {"opening": (solution.run.path, sampler, orbits, self.shelf is not None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path, sampler, orbits, latents = state.pop("opening")
        self.__dict__.update(state)
        solution = load(path, source=sampler)
        self.coupling = Coupling(solution, self.plan.seed, orbits)
        self.shelf = Shelf(solution.held.latents) if latents else None


def batch_of(x: Tensor, index: np.ndarray[Any, np.dtype[np.int64]], shelf: Shelf | None) -> Batch:
    """What is handed out of samples (B, d) and their latents (B,)."""
    numbers = torch.from_numpy(np.ascontiguousarray(index))
    noise = x.to(torch.float32)
    return (noise, numbers) if shelf is None else (noise, shelf.take(index), numbers)
