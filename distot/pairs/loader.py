"""Batches of numbered samples for training: shared out over ranks and workers, shuffled, made ahead, resumable.

An epoch is E samples, numbered, in batches of B. Every worker of every rank gets a range of batches; it makes pools of
some thousand samples, one ahead of the other, and shuffles each. Which samples an epoch has depends on nothing else.
"""

from __future__ import annotations

import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from distot.environment import callers
from distot.errors import DistotWarning, InputError
from distot.grid import rank_of_training
from distot.pairs.noise import Chance, check_seed, generator
from distot.pairs.turns import Ledger, Turns

POOL = 8192  # samples of a pool, at least
LARGE = 65536  # where a search must read the latents from disk
NAMES = {"world": "ranks", "workers": "workers"}

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Plan:
    """How an epoch is cut up.

    samples: E, of an epoch. batch: B. seed: of the noise and of all chances. rank, world: which share of the batches is
    handed out here. endless: epoch follows epoch. drop_last: every rank gets equally many batches of B, and the few
    samples that are left over are dropped.

    Raises InputError for values that make no sense.
    """

    samples: int
    batch: int = 256
    seed: int = 0
    rank: int = 0
    world: int = 1
    endless: bool = False
    drop_last: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed, 0)
        for name in ("samples", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, it is {getattr(self, name)}")
        if not 0 <= self.rank < self.world:
            raise InputError(f"rank must lie between 0 and world - 1 = {self.world - 1}, it is {self.rank}")
        if not self.batches and (self.drop_last or self.endless):
            ranks = f" for each of {self.world} ranks" if self.world > 1 else ""
            raise InputError(
                f"an epoch of {self.samples:,} samples has no batch of {self.batch}{ranks}; give "
                f"samples={self.batch * self.world} or more, or a smaller batch"
            )

    @property
    def used(self) -> int:
        """Samples of an epoch that all ranks together hand out."""
        round_of_all = self.batch * self.world
        return self.samples // round_of_all * round_of_all if self.drop_last else self.samples

    @property
    def batches(self) -> int:
        """Of this rank in an epoch."""
        return len(self.own(0, 1))

    def own(self, worker: int, workers: int) -> range:
        """Batches of one of this rank's workers; of equally many workers the first ones have one more, if any has."""
        return _share(_share(range(-(-self.used // self.batch)), self.world, self.rank), workers, worker)


def _share(items: range, parts: int, part: int) -> range:
    each, more = divmod(len(items), parts)
    first = part * each + min(part, more)
    return items[first : first + each + (part < more)]


class Loader(IterableDataset[Batch], ABC):
    """Batches of an epoch's samples; for ``DataLoader(loader, batch_size=None, num_workers=...)``, or as it is.

    Every iteration is an epoch, the one after that of the iteration before, whether that came to its end or not;
    ``set_epoch`` says otherwise. What decides the batches is fixed when the loader is made, and goes with it into other
    processes. epoch: the first one. start: batches of this rank that were had already of it, on as many workers as now.
    rank, world: which share is handed out here; None: as torch.distributed says, or all of them if there is no process
    group by the first batch. drop_last: as in ``Plan``; None: if there are several ranks, which must have equally many
    batches where they wait for each other.
    """

    def __init__(
        self, plan: Plan, epoch: int, start: int, rank: int | None, world: int | None, drop_last: bool | None
    ) -> None:
        check_seed(0, epoch)
        if (rank is None) != (world is None):
            raise InputError("give rank and world together, or neither")
        self._given, self._drop_last, self._asked = rank is not None, drop_last, False
        self._group = None if self._given else rank_of_training()
        _warn_of_launcher(self._given or self._group is not None)
        self.plan, self.pool = plan, POOL
        self._cut(*((rank, world) if rank is not None and world is not None else self._group or (0, 1)))
        if not 0 <= start <= self.plan.batches:
            raise InputError(
                f"start must lie between 0 and the {self.plan.batches:,} batches of this rank, it is {start}"
            )
        self._turns = Turns(epoch, start, plan.endless)
        self._at: dict[str, int] | None = None  # where this process is
        self._begin: dict[str, int] | None = None  # where this worker of a DataLoader is to begin
        self._stated: tuple[int, int] | None = None  # where the state says to begin that this process was given

    @abstractmethod
    def make(self, epoch: int, first: int, last: int) -> Batch:
        """Samples ``first`` to ``last`` of an epoch with all that is handed out with them, each (last - first, ...)."""

    def prepare(self, epoch: int) -> None:
        """What must be known before any batch of an epoch is made."""

    @property
    def epoch(self) -> int:
        """That of the next iteration."""
        return self._turns.coming[0]

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of this epoch, from its start; or from where it was to begin anyway."""
        check_seed(0, epoch)
        self._settle()
        if self._begin is not None and self._begin["epoch"] == epoch:
            return
        self._at = self._begin = None
        coming, start = self._turns.coming
        self._turns.set(epoch, start if coming == epoch else 0)
        self.prepare(epoch)

    def __len__(self) -> int:
        """Batches of this rank in an epoch. Raises TypeError if there is no end."""
        if self.plan.endless:
            raise TypeError("an endless loader has no length")
        self._settle()
        self._asked = True
        return self.plan.batches

    def state_dict(self) -> dict[str, int]:
        """Where this process is, for torchdata's StatefulDataLoader, or for use without workers."""
        if found := self._at or self._begin:
            return found
        epoch, start = self._turns.coming
        return self._state(epoch, start, 0)

    def _state(self, epoch: int, batch: int, part: int) -> dict[str, int]:
        info = get_worker_info()
        found = {"epoch": epoch, "batch": batch, "part": part}
        found |= {} if self.plan.world == 1 else {"world": self.plan.world}
        return found if info is None else found | {"workers": info.num_workers}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on there; with the same number of workers, if it is that of a worker.

        Raises InputError for the state of another number of ranks or workers.
        """
        self._settle()
        info = get_worker_info()
        workers = 1 if info is None else info.num_workers
        here = {"world": self.plan.world, "workers": workers}
        for name, known in (("world", 1), ("workers", 1 if info is None else workers)):
            if state.get(name, known) != here[name]:
                raise InputError(
                    f"this state is of {state.get(name, known)} {NAMES[name]}, and there are {here[name]} now, which "
                    "have the samples in another order; take as many, or begin another epoch"
                )
        if info is None and not 0 <= state["batch"] <= self.plan.batches:
            raise InputError(
                f"this state has {state['batch']:,} batches behind it, and an epoch of this rank has "
                f"{self.plan.batches:,}; take the samples and the batch that it was saved with"
            )
        self._at = self._begin = None
        if info is None:
            self._stated = state["epoch"], state["batch"]
            self._turns.set(*self._stated)
        else:
            self._begin = dict(state)

    def __iter__(self) -> Iterator[Batch]:
        self._settle()
        self._asked = True
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        told, self._begin = self._begin, None
        epoch, start = self._turns.begin(None if told is None else told["epoch"])
        if start and workers > 1 and told is None and (epoch, start) == self._stated:
            raise InputError(
                f"this loader was told the state of one without workers, and {workers} workers have the samples in "
                "another order; use num_workers=0 or 1, or begin another epoch"
            )
        part = (worker + start) % workers  # batches come from the workers in turn, and worker 0 is asked first
        skip = max(0, -(-(start - part) // workers))
        if told is not None:
            epoch, skip, part = told["epoch"], told["batch"], told["part"]
        self._at = self._state(epoch, skip, part)
        self.prepare(epoch)
        return self._epochs(epoch, skip, part, workers)

    def _epochs(self, epoch: int, skip: int, part: int, workers: int) -> Iterator[Batch]:
        own = self.plan.own(part, workers)
        while True:
            for number, batch in enumerate(self._batches(epoch, own, skip), skip + 1):
                self._at = self._state(epoch, number, part)
                yield batch
            if not self.plan.endless or not own:
                return
            epoch, skip = epoch + 1, 0

    def _settle(self) -> None:
        """Takes the place of this process in a process group that began after the loader was made.

        Raises InputError in a process of another place than the loader was made for, or where accelerate deals the
        batches out once more.
        """
        now = None if self._given else rank_of_training()
        if now is not None and now != self._group:
            if self._group is not None:
                raise InputError(
                    "this loader was made by rank {} of {}, and this is rank {} of {}: make it here, or give rank= and "
                    "world=".format(*self._group, *now)
                )
            if self._asked and now[1] > 1:
                warnings.warn(
                    f"a process group has begun after this loader had been used: from now on it hands out share "
                    f"{now[0]} of {now[1]} of the batches, where it handed out all; make loaders after the group",
                    DistotWarning,
                    stacklevel=3,
                )
            self._group = now
            self._cut(*now)
        if self.plan.world > 1 and (dealt := dealt_by_accelerate()) > 1:
            raise InputError(
                f"this loader has batches for rank {self.plan.rank} of {self.plan.world} alone, and accelerate deals "
                f"them out among {dealt} processes once more, so that most are lost: make it with rank=0, world=1, or "
                "keep its DataLoader out of prepare"
            )

    def _cut(self, rank: int, world: int) -> None:
        """Cuts the epoch for so many ranks. Warns of samples that are left out, and of ranks with fewer batches."""
        drop = world > 1 if self._drop_last is None else self._drop_last
        self.plan = plan = replace(self.plan, rank=rank, world=world, drop_last=drop)
        whole, each = -(-plan.samples // plan.batch), plan.batch * world
        if drop and self._drop_last is None and plan.used < plan.samples:
            warnings.warn(
                f"{plan.samples - plan.used:,} of {plan.samples:,} samples are left out of every epoch, so that each "
                f"of {world} ranks has {plan.batches:,} batches of {plan.batch}; for no rest give "
                f"samples={plan.used} or {plan.used + each}",
                DistotWarning,
                stacklevel=4,
            )
        if not drop and not plan.endless and whole % world:
            warnings.warn(
                f"some of {world} ranks have {-(-whole // world):,} batches and others {whole // world:,}: where ranks "
                "wait for each other after every batch they would wait for ever; leave drop_last=False out",
                DistotWarning,
                stacklevel=4,
            )

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return self.__dict__ | {"_at": None}

    def __copy__(self) -> Self:
        """Another loader, that is where this one is; what it searches is the same."""
        twin = type(self).__new__(type(self))
        own = {name: deepcopy(its) for name, its in self.__dict__.items() if isinstance(its, Turns | Ledger)}
        twin.__dict__.update(self.__dict__ | own)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def _batches(self, epoch: int, own: range, skip: int) -> Iterator[Batch]:
        """Own batches of an epoch without the first few, pool by pool; the next pool is made meanwhile."""
        size, end = self.plan.batch, min(self.plan.used, own.stop * self.plan.batch)
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


def _warn_of_launcher(placed: bool) -> None:
    """Says that the ranks of a launcher are not looked at, if there is nothing else to know them by."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not placed and rank and world not in ("", "1"):
        warnings.warn(
            f"RANK={rank} and WORLD_SIZE={world} are set, but torch.distributed has no process group yet: unless one "
            "begins before the first batch, every process has all batches; begin it first, or give rank= and world=",
            DistotWarning,
            stacklevel=4,
        )


def dealt_by_accelerate() -> int:
    """Among how many processes the caller deals batches out, if that is a DataLoader prepared by accelerate; else 1.

    Looks for its code among the callers: a prepared DataLoader calls ``set_epoch`` and ``__iter__`` of what it has, or
    starts the workers that do, and leaves no other trace.
    """
    for frame in callers("accelerate.data_loader") if "accelerate.data_loader" in sys.modules else ():
        its = frame.f_locals.get("self")
        for where in (its, getattr(its, "state", None)):
            if (found := getattr(where, "num_processes", None) or 1) > 1:
                return int(found)
    return 1
