"""The one home of signs: costs, heights, power cells, energy, units and conversions.

Legend: B samples, N atoms, d dimension. Numbers in brackets are those of docs/math.md.

    (1)  u_h(x) = max_i <x, y_i> + h_i           (6)  w_i = 2 h_i + |y_i|^2   (Laguerre weight)
    (2)  W_i(h) = cell of atom i, where i wins   (7)  g = w in POT and OTT (squared Euclidean cost)
    (27) c(x, y) = a(x) + b(y) - s(x, y)         (28) u_h(x) = max_i s(x, y_i) + h_i, s = log<x, y> on the sphere
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.errors import InputError
from distot.given import numbers

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Frame:
    """Centred, scaled coordinates in which the search runs in float32.

    x = source_centre + source_scale x' and y = target_centre + target_scale y'. Scores in the frame,
    <x', y'_i> + h'_i, order the atoms exactly as scores in the user's units do when

        h_i = source_scale target_scale h'_i - <source_centre, y_i - target_centre> + constant.
    """

    source_centre: Array  # (d,)
    source_scale: float
    target_centre: Array  # (d,)
    target_scale: float

    @property
    def unit(self) -> float:
        """One unit of a frame score, in the user's units of cost."""
        return self.source_scale * self.target_scale

    def source_in(self, x: Tensor) -> Tensor:
        """Samples (B, d) float64 in user units -> float32 in the frame."""
        centre = torch.as_tensor(self.source_centre, device=x.device)
        return ((x - centre) / self.source_scale).to(torch.float32)

    def target_in(self, y: Array) -> NDArray[np.float32]:
        """Atoms (n, d) in user units -> float32 in the frame; the subtraction is done in float64."""
        return ((y - self.target_centre) / self.target_scale).astype(np.float32)

    def target_out(self, y: Tensor) -> Tensor:
        """Atoms (n, d) float32 in the frame -> float64, relative to ``target_centre``."""
        return y.double() * self.target_scale

    def heights_out(self, heights: Array, tilt: Array, mass: Array) -> Array:
        """Frame heights (n,) -> user heights, centred so that sum_i nu_i h_i = 0.

        ``tilt`` is <source_centre, y_i - target_centre> (n,), taken from the atoms in float64.
        """
        return centred(self.unit * heights - tilt, mass)

    def heights_in(self, heights: Array, tilt: Array) -> Array:
        """The inverse of ``heights_out``, up to a constant."""
        return (heights + tilt) / self.unit


@dataclass(frozen=True)
class Quadratic:
    """The cost ½|x - y|² as in (27): a(x) = ½|x|², b(y) = ½|y|², score s = <x, y>.

    Any one vector may be subtracted from all x and y: here it is ``source_centre``, so that a common offset costs no
    digits. Samples (..., d) are float32 in the frame, atoms (..., d) float64 in user units, about ``target_centre``.
    """

    name = "quadratic"
    times = 2.0  # certificates give so many times the cost: |x - y|², in units of W2²
    spherical = False  # whether scores are logarithms of products of unit vectors
    limit = math.inf  # heights are kept within this of their mean, in the frame
    unseen = -math.inf  # scores up to this stand for an infinite cost

    def of_samples(self, frame: Frame, x: Tensor) -> Tensor:
        """a(x) (...,) float64."""
        away = frame.source_scale * x.double()
        return 0.5 * away.square().sum(-1) + away @ self._shift(frame, x)

    def of_atoms(self, frame: Frame, y: Tensor) -> Tensor:
        """b(y) (...,) float64."""
        return 0.5 * (y - self._shift(frame, y)).square().sum(-1)

    def between(self, frame: Frame, x: Tensor, y: Tensor) -> Tensor:
        """c(x, y) (...,) float64."""
        return 0.5 * (frame.source_scale * x.double() - y + self._shift(frame, x)).square().sum(-1)

    def score(self, product: Array) -> Array:
        """s of inner products <x, y>, both in user units."""
        return product

    def _shift(self, frame: Frame, like: Tensor) -> Tensor:
        return torch.from_numpy(frame.source_centre - frame.target_centre).to(like.device)


@dataclass(frozen=True)
class Logarithmic:
    """The cost -log<x, y> of unit vectors, as in (27): a = b = 0, score s = log<x, y>; infinite where <x, y> <= 0.

    The frame has centre 0 and scale 1. What is infinite, or nearly so, counts as -log ``FLOOR``.
    """

    name = "log"
    times = 1.0
    spherical = True
    limit = 64.0
    unseen = -100.0
    FLOOR = 2.0**-24  # products of unit vectors below are noise in float32

    def of_samples(self, frame: Frame, x: Tensor) -> Tensor:
        """a(x) = 0 (...,) float64."""
        return torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)

    def of_atoms(self, frame: Frame, y: Tensor) -> Tensor:
        """b(y) = 0 (...,) float64."""
        return torch.zeros(y.shape[:-1], dtype=torch.float64, device=y.device)

    def between(self, frame: Frame, x: Tensor, y: Tensor) -> Tensor:
        """c(x, y) (...,) float64."""
        return -(x.double() * y).sum(-1).clamp_min(self.FLOOR).log()

    def score(self, product: Array) -> Array:
        """s of inner products <x, y>."""
        return np.log(np.maximum(product, self.FLOOR))

    def scores(self, products: Tensor) -> Tensor:
        """Scores (B, k) float32 of the k largest e^h <x, y> of each sample, best first; see ``factors``.

        Where the largest is not positive all are ``unseen``; others count as ``FLOOR`` times the largest at least.
        """
        found = products.double()
        best = found[:, :1]
        logs = torch.maximum(found, self.FLOOR * best).clamp_min(torch.finfo(torch.float32).tiny).log()
        return torch.where(best > 0, logs, self.unseen).float()


Cost = Quadratic | Logarithmic
COSTS: dict[str, Cost] = {cost.name: cost for cost in (Quadratic(), Logarithmic())}


def cost_of(name: str) -> Cost:
    """The cost of this name. Raises InputError if there is none."""
    if name not in COSTS:
        raise InputError(f"unknown cost {name!r}; choose one of {', '.join(COSTS)}")
    return COSTS[name]


def factors(heights: Tensor) -> Tensor:
    """e^h (n,) float32, by which atoms are multiplied where s = log<x, y>: e^h <x, y> orders them as s + h does.

    Float32 holds e^±87; heights in use are within ``Logarithmic.limit`` of 0, others count as ±85.
    """
    return heights.double().clamp(-85.0, 85.0).exp().float()


def centred(heights: Array, mass: Array) -> Array:
    """Heights (n,) moved by a constant so that sum_i nu_i h_i = 0."""
    return heights - float(mass @ heights)


def heights_to_weights(heights: Array, latents: Array) -> Array:
    """Laguerre weights w (N,) of heights h (N,), math (6); also POT's and OTT's potential g, math (7)."""
    y = numbers(latents, "the array of latents")
    return 2.0 * numbers(heights, "heights") + np.einsum("nd,nd->n", y, y)


def weights_to_heights(weights: Array, latents: Array) -> Array:
    """Heights h (N,) of Laguerre weights, or of a POT / OTT potential g (N,); math (6), (7)."""
    y = numbers(latents, "the array of latents")
    return 0.5 * (numbers(weights, "weights") - np.einsum("nd,nd->n", y, y))
