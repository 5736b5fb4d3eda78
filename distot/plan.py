"""What a run would take on machines that are not here: time, memory, traffic and money, from a model of its costs.

Flops and bytes are counted from the algorithm; rates of machines are given. docs/scaling.md derives every line and says
which rates were measured. Legend: N latents, d dimension, T x S processes along the axes target and sample.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from distot import optim, schedule, tree
from distot.certify import default_samples
from distot.errors import InputError
from distot.grid import MOST_WORKERS
from distot.orbit import Orbit
from distot.problem import SEARCH_FLOPS, SEARCH_NUMBERS

LEAST = 1e-6  # goals below are reached by no sampling
EFFICIENCY = 0.9  # of a sample of work 1, math (11); what the stop rule counts on
VECTORS = 14  # float64 vectors of all atoms that a process holds at once while it solves for a step
OWN = 10  # float64 vectors of own atoms
ITERATIONS = 10  # of conjugate gradients


@dataclass(frozen=True)
class Machine:
    """One worker: a GPU, or a share of a CPU."""

    name: str
    gflops: float  # of the search, float32
    halves: bool  # whether it makes use of orbits by halves alone, as the GPU kernels do, not by partial products
    memory: float  # GiB
    link: float  # GB/s that a process sends in collectives
    latency: float  # seconds of a collective
    update: float  # seconds of a step outside search and collectives, for each atom
    dollars: float  # an hour; 0 if unknown
    measured: bool


MACHINES = {
    "cpu": Machine("cpu", 165.0, False, 12.0, 0.3, 1.5e-3, 1.2e-6, 0.0, True),
    "h200": Machine("H200", 40_000.0, True, 141.0, 40.0, 5e-5, 2e-9, 4.0, False),
    "h100": Machine("H100", 35_000.0, True, 80.0, 40.0, 5e-5, 2e-9, 3.0, False),
    "l40s": Machine("L40S", 20_000.0, True, 48.0, 2.0, 1e-4, 6e-9, 1.2, False),
}


@dataclass(frozen=True)
class Plan:
    """Seconds by what they go into, bytes of one process, dollars of all."""

    machine: Machine
    grid: tuple[int, int]
    samples: float  # plain samples of work for each latent
    steps: int
    start: float
    search: float
    update: float
    collectives: float
    certificate: float
    store: float
    sent: float
    latents: float
    vectors: float
    checkpoint: float  # bytes written by all processes each time

    @property
    def seconds(self) -> float:
        return self.start + self.search + self.update + self.collectives + self.certificate + self.store

    @property
    def bytes(self) -> float:
        """Most memory of one process."""
        return self.latents + self.vectors

    @property
    def fits(self) -> bool:
        return self.bytes < 0.9 * 2**30 * self.machine.memory

    @property
    def dollars(self) -> float:
        return self.grid[0] * self.grid[1] * self.seconds / 3600 * self.machine.dollars


def parse_machines(text: str) -> tuple[int, Machine]:
    """ "8x H200" or "4xcpu" -> how many, and which. Raises InputError for others."""
    found = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\w+)\s*", text)
    if found is None or found[2].lower() not in MACHINES or not 1 <= int(found[1]) <= MOST_WORKERS:
        raise InputError(f"{text!r} names no machines; write a number and one of {', '.join(MACHINES)}: 8x h200")
    return int(found[1]), MACHINES[found[2].lower()]


def plan(
    n: int,
    d: int,
    machine: Machine,
    workers: int = 1,
    replicas: int = 1,
    goal: float = 0.1,
    checkpoint_seconds: float = 60.0,
    disk: float = 1.0,
) -> Plan:
    """A solve of N = n latents in d dimensions from a Gaussian to chi2 <= goal. disk: GB/s that a worker writes.

    Raises InputError if the replicas do not divide the workers, or for a problem that makes no sense.
    """
    if not (2 <= n < schedule.MOST and 1 <= d < schedule.MOST and LEAST <= goal < math.inf):
        raise InputError(f"no such problem: N = {n}, d = {d}, chi2 <= {goal:g} (at least {LEAST:g})")
    if workers % replicas:
        raise InputError(f"{workers} workers cannot hold {replicas} replicas; give workers as a multiple of replicas")
    shards, columns = workers // replicas, replicas
    orbit = Orbit(d, "rotations", 0)
    work = orbit.work
    cost = (d + 3) / (2 * d + 5) if machine.halves else work  # of a point, in plain samples, on this machine
    flops = n * (2 * d + 5)  # of a plain sample
    rate = 1e9 * machine.gflops * workers

    wanted = work / (EFFICIENCY * goal)  # plain samples of work an atom, counted by orbits
    drawn, time, steps = 0.0, 0.0, 0
    first = schedule.first_batch(n, work)
    while drawn * work < wanted * n:
        batch = schedule.batch(n, work, time)
        drawn, time, steps = drawn + batch, time + batch / first, steps + 1
    looks = 0.15 * drawn
    certificate = default_samples(n) * cost * flops / rate

    levels = tree.widths(n)
    grown = tree.work(n) * flops / rate
    solved = sum(30 * k * work**-0.5 * cost * k * (2 * d + 5) for k in levels)
    alone = sum(30 * k * work**-0.5 * cost * k * (2 * d + 5) for k in levels if k <= tree.WHOLE)
    start = grown + (solved - alone) / rate + alone / (1e9 * machine.gflops)

    target, sample, world = (
        (size - 1) / size for size in (shards, columns, workers)
    )  # of a ring's bytes, sent by each
    pairs = 0 if n <= optim.SMALL else ITERATIONS + 1
    winners = 2 * 8 * 2 * target * drawn / columns
    vectors = steps * 8 * n * (7 * target + 2 * pairs * world + 2 * 3 / shards * sample)
    sent = winners + vectors
    own = n / shards
    portion = min(SEARCH_FLOPS["cuda" if machine.halves else "cpu"] / (2 * own * d), SEARCH_NUMBERS / d)
    calls = steps * (7 + pairs) + 3 * drawn / columns / portion
    held = optim.PAIRS_MOST * n * 8 / workers * 3
    saved = (4 * 8 + 8 * min(optim.PAIRS_MOST, 0.1 * time)) * n
    search = (drawn + looks) * cost * flops / rate
    update = steps * machine.update * n * (1 if n <= optim.SMALL else 0.5 + 0.5 / workers)
    talk = sent / (1e9 * machine.link) + (workers > 1) * calls * machine.latency
    saves = (search + update + talk) / checkpoint_seconds + 1
    return Plan(
        machine,
        (shards, columns),
        wanted,
        steps,
        start,
        search,
        update,
        talk,
        certificate,
        saves * saved / (1e9 * disk * workers),
        sent,
        own * d * 4 * (1 if machine.halves else 2),
        own * 8 * OWN + n * 8 * VECTORS + held,
        saved,
    )


def table(plans: list[Plan]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| workers | grid | time | start | search | update | collectives | certificate | memory a worker "
        "| sent a worker | checkpoint | cost |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for its in plans:
        workers = its.grid[0] * its.grid[1]
        share = [f"{part / its.seconds:.0%}" for part in (its.start, its.search, its.update, its.collectives)]
        lines.append(
            f"| {workers}x {its.machine.name} | {its.grid[0]} x {its.grid[1]} | {duration(its.seconds)} | "
            f"{' | '.join(share)} | {its.certificate / its.seconds:.0%} | "
            f"{its.bytes / 2**30:,.1f} GiB{'' if its.fits else ' (too much)'} | {its.sent / 1e9:,.1f} GB | "
            f"{its.checkpoint / 1e9:,.2f} GB | {f'${its.dollars:,.0f}' if its.dollars else ''} |"
        )
    return lines


def duration(seconds: float) -> str:
    """In words."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
