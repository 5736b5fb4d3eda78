"""Processes that work on one problem: the only user of torch.distributed.

They form a grid of two axes. Along ``target`` each owns a share of the atoms with all that belongs to them; along
``sample`` each draws and searches a share of the samples. One process is the grid of 1 x 1, where nothing is sent.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distot.errors import InputError

MOST_WORKERS = 100_000

# the newer name, where torch has it
gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Meter:
    """What this process has spent its time on, and what its collectives have cost."""

    bytes: int = 0  # sent, in rings
    seconds: float = 0.0  # in collectives, waiting for slower processes included
    calls: int = 0
    phases: dict[str, float] = field(default_factory=dict)  # seconds of work by phase, without collectives

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds to a phase what the block takes, collectives aside."""
        began, waited = time.perf_counter(), self.seconds
        yield
        taken = time.perf_counter() - began - (self.seconds - waited)
        self.phases[phase] = self.phases.get(phase, 0.0) + taken


@dataclass(frozen=True)
class Axis:
    """Collectives among ``size`` processes; all of them call the same ones in the same order, and all get the result.

    Raises RuntimeError if a process of the group is gone or does not answer in time.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    meter: Meter = field(default_factory=Meter)

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x if self.size == 1 else self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x if self.size == 1 else self._reduce(x, dist.ReduceOp.MAX)

    def total(self, value: float) -> float:
        """The sum of a number, in float64."""
        return value if self.size == 1 else float(self.sum(torch.tensor(value, dtype=torch.float64)))

    def any(self, value: bool) -> bool:
        """Whether it is true anywhere."""
        return value if self.size == 1 else bool(self.max(torch.tensor(int(value))))

    def gather(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Rows of all processes, in their order; ``rows``: how many each has, asked for if not given."""
        if self.size == 1:
            return x
        rows = rows or [int(n) for n in self._gather(torch.tensor([len(x)]))]
        most = max(rows)
        mine = x if len(x) == most else torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        found = self._gather(mine)
        if min(rows) == most:
            return found
        return torch.cat([part[:n] for part, n in zip(found.split(most), rows, strict=True)])

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """``parts[r]`` goes to process r; what the others have sent here comes back, in their order."""
        if self.size == 1:
            return list(parts)
        counts = torch.tensor([len(part) for part in parts])
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        rows, shape = [int(n) for n in arriving], parts[0].shape[1:]
        out, mine = parts[0].new_empty(sum(rows), *shape), torch.cat(list(parts))
        began = time.perf_counter()
        dist.all_to_all_single(out, mine, rows, [len(part) for part in parts], group=self.group)
        self._count(mine, 1, began)
        return list(out.split(rows))

    def objects(self, value: Any) -> list[Any]:
        """A small value of every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def first(self, x: Tensor) -> Tensor:
        """The tensor of process 0, of the same shape everywhere."""
        if self.size == 1:
            return x
        x, began = x.contiguous().clone(), time.perf_counter()
        dist.broadcast(x, group=self.group, group_src=0)
        self._count(x, 1, began)
        return x

    def _reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        x, began = x.contiguous().clone(), time.perf_counter()
        dist.all_reduce(x, operation, group=self.group)
        self._count(x, 2, began)
        return x

    def _gather(self, x: Tensor) -> Tensor:
        out, began = x.new_empty(self.size * len(x), *x.shape[1:]), time.perf_counter()
        gather_single(out, x.contiguous(), group=self.group)
        self._count(out, 1, began)
        return out

    def _count(self, x: Tensor, passes: int, began: float) -> None:
        self.meter.bytes += passes * x.nbytes * (self.size - 1) // self.size
        self.meter.seconds += time.perf_counter() - began
        self.meter.calls += 1


@dataclass(frozen=True)
class Split:
    """n things, numbered from 0, of which process r of an axis owns the next ``counts[r]``."""

    counts: tuple[int, ...]
    axis: Axis = field(default_factory=Axis)

    @property
    def n(self) -> int:
        return sum(self.counts)

    @property
    def count(self) -> int:
        """How many are own ones."""
        return self.counts[self.axis.rank]

    @property
    def first(self) -> int:
        """The first own one."""
        return sum(self.counts[: self.axis.rank])

    def gather(self, own: Tensor) -> Tensor:
        """Values (n, ...) of all from those (count, ...) of own ones."""
        return self.axis.gather(own, self.counts)

    def own(self, values: Tensor) -> Tensor:
        """Own values (count, ...) of those of all (n, ...)."""
        return values[self.first : self.first + self.count]

    def place(self, index: Tensor) -> Tensor:
        """Which own ones these are, any shape; all others get the place after the last."""
        if self.axis.size == 1:
            return index
        place = index - self.first
        return torch.where((place >= 0) & (place < self.count), place, self.count)

    def pick(self, own: Tensor, index: Tensor) -> Tensor:
        """Values (*index.shape, ...) of any of all, everywhere, from those (count, ...) of own ones."""
        if self.axis.size == 1:
            return own[index]
        return self.axis.sum(torch.cat([own, own.new_zeros(1, *own.shape[1:])])[self.place(index)])

    def add(self, index: Tensor, values: Tensor) -> Tensor:
        """Values (m, ...) added up by the one (m,) they belong to, for own ones (count, ...), in float64."""
        total = torch.zeros((self.count + 1, *values.shape[1:]), dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.place(index), values.double())[: self.count]


@dataclass(frozen=True)
class Grid:
    """The place of this process; ``meter`` counts for all its axes."""

    target: Axis = field(default_factory=Axis)
    sample: Axis = field(default_factory=Axis)
    world: Axis = field(default_factory=Axis)

    @property
    def shape(self) -> tuple[int, int]:
        return self.target.size, self.sample.size

    @property
    def meter(self) -> Meter:
        return self.world.meter

    def report(self) -> dict[str, Any]:
        """Seconds and bytes of every process, and which one the others wait for."""
        found = self.world.objects((self.meter.phases, self.meter.seconds, self.meter.bytes))
        work = [sum(phases.values()) for phases, *_ in found]
        names = sorted({name for phases, *_ in found for name in phases})
        return {
            "slowest": work.index(max(work)),
            **{name: [round(phases.get(name, 0.0), 3) for phases, *_ in found] for name in names},
            "waited": [round(seconds, 3) for _, seconds, _ in found],
            "sent": [sent for *_, sent in found],
        }

    @property
    def leads(self) -> bool:
        """Whether this is the one process that speaks, and writes what all agree on."""
        return self.world.rank == 0


def check(workers: int, replicas: int) -> tuple[int, int]:
    """Shape (target, sample) of a grid. Raises InputError if ``replicas`` does not divide ``workers``, or these are too
    many."""
    if workers > MOST_WORKERS:
        raise InputError(f"{workers:,} workers are more than distot is made for; give {MOST_WORKERS:,} at most")
    if workers < 1 or replicas < 1 or workers % replicas:
        raise InputError(
            f"{workers} workers cannot hold {replicas} replicas of the latents; give workers as a multiple of replicas"
        )
    return workers // replicas, replicas


def join(address: str, rank: int, shape: tuple[int, int], device: str, seconds: float) -> Grid:
    """Meets the other processes at ``address`` (host:port) and takes place ``rank`` in a grid, row by row.

    Processes that own the same atoms follow each other. ``seconds``: after which a silent process counts as lost.
    """
    world = shape[0] * shape[1]
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    wait = timedelta(seconds=seconds)
    dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=world, timeout=wait)
    places, meter = torch.arange(world).reshape(shape), Meter()
    target, sample = (
        Axis(len(lines[0]), place, dist.new_subgroups_by_enumeration(lines, wait)[0], meter)
        for lines, place in ((places.T.tolist(), rank // shape[1]), (places.tolist(), rank % shape[1]))
    )
    return Grid(target, sample, Axis(world, rank, dist.group.WORLD, meter))


def rank_of_training() -> tuple[int, int] | None:
    """Rank of this process in the user's own process group, and the size of that; None if there is no group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else None


def leave() -> None:
    """Gives up the group of this process, if it has one."""
    if dist.is_initialized():
        dist.destroy_process_group()
