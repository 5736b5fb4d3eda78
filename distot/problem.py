"""Problem = Source + Target in one frame: draws samples as the search wants them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.errors import InputError
from distot.orbit import Orbit, Orbits
from distot.power import Array, Frame
from distot.source import BLOCK, Key, Source, Stream, as_source
from distot.target import Rows, Target, build_target, check_rows

SEARCH_FLOPS = 5e10  # of a portion of samples, so that a signal need not wait for long
SEARCH_NUMBERS = 1 << 21  # in a portion


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

    def keys(self, stream: Stream, step: int, samples: int, block: int = BLOCK) -> Iterator[tuple[Key, int]]:
        """Blocks that make up ``samples`` samples of one step: (key, size of the block)."""
        for number, first in enumerate(range(0, samples, block)):
            yield Key(self.seed, stream, step, number, first), min(block, samples - first)

    def turned(self, part: int) -> Tensor:
        """Axes of the orbits' blocks (g, w, d) as the frame sees them, float32, on the device of the atoms."""
        axes, place, see = self.orbit.axes(part), self.source.place, self.frame.source_in
        return (see(place(axes)) - see(place(torch.zeros_like(axes)))).to(self.target.atoms.device)

    def batch(self, stream: Stream, step: int, samples: int) -> Iterator[Tensor | Orbits]:
        """At least ``samples`` samples of one step, whole orbits, float32 in the frame, in portions for a search each.

        Each has the law of the source, but those of an orbit depend on each other. For CHECK and CERTIFY, where pairs
        of orbits are compared, orbits come in parts with axes of their own.
        """
        size = self.orbit.size
        draws = -(-samples // size)
        parts = self.orbit.parts(draws) if stream in (Stream.CHECK, Stream.CERTIFY) else 1
        block = min(BLOCK // size, -(-draws // parts))
        blocks = list(self.keys(stream, step, draws, block))
        width = self._portion(block * size)
        of_part = [number * parts // len(blocks) for number in range(len(blocks))]
        for part in range(parts):
            basis = self.basis if part == 0 else self.turned(part)
            own = [entry for entry, its in zip(blocks, of_part, strict=True) if its == part]
            for first in range(0, len(own), width):
                z = torch.cat([self.source.centred(key, count) for key, count in own[first : first + width]])
                if basis is None:
                    yield self.frame.source_in(self.source.place(z)).to(self.target.atoms.device)
                else:
                    yield self.orbit.of(z, basis)

    def _portion(self, block: int) -> int:
        """How many blocks of so many samples go to a search: a second's work, but no more than memory likes."""
        n, d = self.target.n, self.target.dim
        return max(1, int(min(SEARCH_FLOPS / (2 * n * d), SEARCH_NUMBERS / d)) // block)


def build_problem(
    latents: Rows, source: object = "gaussian", mass: NDArray[Any] | None = None, seed: int = 0, device: str = "auto"
) -> Problem:
    """Checks source, latents and masses against each other and brings them into one frame.

    Raises InputError as ``as_source`` and ``build_target`` do.
    """
    where = resolve_device(device)
    check_rows(latents)
    found = as_source(source, latents.shape[1])
    mean, cov = found.moments(seed)
    target, frame = build_target(latents, mass, (mean, cov))
    target = Target(**(vars(target) | {"atoms": target.atoms.to(where)}))
    problem = Problem(found, target, frame, cov, seed, Orbit(found.dim, found.symmetry, seed), None)
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
