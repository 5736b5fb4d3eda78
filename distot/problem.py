"""Problem = Source + Target in one frame: draws samples as the search wants them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distot.atoms import SHARE, Rows, available
from distot.errors import InputError
from distot.grid import Grid
from distot.orbit import Orbit, Orbits
from distot.power import Array, Cost, Frame, cost_of
from distot.source import BLOCK, Key, Product, Sampler, Samples, Source, Sphere, Stream, as_source
from distot.target import Cache, Target, build_target, check_rows

SEARCH_FLOPS = {"cpu": 5e10, "cuda": 2e13}  # of a portion of samples, so that a signal need not wait for long
SEARCH_NUMBERS = 1 << 21  # in a portion
READING = 2048  # plain samples that are worth a pass over atoms which must be read and framed: 4,096 flops a number
TURNING = 20  # and for each dimension so many, where the atoms are turned anew for the orbits' blocks
TOGETHER = 1 << 26  # numbers of all samples in one such pass, an orbit counted as its draw; and of their winners
BLOCKS, BLOCK_LEAST = 16, 64  # a step has so many blocks, for columns of a grid to share, if they have so many samples


@dataclass(frozen=True)
class Problem:
    """Everything that stays fixed during a solve."""

    source: Source
    target: Target
    frame: Frame
    source_cov: Array  # (d, d), user units
    seed: int
    orbit: Orbit
    basis: Tensor | None  # of the steps' orbits, see ``turned``; None without orbits
    grid: Grid
    cost: Cost

    def keys(self, stream: Stream, step: int, samples: int, block: int = BLOCK) -> Iterator[tuple[Key, int]]:
        """Blocks that make up ``samples`` samples of one step: (key, size of the block)."""
        for number in range(-(-samples // block)):
            yield self._block(stream, step, samples, block, number)

    def _block(self, stream: Stream, step: int, samples: int, block: int, number: int) -> tuple[Key, int]:
        first = number * block
        return Key(self.seed, stream, step, number, first), min(block, samples - first)

    def turned(self, part: int) -> Tensor:
        """Axes of the orbits' blocks (g, w, d) as the frame sees them, float32, on the device of the atoms."""
        axes, place, see = self.orbit.axes(part), self.source.place, self.frame.source_in
        return (see(place(axes)) - see(place(torch.zeros_like(axes)))).to(self.target.atoms.device)

    def batch(self, stream: Stream, step: int, samples: int) -> Iterator[tuple[int, Tensor | Orbits]]:
        """At least ``samples`` samples of one step, whole orbits, float32 in the frame, in portions.

        Yields (first, portion): the place of its first sample in the step. On a grid every process gets those of its
        sample column, as many portions as any other, some of them perhaps empty.

        Each has the law of the source, but those of an orbit depend on each other. For CHECK and CERTIFY, where pairs
        of orbits are compared, orbits come in parts with axes of their own.
        """
        return (portion for group in self.groups(stream, step, samples) for portion in group)

    def groups(
        self, stream: Stream, step: int, samples: int, k: int | None = None
    ) -> Iterator[list[tuple[int, Tensor | Orbits]]]:
        """The portions of ``batch`` in lists of those that are best searched together, for k winners; None: each alone.

        Sums are made portion by portion, so that they do not depend on how many are searched at once.
        """
        axis, size = self.grid.sample, self.orbit.size
        draws = self.draws(samples)
        parts = self.orbit.parts(draws) if stream in (Stream.CHECK, Stream.CERTIFY) else 1
        block = max(-(-BLOCK_LEAST // size), min(BLOCK // size, -(-draws // (parts * BLOCKS))))
        blocks, key = range(-(-draws // block)), partial(self._block, stream, step, draws, block)
        width = self._portion(block * size)
        together = 1 if k is None else self._together(width * block * size, k)
        for part in range(parts):
            basis = self.basis if part == 0 else self.turned(part)
            its = blocks[len(blocks) * part // parts : len(blocks) * (part + 1) // parts]
            own = its[len(its) * axis.rank // axis.size : len(its) * (axis.rank + 1) // axis.size]
            firsts = range(0, -(-len(its) // axis.size), width)
            for number in range(0, len(firsts), together):
                yield [
                    self._drawn([key(each) for each in own[first : first + width]], basis)
                    for first in firsts[number : number + together]
                ]

    def _drawn(self, portion: list[tuple[Key, int]], basis: Tensor | None) -> tuple[int, Tensor | Orbits]:
        """The samples of these blocks, after the number of the first."""
        z = torch.cat(
            [torch.empty(0, self.source.dim, dtype=torch.float64)]
            + [self.source.centred(key, count) for key, count in portion]
        )
        first = portion[0][0].first * self.orbit.size if portion else 0
        if basis is None:
            return first, self.frame.source_in(self.source.place(z)).to(self.target.atoms.device)
        return first, self.orbit.of(z, basis)

    def draws(self, samples: int) -> int:
        """Independent draws of the source that make up at least so many samples."""
        return -(-samples // self.orbit.size)

    def _portion(self, block: int) -> int:
        """How many blocks of so many samples go to a search: a second's work, but no more than memory likes."""
        n, d = -(-self.target.n // self.grid.target.size), self.target.dim
        flops = SEARCH_FLOPS[self.target.atoms.device.type]
        return max(1, int(min(flops / (2 * n * d), SEARCH_NUMBERS / d)) // block)

    def _together(self, portion: int, k: int) -> int:
        """How many portions of so many samples go to one search: more than one where a pass over the atoms is dear."""
        if self.target.atoms.whole is not None:
            return 1
        d, size = self.target.dim, self.orbit.size
        worth = (READING + (size > 1) * TURNING * d) / self.orbit.work
        return max(1, int(min(worth, TOGETHER * size / d, TOGETHER / (4 * k)) / portion))


def build_problem(
    latents: Rows,
    source: object = "gaussian",
    mass: Any = None,
    seed: int = 0,
    device: str = "auto",
    grid: Grid | None = None,
    cache: Cache | None = None,
    memory: float | None = None,
    cost: str = "quadratic",
    merge: bool = True,
) -> Problem:
    """Checks source, latents and masses (N,) against each other and brings them into one frame.

    On a grid every process reads its share of the latents alone; ``cache`` keeps what it has read. memory: GiB that
    latents may take in each process; None is a share of what is available. merge: as in ``build_target``.
    cost: a name in ``power.COSTS``. Raises InputError as ``as_source`` and ``build_target`` do, and for the cost "log"
    with a source that is not the unit sphere.
    """
    where, grid = resolve_device(device), grid or Grid()
    check_rows(latents)
    found, price = as_source(source, latents.shape[1]), cost_of(cost)
    if price.spherical:
        check_sphere(found)
    mean, cov = found.moments(seed)
    if not np.sqrt(np.trace(cov)) > 4 * np.finfo(np.float64).eps * np.abs(mean).max():
        raise InputError(
            f"the source is a single point, {mean[:4].round(6).tolist()}{' ...' if len(mean) > 4 else ''}, and cannot "
            "be shared out among latents; give one that is spread out"
        )
    room = _room(where, grid, memory)
    target, frame = build_target(latents, mass, (mean, cov), grid, {} if cache is None else cache, room, price, merge)
    near = None if target.twins is None else target.twins.to(where)
    target = replace(target, atoms=target.atoms.to(where), twins=near)
    problem = Problem(found, target, frame, cov, seed, Orbit(found.dim, found.symmetry, seed), None, grid, price)
    return problem if problem.orbit.size == 1 else replace(problem, basis=problem.turned(0))


def least_chi2(problem: Problem) -> tuple[int, float]:
    """Points of a source that is a few of them (0: it is not), and a chi2 below which no heights come.

    Of n points each goes to one atom, so n atoms win something at most, and masses are multiples of 1/n.
    """
    source, target = problem.source, problem.target
    if isinstance(source, Samples):
        points = len(np.unique(source.rows, axis=0)) if len(source.rows) <= 2 * target.n else len(source.rows)
        single = points == len(source.rows)
    elif isinstance(source, Sampler | Product):
        seen = source.draw(Key(problem.seed, Stream.MOMENTS, 0, 0), BLOCK).numpy()
        points, single = len(np.unique(seen, axis=0)), False
        points = points if points <= BLOCK // 4 else 0  # more of them may not have been seen
    elif isinstance(source, Sphere) and source.dim == 1:
        points, single = 2, True
    else:
        points, single = 0, False
    if not points:
        return 0, 0.0
    axis = target.split.axis
    mass = axis.gather(torch.from_numpy(target.mass)).numpy()
    floor = 1 / np.sort(mass)[-points:].sum() - 1
    if single:
        away = points * mass - np.round(points * mass)
        floor = max(floor, float((away**2 / mass).sum()) / points**2)
    return points, float(floor)


def check_sphere(source: Source) -> None:
    """Raises InputError for a source that is not uniform on the unit sphere about 0."""
    if not isinstance(source, Sphere):
        raise InputError(
            f"the cost 'log' is for the unit sphere, not for the source {source.kind!r}; take source 'sphere'"
        )
    if source.radius != 1.0 or source.centre.any():
        raise InputError(
            f"the cost 'log' is for the unit sphere about 0, not for a sphere of radius {source.radius:g} about "
            f"{source.centre.tolist()}; take source 'sphere'"
        )


def _room(device: torch.device, grid: Grid, memory: float | None) -> tuple[float, float]:
    """Bytes that latents of a process may take: on the device of the search, and in the memory of the machine."""
    if memory is not None:
        return memory * 2**30, memory * 2**30
    hosts = grid.world.objects(socket.gethostname())
    share = SHARE / hosts.count(socket.gethostname())
    return share * available(device), share * available(torch.device("cpu"))


def resolve_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is a GPU, else the CPU. Raises InputError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}; choose auto, cpu or cuda") from None
    if where.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not supported (no float64 there, or not tested); choose cpu or cuda")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but torch {torch.__version__} finds no CUDA GPU; use cpu")
    return where
