"""Problem = Source + Target in one frame: draws samples as the search wants them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.errors import InputError
from distot.orbit import Orbit, Orbits
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
    basis: Tensor  # (g, w, d) float32, axes of the orbit's blocks in the frame; empty without orbits

    def keys(self, stream: Stream, step: int, samples: int, block: int = BLOCK) -> Iterator[tuple[Key, int]]:
        """Blocks that make up ``samples`` samples of one step: (key, size of the block)."""
        for number, first in enumerate(range(0, samples, block)):
            yield Key(self.seed, stream, step, number, first), min(block, samples - first)

    def batch(self, stream: Stream, step: int, samples: int) -> Iterator[Tensor | Orbits]:
        """At least ``samples`` samples of one step, whole orbits, by blocks of at most BLOCK, float32 in the frame.

        Each has the law of the source, but those of an orbit depend on each other: for steps, not for error bars.
        """
        size = self.orbit.size
        for key, draws in self.keys(stream, step, -(-samples // size), BLOCK // size):
            z = self.source.centred(key, draws)
            if size > 1:
                yield self.orbit.of(z, self.basis)
            else:
                yield self.frame.source_in(self.source.place(z)).to(self.target.atoms.device)


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
    orbit = Orbit(found.dim, found.symmetry, seed)
    basis = frame.source_in(found.place(orbit.axes)) - frame.source_in(found.place(torch.zeros_like(orbit.axes)))
    return Problem(found, target, frame, cov, seed, orbit, basis.to(where))


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
