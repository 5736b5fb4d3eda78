"""Samples are a function of a key (seed, stream, step, block) alone, and a source of what it makes of uniform numbers.

Every source can so be drawn either independently (estimators with error bars) or as scrambled Sobol points (the
solver's steps, where evenly spread points carry less noise). Legend: n samples, d dimension. All values are float64 in
the user's units.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.quasirandom import SobolEngine

from distot.errors import InputError
from distot.orbit import Symmetry
from distot.power import Array

BLOCK = 4096
"""Samples in one block of a stream; part of the definition of a stream, so never changed lightly."""

Spec = dict[str, Any]


class Stream(enum.IntEnum):
    """Independent sample streams of one seed. Only STEP and START are evenly spread (Sobol)."""

    START = 1
    STEP = 2
    CHECK = 3
    CERTIFY = 4
    MOMENTS = 5
    CELLS = 6
    GENERATE = 7
    PAIRS = 8


class Key(NamedTuple):
    """Names one block of samples."""

    seed: int
    stream: Stream
    step: int
    block: int
    first: int = 0  # points of the step before this block, where points are evenly spread over the step

    def generator(self) -> np.random.Generator:
        """A counter-based generator of this block's own."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(self.stream, self.step, self.block))
        return np.random.Generator(np.random.Philox(sequence))


def uniforms(key: Key, n: int, columns: int) -> Tensor:
    """Numbers in the open unit interval (n, columns), evenly spread over a step for START and STEP."""
    if key.stream in (Stream.START, Stream.STEP) and columns <= SobolEngine.MAXDIM:
        engine = _sobol(key.seed, key.stream, key.step, columns).reset()
        if key.first:  # engine.fast_forward would take the points one by one
            last, engine.num_generated = key.first - 1, key.first
            for bit in range(last.bit_length()):
                if (last ^ last >> 1) >> bit & 1:
                    engine.quasi ^= engine.sobolstate[:, bit]
        return engine.draw(n, dtype=torch.float64) + 0.5 * 2.0**-SobolEngine.MAXBIT
    u = key.generator().random((n, columns))
    return torch.from_numpy(np.maximum(u, 2.0**-54))


@lru_cache(maxsize=1)
def _sobol(seed: int, stream: Stream, step: int, columns: int) -> SobolEngine:
    """The scrambled points of a step, from the first one on."""
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, step))
    scramble = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
    return SobolEngine(columns, scramble=True, seed=scramble)


class Source(ABC):
    """A probability on R^d that can be sampled: ``place``, an affine map, of a variable that has a ``symmetry``.

    A source implements ``shaped`` with the number of its ``columns``, or ``centred`` itself.
    """

    kind: ClassVar[str]
    symmetry: Symmetry = "none"

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise InputError(f"a source needs a dimension of at least 1, not {dim}")
        self.dim = dim

    @property
    def columns(self) -> int | None:
        """Uniform numbers that a sample takes; None if it is not made of such."""
        return self.dim

    def shaped(self, u: Tensor) -> Tensor:
        """The variable about zero (n, d) float64 from uniform numbers (n, columns)."""
        raise NotImplementedError

    def centred(self, key: Key, n: int) -> Tensor:
        """The variable about zero (n, d) float64 of the block named by ``key``; all rotations, or all sign flips and
        exchanges of its coordinates, keep its law if ``symmetry`` says so."""
        assert self.columns is not None
        return self.shaped(uniforms(key, n, self.columns))

    def place(self, z: Tensor) -> Tensor:
        """Samples (n, d) in user units from the variable about zero."""
        return z

    def draw(self, key: Key, n: int) -> Tensor:
        """Samples (n, d) float64 of the block named by ``key``."""
        return self.place(self.centred(key, n))

    def quantiles(self, p: Tensor) -> Tensor | None:
        """Where the shares p (n,) of the mass of a source on a line lie below, (n,) in user units; None if that has no
        formula, or there are more dimensions."""
        return None

    @abstractmethod
    def moments(self, seed: int) -> tuple[Array, Array]:
        """Mean (d,) and covariance (d, d); exact where known, else from samples of the MOMENTS stream."""

    @abstractmethod
    def spec(self) -> tuple[Spec, dict[str, NDArray[Any]]]:
        """What ``from_spec`` needs to rebuild this source: plain values, and arrays."""
