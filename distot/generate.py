"""New latents by the extended map of AE-OT: interpolation between neighbouring cells, never across a singular facet.

The OT map takes one of N values. Between the cells of latents that lie together it may be smoothed; where neighbouring
cells belong to latents far apart the transport is discontinuous, and a mixture of them would resemble neither. The
angle between the normals (y_i, -1), (y_j, -1) of two facets of the Brenier potential tells the two cases apart.

Legend: B samples, n atoms, k cells that are looked at, d dimension. Numbers in brackets are those of docs/math.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.assign import Assigner
from distot.cells import Sums, centres
from distot.errors import InputError
from distot.power import Array
from distot.problem import Problem
from distot.source import BLOCK, Key, Stream

OUTPUT, CALIBRATION, LUCK = range(3)  # steps of the stream: noise for samples, for the threshold; numbers for thinning
DEFAULT_K = 20
CALIBRATED = 4  # blocks that the threshold is taken from
BARREN = 64  # blocks without one sample, after which there is no hope
LEAST = 0.5  # balancing keeps samples of cells that have this share of their mass, or less, always, and of others fewer
TINY = 1e-30  # a distance
PICKED = 1 << 22  # numbers of neighbours that are picked out at once


@dataclass(frozen=True)
class Mixing:
    """How cells are mixed.

    k: best cells of a sample that are looked at; None: 20, or all if there are fewer.
    threshold: largest angle, in radians, between the normals (y, -1) of cells that may mix, y in user units as AE-OT
        has it.
    quantile: without a threshold it is this quantile of the angles between the best and the second best cell of
        samples, with y centred and scaled, so that neither shift nor scale of the latents matters.
    balance: noise without a neighbour to mix with gives the latent itself instead of being refused, and samples are
        thinned so that the share of each latent comes closer to its wanted mass.

    Raises InputError for values that make no sense.
    """

    k: int | None = None
    threshold: float | None = None
    quantile: float = 0.9
    balance: bool = False

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 2:
            raise InputError(f"k must be at least 2, the best cell and one to mix it with, not {self.k}")
        if self.threshold is not None and not 0 <= self.threshold <= math.pi:
            raise InputError(f"threshold is an angle between 0 and pi, not {self.threshold}")
        if self.threshold is not None and self.quantile != Mixing.quantile:
            raise InputError(f"the threshold {self.threshold} is used, and the quantile {self.quantile} not; give one")
        if not 0 < self.quantile <= 1:
            raise InputError(f"quantile must be above 0 and at most 1, not {self.quantile}")


@dataclass(frozen=True)
class Generated:
    """Samples of the extended map (15) in user units, with the noise that they came from.

    singular: noise for which no neighbouring cell is near enough to mix with: the singular set of the transport map, as
    far as it was met; singular_index: the latents whose cells hold it. drawn: samples of noise in all. threshold: the
    largest angle of cells that were mixed.
    """

    samples: NDArray[np.float32]  # (n, d)
    noise: Array  # (n, d)
    index: NDArray[np.int64]  # (n,) latent whose cell holds the noise
    drawn: int
    singular: Array  # (s, d)
    singular_index: NDArray[np.int64]  # (s,)
    threshold: float


class Generator:
    """Draws new latents for heights (own,) in the frame, from noise that is a function of the seed alone.

    ``sums`` are those of the cells for the same heights. Raises InputError if k exceeds the number of atoms.
    """

    def __init__(
        self, problem: Problem, assigner: Assigner, heights: Tensor, sums: Sums, mixing: Mixing, seed: int
    ) -> None:
        n = problem.target.n
        if mixing.k is not None and mixing.k > n:
            raise InputError(f"k is {mixing.k}, and there are only {n:,} different latents; take fewer")
        if not 0 <= seed < 2**63:
            raise InputError(f"seed must be between 0 and 2^63 - 1, it is {seed}")
        self.k = min(DEFAULT_K, n) if mixing.k is None else mixing.k
        self.problem, self.assigner, self.heights = problem, assigner.exact, heights
        self.mixing, self.seed = mixing, seed
        self.centre, self.known = centres(problem, sums)
        self.chance = _chances(problem, sums) if mixing.balance else None
        self.together = max(1, PICKED // (self.k * problem.target.dim))

    @cached_property
    def threshold(self) -> float:
        """The largest angle of cells that may mix."""
        if self.mixing.threshold is not None:
            return self.mixing.threshold
        keys = [self._key(CALIBRATION, number) for number in range(CALIBRATED)]
        found = [self._neighbours(x, 2).angle[:, 1] for key in keys for x in self._noise(key).split(self.together)]
        return float(np.quantile(torch.cat(found).cpu().numpy(), self.mixing.quantile))

    def blocks(self, first: int = 0, poll: Callable[[], None] = lambda: None) -> Iterator[Generated]:
        """What comes of one block of noise after another, without end, from number ``first`` on.

        On a grid every process has all of them. ``poll`` is called between searches and may raise to stop.
        """
        axis, barren = self.problem.grid.sample, 0
        for number in range(first - first % axis.size, sys.maxsize, axis.size):
            poll()
            found: list[Generated] = axis.objects(self._block(number + axis.rank))
            barren = 0 if any(len(its.index) for its in found) else barren + axis.size
            if barren >= BARREN:
                raise InputError(
                    f"no sample has a neighbour within an angle of {self.threshold:.3g}; raise the threshold or the "
                    f"quantile, or take balance, which gives the latents themselves"
                )
            yield from found[max(first - number, 0) :]

    def take(self, n: int) -> Generated:
        """The first n samples. Raises InputError if all noise is refused."""
        made: list[Generated] = []
        for block in self.blocks():
            made.append(block)
            if sum(len(its.index) for its in made) >= n:
                break
        samples, noise, index, drawn, singular, singular_index, _ = zip(*map(astuple, made), strict=True)
        return Generated(
            np.concatenate(samples)[:n],
            np.concatenate(noise)[:n],
            np.concatenate(index)[:n],
            sum(drawn),
            np.concatenate(singular),
            np.concatenate(singular_index),
            self.threshold,
        )

    def _block(self, number: int) -> Generated:
        x, split = self._noise(self._key(OUTPUT, number)), self.problem.target.split
        parts = [self._mixed(part) for part in x.split(self.together)]
        samples, winner, alone = (torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True))
        kept = ~alone
        if self.chance is not None:
            chance = split.pick(self.chance, torch.from_numpy(winner)).numpy()
            kept = self._key(LUCK, number).generator().random(len(winner)) < chance
        index = split.pick(torch.from_numpy(self.problem.target.original), torch.from_numpy(winner)).numpy()
        frame = self.problem.frame
        noise = frame.source_centre + frame.source_scale * x.double().cpu().numpy()
        made = samples[kept], noise[kept], index[kept]
        return Generated(*made, len(x), noise[alone], index[alone], self.threshold)

    def _mixed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Extended map (15) of x (b, d) in the frame: samples (b, d) float32 in user units, best cells (b,), and which
        samples have no neighbour to mix with: these get the latent of their cell."""
        near = self._neighbours(x, self.k)
        kept = near.known & (near.angle <= self.threshold)
        kept[:, 0] = near.known[:, 0]
        alone = ~kept[:, 1:].any(dim=1)
        kept[alone] = False
        kept[alone, 0] = True
        weight = torch.where(kept, 1 / near.distance.clamp_min(TINY), 0.0)
        weight /= weight.sum(dim=1, keepdim=True)
        axis, frame = self.problem.grid.target, self.problem.frame
        mixture = axis.sum((weight[:, :, None] * near.own).sum(dim=1))
        user = mixture + torch.from_numpy(frame.target_centre).to(mixture)
        return user.float(), near.index[:, 0], alone

    def _neighbours(self, x: Tensor, k: int) -> Neighbours:
        """The k best cells of x (b, d) in the frame, and how they lie to each other."""
        target, frame, split = self.problem.target, self.problem.frame, self.problem.target.split
        index = self.assigner(x, self.heights, k=k).index
        place = split.place(index)
        mine, place = (place < split.count)[:, :, None], place.clamp_max(split.count - 1)
        centre, scale = torch.from_numpy(frame.target_centre).to(x.device), frame.target_scale
        own = torch.where(mine, frame.target_out(target.atoms.some(place)(place)), 0.0)  # relative to target_centre
        # y of the normals (y, -1): as users see it for an angle of theirs, else centred and scaled
        y = own / scale if self.mixing.threshold is None else torch.where(mine, own + centre, 0.0)
        best = split.axis.sum(y[:, 0])
        away = torch.where(mine, x[:, None] - self.centre[place], 0.0).double()
        known = (mine[:, :, 0] & self.known[place]).double()
        inner, square, distance, seen = split.axis.sum(
            torch.stack([(y * best[:, None]).sum(2), y.square().sum(2), away.square().sum(2), known])
        )
        length = (square + 1).sqrt()
        angle = ((inner + 1) / (length * length[:, :1])).clamp(-1, 1).arccos()
        return Neighbours(index, own, angle, distance.sqrt(), seen > 0)

    def __reduce__(self) -> NoReturn:
        raise InputError(
            "a generator is for this process alone; hand on the solution, and call its .generator(mixing, seed) there"
        )

    def _key(self, step: int, number: int) -> Key:
        return Key(self.seed, Stream.GENERATE, step, number)

    def _noise(self, key: Key) -> Tensor:
        """Samples (BLOCK, d) in the frame."""
        drawn = self.problem.source.draw(key, BLOCK)
        return self.problem.frame.source_in(drawn).to(self.heights.device)


@dataclass(frozen=True)
class Neighbours:
    """The k best cells of b samples, best first."""

    index: Tensor  # (b, k)
    own: Tensor  # (b, k, d) latents in user units relative to the frame's centre; zero where others own them
    angle: Tensor  # (b, k) of the normal with that of the best cell
    distance: Tensor  # (b, k) of the sample from the centre of the cell, in the frame
    known: Tensor  # (b, k) whether the centre is known


def _chances(problem: Problem, sums: Sums) -> Tensor:
    """With which chance a sample of own cells is kept, (own,), so that shares come closer to the wanted masses.

    The mass of a cell is estimated with the noise of its count, so its ratio r to the wanted mass is drawn towards 1 by
    the share s of the variance of r over all cells that is not noise (empirical Bayes, James and Stein). Chances are
    LEAST / r, so half of all samples are kept, and cells with less than that share of their mass stay short.
    """
    target, m, total = problem.target, float(sums.samples), problem.target.split.axis.total
    ratio = sums.total / m / target.mass
    noise = (sums.squares - sums.total**2 / sums.orbits) / m**2 / target.mass**2
    spread, noisy = total(float(target.mass @ (ratio - 1) ** 2)), total(float(target.mass @ noise))
    signal = max(0.0, 1 - noisy / spread) if spread else 0.0
    return torch.from_numpy(LEAST / np.maximum(1 + signal * (ratio - 1), LEAST))
