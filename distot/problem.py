"""Problem = Source + Target in one frame: draws samples as the search wants them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.errors import InputError
from distot.orbit import Orbit
from distot.power import Array, Frame
from distot.source import BLOCK, Key, Source, Stream, as_source
from distot.target import Rows, Target, build_target, check_rows


@dataclass(frozen=True)
class Problem:
    """Everything that stays fixed during a solve."""

    source: Source
    target: Target
    frame: Frame
    source_cov: Array  # (d, d), user units
    seed: int
    orbit: Orbit

    def keys(self, stream: Stream, step: int, samples: int, block: int = BLOCK) -> Iterator[tuple[Key, int]]:
        """Blocks that make up ``samples`` samples of one step: (key, size of the block)."""
        for number, first in enumerate(range(0, samples, block)):
            yield Key(self.seed, stream, step, number, first), min(block, samples - first)

    def batch(self, stream: Stream, step: int, samples: int) -> Iterator[Tensor]:
        """At least ``samples`` samples of one step, whole orbits, by blocks (at most BLOCK, d) float32 in the frame.

        Each has the law of the source, but those of an orbit depend on each other: for steps, not for error bars.
        """
        size, device = self.orbit.size, self.target.atoms.device
        for key, draws in self.keys(stream, step, -(-samples // size), BLOCK // size):
            yield self.frame.source_in(self.source.draw_orbits(key, draws, self.orbit)).to(device)


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
    return Problem(found, target, frame, cov, seed, Orbit(found.dim, found.symmetry, seed))


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
