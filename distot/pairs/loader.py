"""Batches of numbered samples for training: shared out over ranks and workers, shuffled, made ahead, resumable.

An epoch is E samples, numbered, in batches of B. Every worker of every rank gets a range of batches; it makes pools of
some thousand samples, one ahead of the other, and shuffles each. Which samples an epoch has depends on nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from distot.errors import InputError
from distot.grid import rank_of_training
from distot.pairs.noise import Chance, check_seed, generator

POOL = 8192  # samples of a pool, at least
LARGE = 65536  # where a search must read the latents from disk

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Plan:
    """How an epoch is cut up.

    samples: E, of an epoch. batch: B. seed: of the noise and of all chances. rank, world: which share of the batches is
    handed out here; None: as torch.distributed says, or all of them. endless: epoch follows epoch. drop_last: every
    rank gets equally many batches of B, and the few samples that are left over are dropped.

    Raises InputError for values that make no sense.
    """

    samples: int
    batch: int = 256
    seed: int = 0
    rank: int | None = None
    world: int | None = None
    endless: bool = False
    drop_last: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed, 0)
        for name in ("samples", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, it is {getattr(self, name)}")
        if (self.rank is None) != (self.world is None):
            raise InputError("give rank and world together, or neither")
        rank, world = self.place
        if not 0 <= rank < world:
            raise InputError(f"rank must lie between 0 and world - 1 = {world - 1}, it is {rank}")
        if self.endless and not self.batches:
            raise InputError(
                f"an epoch of {self.samples:,} samples has no batch of {self.batch} for each of {world} ranks"
            )

    @property
    def place(self) -> tuple[int, int]:
        """Rank and world size."""
        if self.rank is None or self.world is None:
            return rank_of_training()
        return self.rank, self.world

    @property
    def batches(self) -> int:
        """Of this rank in an epoch."""
        return len(self.own(0, 1))

    def own(self, worker: int, workers: int) -> range:
        """Batches of one of this rank's workers; of equally many workers the first ones have one more, if any has."""
        rank, world = self.place
        every = range(self.samples // self.batch // world * world if self.drop_last else -(-self.samples // self.batch))
        return _share(_share(every, world, rank), workers, worker)


def _share(items: range, parts: int, part: int) -> range:
    each, more = divmod(len(items), parts)
    first = part * each + min(part, more)
    return items[first : first + each + (part < more)]


class Loader(IterableDataset[Batch], ABC):
    """Batches of an epoch's samples; for ``DataLoader(loader, batch_size=None, num_workers=...)``, or as it is.

    epoch: which one is next; ``set_epoch`` chooses another. start: batches of this rank that were had already of it, on
    any number of workers.
    """

    def __init__(self, plan: Plan, epoch: int = 0, start: int = 0) -> None:
        check_seed(0, epoch)
        if not 0 <= start <= plan.batches:
            raise InputError(f"start must lie between 0 and the {plan.batches:,} batches of this rank, it is {start}")
        self.plan, self.pool = plan, POOL
        self._epoch = torch.tensor([epoch, start]).share_memory_()  # so that workers which stay alive hear of it
        self._at: dict[str, int] | None = None  # where this process is
        self._begin: dict[str, int] | None = None  # where it is to begin

    @abstractmethod
    def make(self, epoch: int, first: int, last: int) -> Batch:
        """Samples ``first`` to ``last`` of an epoch with all that is handed out with them, each (last - first, ...)."""

    @property
    def epoch(self) -> int:
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of another epoch, from its start; call it before each but the first."""
        check_seed(0, epoch)
        self._epoch.copy_(torch.tensor([epoch, 0]))
        self._at = self._begin = None

    def __len__(self) -> int:
        """Batches of this rank in an epoch. Raises TypeError if there is no end."""
        if self.plan.endless:
            raise TypeError("an endless loader has no length")
        return self.plan.batches

    def state_dict(self) -> dict[str, int]:
        """Where this process is, for torchdata's StatefulDataLoader, or for use without workers."""
        return self._at or self._begin or {"epoch": self.epoch, "batch": int(self._epoch[1]), "part": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on there, with the same number of workers."""
        self._begin = dict(state)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch, start = self._epoch.tolist()
        part = (worker + start) % workers  # batches come from the workers in turn, and worker 0 is asked first
        skip = max(0, -(-(start - part) // workers))
        if self._begin is not None:
            epoch, skip, part = self._begin["epoch"], self._begin["batch"], self._begin["part"]
        self._begin = None
        own = self.plan.own(part, workers)
        while True:
            for number, batch in enumerate(self._batches(epoch, own, skip), skip + 1):
                self._at = {"epoch": epoch, "batch": number, "part": part}
                yield batch
            if not self.plan.endless or not own:
                return
            epoch, skip = epoch + 1, 0

    def _batches(self, epoch: int, own: range, skip: int) -> Iterator[Batch]:
        """Own batches of an epoch without the first few, pool by pool; the next pool is made meanwhile."""
        size, end = self.plan.batch, min(self.plan.samples, own.stop * self.plan.batch)
        width = size * -(-self.pool // size)
        first = own.start * size + skip * size // width * width
        drop = own.start * size + skip * size - first
        with ThreadPoolExecutor(1, "pairs") as ahead:
            coming = ahead.submit(self._pool, epoch, first, min(first + width, end)) if first < end else None
            while coming is not None:
                pool, first = coming.result(), first + width
                coming = ahead.submit(self._pool, epoch, first, min(first + width, end)) if first < end else None
                for begin in range(drop, len(pool[0]), size):
                    yield tuple(its[begin : begin + size] for its in pool)
                drop = 0

    def _pool(self, epoch: int, first: int, last: int) -> Batch:
        order = generator(self.plan.seed, Chance.ORDER, epoch, first).permutation(last - first)
        return tuple(its[torch.from_numpy(order)] for its in self.make(epoch, first, last))
