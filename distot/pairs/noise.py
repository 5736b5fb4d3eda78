"""The noise of pairs: samples of a source by their number, whoever asks for them, and chances that go with them.

Sample s of an epoch is point s mod T of orbit s div T; orbits are drawn in keyed blocks of the PAIRS stream. So a
sample is a function of (seed, epoch, s). Legend: B samples, d dimension, T points of an orbit (1: all independent).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.errors import InputError
from distot.orbit import Orbit
from distot.source import BLOCK, Key, Source, Stream, from_spec

NOISE = "noise-"  # begins the names of a source's arrays in a store


class Chance(enum.IntEnum):
    """What is left to chance besides the noise itself, each with random numbers of its own."""

    ORDER = 1  # of the samples of a pool
    COPY = 2  # which of equal latents
    SOFT = 3  # which of the likely latents, at a fixed epsilon
    TIE = 4  # which latents get one sample more
    LABEL = 5  # which class a sample belongs to


def generator(seed: int, chance: Chance, epoch: int, number: int) -> np.random.Generator:
    """Random numbers for one chance of an epoch, and one block or pool of it."""
    sequence = np.random.SeedSequence(seed, spawn_key=(Stream.PAIRS, epoch, number, chance))
    return np.random.Generator(np.random.Philox(sequence))


def check_seed(seed: int, epoch: int) -> None:
    """Raises InputError for numbers that no stream can be named by."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be between 0 and 2^63 - 1, it is {seed}")
    if not 0 <= epoch < 2**63:
        raise InputError(f"epoch must be 0 or more, it is {epoch}")


@dataclass(frozen=True)
class Noise:
    """Samples of ``source`` by their number, those of an orbit one after another."""

    source: Source
    orbit: Orbit
    seed: int

    @cached_property
    def _axes(self) -> Tensor:
        return self.orbit.axes()

    def draws(self, epoch: int, first: int, last: int) -> Tensor:
        """The draws (m, d) float64 about zero of the orbits in which samples ``first`` to ``last`` lie."""
        size = self.orbit.size
        begin, end, per = first // size, -(-last // size), BLOCK // size
        found = [torch.empty(0, self.source.dim, dtype=torch.float64)]
        for block in range(begin // per, -(-end // per)):  # always whole, as a user's sampler may need it
            its = self.source.centred(Key(self.seed, Stream.PAIRS, epoch, block), per)
            found.append(its[max(0, begin - block * per) : end - block * per])
        return torch.cat(found)

    def points(self, z: Tensor, first: int, last: int) -> Tensor:
        """Samples ``first`` to ``last`` (B, d) float64 in user units, of their draws."""
        if self.orbit.size == 1:
            return self.source.place(z)
        begin = first // self.orbit.size * self.orbit.size
        return self.source.place(self.orbit.of(z, self._axes).points()[first - begin : last - begin].double())

    def samples(self, epoch: int, first: int, last: int) -> Tensor:
        """Samples ``first`` to ``last`` of an epoch, (B, d) float64 in user units."""
        return self.points(self.draws(epoch, first, last), first, last)

    def chances(self, chance: Chance, epoch: int, first: int, last: int, columns: int = 1) -> NDArray[np.float64]:
        """Numbers in [0, 1) that belong to samples ``first`` to ``last``, (B, columns)."""
        found = [np.empty((0, columns))]
        for block in range(first // BLOCK, -(-last // BLOCK)):
            its = generator(self.seed, chance, epoch, block).random((BLOCK, columns))
            found.append(its[max(0, first - block * BLOCK) : last - block * BLOCK])
        return np.concatenate(found)

    def spec(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """What ``from_noise`` needs to draw the same samples elsewhere: plain values, and arrays."""
        source, arrays = self.source.spec()
        orbit = {"symmetry": self.orbit.symmetry, "seed": self.orbit.seed}
        about = {"source": source, "source_arrays": sorted(arrays), "orbit": orbit, "seed": self.seed}
        return about, {NOISE + name: np.asarray(values) for name, values in arrays.items()}


def from_noise(about: dict[str, Any], arrays: dict[str, NDArray[Any]], source: Source | None = None) -> Noise:
    """The inverse of ``Noise.spec``; a user's sampler, which is code, must be given.

    Raises InputError if it is not.
    """
    if source is None:
        spec = about["source"]
        if spec["kind"] == "sampler":
            raise InputError(
                f"the noise is of the sampler {spec.get('name')!r}, which no file holds; give it as source="
            )
        source = from_spec(spec, {name: arrays[NOISE + name] for name in about["source_arrays"]})
    orbit = about["orbit"]
    return Noise(source, Orbit(source.dim, orbit["symmetry"], orbit["seed"]), about["seed"])
