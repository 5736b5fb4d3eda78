"""The one home of signs: heights, power cells, energy, units and conversions.

Legend: B samples, N atoms, d dimension. Numbers in brackets are those of docs/math.md.

    (1)  u_h(x) = max_i <x, y_i> + h_i           (6)  w_i = 2 h_i + |y_i|^2   (Laguerre weight)
    (2)  W_i(h) = cell of atom i, where i wins   (7)  g = w in POT and OTT (squared Euclidean cost)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


def centred(heights: Array, mass: Array) -> Array:
    """Heights (n,) moved by a constant so that sum_i nu_i h_i = 0."""
    return heights - float(mass @ heights)


def heights_to_weights(heights: Array, latents: Array) -> Array:
    """Laguerre weights w (N,) of heights h (N,), math (6); also POT's and OTT's potential g, math (7)."""
    y = np.asarray(latents, dtype=np.float64)
    return 2.0 * np.asarray(heights, dtype=np.float64) + np.einsum("nd,nd->n", y, y)


def weights_to_heights(weights: Array, latents: Array) -> Array:
    """Heights h (N,) of Laguerre weights, or of a POT / OTT potential g (N,); math (6), (7)."""
    y = np.asarray(latents, dtype=np.float64)
    return 0.5 * (np.asarray(weights, dtype=np.float64) - np.einsum("nd,nd->n", y, y))
