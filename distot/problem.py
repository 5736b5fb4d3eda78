"""Problem = Source + Target in one frame: draws samples as the search wants them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distot.errors import InputError
from distot.grid import Grid
from distot.orbit import Orbit, Orbits
from distot.power import Array, Frame
from distot.source import BLOCK, Key, Source, Stream, as_source
from distot.target import Cache, Rows, Target, build_target, check_rows

SEARCH_FLOPS = {"cpu": 5e10, "cuda": 2e13}  # of a portion of samples, so that a signal need not wait for long
SEARCH_NUMBERS = 1 << 21  # in a portion
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

    def keys(self, stream: Stream, step: int, samples: int, block: int = BLOCK) -> Iterator[tuple[Key, int]]:
        """Blocks that make up ``samples`` samples of one step: (key, size of the block)."""
        for number, first in enumerate(range(0, samples, block)):
            yield Key(self.seed, stream, step, number, first), min(block, samples - first)

    def turned(self, part: int) -> Tensor:
        """Axes of the orbits' blocks (g, w, d) as the frame sees them, float32, on the device of the atoms."""
        axes, place, see = self.orbit.axes(part), self.source.place, self.frame.source_in
        return (see(place(axes)) - see(place(torch.zeros_like(axes)))).to(self.target.atoms.device)

    def batch(self, stream: Stream, step: int, samples: int) -> Iterator[tuple[int, Tensor | Orbits]]:
        """At least ``samples`` samples of one step, whole orbits, float32 in the frame, in portions for a search each.

        Yields (first, portion): the place of its first sample in the step. On a grid every process gets those of its
        sample column, as many portions as any other, some of them perhaps empty.

        Each has the law of the source, but those of an orbit depend on each other. For CHECK and CERTIFY, where pairs
        of orbits are compared, orbits come in parts with axes of their own.
        """
        axis, size = self.grid.sample, self.orbit.size
        draws = self.draws(samples)
        parts = self.orbit.parts(draws) if stream in (Stream.CHECK, Stream.CERTIFY) else 1
        block = max(-(-BLOCK_LEAST // size), min(BLOCK // size, -(-draws // (parts * BLOCKS))))
        blocks = list(self.keys(stream, step, draws, block))
        width = self._portion(block * size)
        for part in range(parts):
            basis = self.basis if part == 0 else self.turned(part)
            its = blocks[len(blocks) * part // parts : len(blocks) * (part + 1) // parts]
            own = its[len(its) * axis.rank // axis.size : len(its) * (axis.rank + 1) // axis.size]
            for first in range(0, -(-len(its) // axis.size), width):
                portion = own[first : first + width]
                z = torch.cat(
                    [torch.empty(0, self.source.dim, dtype=torch.float64)]
                    + [self.source.centred(key, count) for key, count in portion]
                )
                begin = portion[0][0].first * size if portion else 0
                if basis is None:
                    yield begin, self.frame.source_in(self.source.place(z)).to(self.target.atoms.device)
                else:
                    yield begin, self.orbit.of(z, basis)

    def draws(self, samples: int) -> int:
        """Independent draws of the source that make up at least so many samples."""
        return -(-samples // self.orbit.size)

    def _portion(self, block: int) -> int:
        """How many blocks of so many samples go to a search: a second's work, but no more than memory likes."""
        n, d = -(-self.target.n // self.grid.target.size), self.target.dim
        flops = SEARCH_FLOPS[self.target.atoms.device.type]
        return max(1, int(min(flops / (2 * n * d), SEARCH_NUMBERS / d)) // block)


def build_problem(
    latents: Rows,
    source: object = "gaussian",
    mass: Any = None,
    seed: int = 0,
    device: str = "auto",
    grid: Grid | None = None,
    cache: Cache | None = None,
) -> Problem:
    """Checks source, latents and masses (N,) against each other and brings them into one frame.

    On a grid every process reads its share of the latents alone; ``cache`` keeps what it has read.
    Raises InputError as ``as_source`` and ``build_target`` do.
    """
    where, grid = resolve_device(device), grid or Grid()
    check_rows(latents)
    found = as_source(source, latents.shape[1])
    mean, cov = found.moments(seed)
    target, frame = build_target(latents, mass, (mean, cov), grid, {} if cache is None else cache)
    target = replace(target, atoms=target.atoms.to(where))
    problem = Problem(found, target, frame, cov, seed, Orbit(found.dim, found.symmetry, seed), None, grid)
    return problem if problem.orbit.size == 1 else replace(problem, basis=problem.turned(0))


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
