"""Pairs of noise and data with labels: an epoch has each class in exactly its share, and couples it by itself.

Legend: B samples of a batch, E of an epoch, N latents, C classes, d dimension.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distot.classes import Classes, load_classes
from distot.errors import InputError
from distot.pairs.balance import balance, balanced_index, quotas
from distot.pairs.coupling import Coupling, Shelf
from distot.pairs.dataset import batch_of, handed_on
from distot.pairs.loader import LARGE, POOL, Batch, Loader, Plan
from distot.pairs.noise import Chance, generator
from distot.pairs.turns import Ledger
from distot.source import Stream
from distot.store import Place

EACH = 256  # samples of a class in a pool, on average, at least, as long as memory allows


class ClassPairs(Loader):
    """Batches (noise (B, d), latent (B, d), index (B,), label (B,)): pairs within classes, shuffled together.

    index counts among all N latents that were given to ``solve_classes``; label is the label itself if labels are
    whole numbers, else its place in ``classes.labels``. Everything else is as in ``Pairs``; with ``balance`` every
    latent of a class gets exactly its share of the class.

    classes: what ``solve_classes`` gave, or the path of its folder.
    """

    def __init__(
        self,
        classes: Classes | str | Place,
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
        self.classes = classes if isinstance(classes, Classes) else load_classes(classes, source=source)
        count = sum(map(len, self.classes.rows.values())) if samples is None else samples
        self._orbits, self._latents = orbits, latents
        super().__init__(Plan(count, batch, seed, endless=endless), epoch, start, rank, world, drop_last)
        if balance and endless:
            raise InputError("balance looks at whole epochs: leave out endless, and call set_epoch for each")
        self.rows = list(self.classes.rows.values())
        labels = self.classes.labels
        self.labels = torch.tensor(labels if all(isinstance(x, int) for x in labels) else range(len(labels)))
        self.pool = min(LARGE, max(POOL, EACH * len(labels)))
        _ = self.couplings, self.shelves  # read once, before workers are forked
        self._index = Ledger(count) if balance else None
        self._known: tuple[tuple[int, int], NDArray[np.int32]] | None = None
        self.prepare(epoch)

    @cached_property
    def couplings(self) -> list[Coupling]:
        return [Coupling(its, _seed(self.plan.seed, c), self._orbits) for c, its in enumerate(self.classes.values())]

    @cached_property
    def shelves(self) -> list[Shelf] | None:
        return [Shelf(its.held.latents) for its in self.classes.values()] if self._latents else None

    def prepare(self, epoch: int) -> None:
        """Balances an epoch, class by class."""

        def find() -> NDArray[np.int64]:
            counts = self._counts(epoch).tolist()
            found = [
                balanced_index(its, balance(its, epoch, count), epoch)
                for its, count in zip(self.couplings, counts, strict=True)
                if count
            ]
            return np.concatenate(found)

        if self._index is not None:
            self._index.fill(epoch, self.plan.used, find)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked, as of ``Pairs``."""
        saving = 'keep it (solve_classes(..., run="classes"))'
        solutions = {label: handed_on(its, saving) for label, its in self.classes.items()}
        own = {"classes": Classes(solutions, self.classes.rows, self.classes.share), "_known": None}
        state = super().__getstate__() | own
        return {name: value for name, value in state.items() if name not in ("couplings", "shelves")}

    def _counts(self, epoch: int) -> NDArray[np.int64]:
        """Samples of each class in an epoch (C,)."""
        return quotas(self.classes.share, self.plan.used, self.plan.seed, epoch)

    def _classes(self, epoch: int) -> NDArray[np.int32]:
        """The class of every sample of an epoch (E,)."""
        if self._known is None or self._known[0] != (epoch, self.plan.used):
            order = np.repeat(np.arange(len(self.rows), dtype=np.int32), self._counts(epoch))
            generator(self.plan.seed, Chance.LABEL, epoch, 0).shuffle(order)
            self._known = (epoch, self.plan.used), order
        return self._known[1]

    def make(self, epoch: int, first: int, last: int) -> Batch:
        every = self._classes(epoch)
        before, own = np.bincount(every[:first], minlength=len(self.rows)), every[first:last]
        starts = np.concatenate([[0], np.cumsum(self._counts(epoch))])
        whole: list[torch.Tensor] = []
        for c in np.unique(own):
            places = torch.from_numpy(np.flatnonzero(own == c))
            its = self._of(int(c), epoch, int(before[c]), int(before[c]) + len(places), int(starts[c]))
            whole = whole or [torch.empty(len(own), *part.shape[1:], dtype=part.dtype) for part in its]
            for out, part in zip(whole, its, strict=True):
                out[places] = part
        return (*whole, self.labels[torch.from_numpy(own.astype(np.int64))])

    def _of(self, c: int, epoch: int, first: int, last: int, start: int) -> Batch:
        """Samples ``first`` to ``last`` of a class, whose latents begin at ``start`` of the index, if there is one."""
        coupling = self.couplings[c]
        if self._index is not None:
            x = coupling.noise.samples(epoch, first, last)
            index = self._index.read(epoch, slice(start + first, start + last))
        else:
            x, index = coupling.pairs(epoch, first, last)
        *others, numbers = batch_of(x, index, None if self.shelves is None else self.shelves[c])
        return (*others, torch.from_numpy(self.rows[c][numbers.numpy()]))


def _seed(seed: int, number: int) -> int:
    """The seed of a class."""
    sequence = np.random.SeedSequence(seed, spawn_key=(Stream.PAIRS, number))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
