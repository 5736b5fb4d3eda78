"""Orbits: many samples of a symmetric source for one inner product with each atom; docs/math.md (17).

Split a draw z of a source that is symmetric under sign flips of its coordinates into g blocks z_b, and let H be a
Hadamard matrix (g, g). Then the 2 g points +- sum_b H_kb z_b have each exactly the law of the source, any two of them
are orthogonal in expectation or opposite, and their scores follow from the g partial products <z_b, y> by a fast
Hadamard transform. Legend: B draws, d dimension, g blocks of width w, T = 2 g points of an orbit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor

Symmetry = Literal["rotations", "signs", "none"]

MOST_PARTS = 8  # of a look, with axes of their own
MOST_BLOCKS = 16  # 32 points; with 32 blocks the variance of cell masses began to grow, and little work is left to save
COMPARE = 3  # flops to keep best and runner-up up to date by one score


class Orbit:
    """How a source of d dimensions makes orbits.

    size: T, points of an orbit; 1 for a source without symmetry, which is its own orbit.
    work: what one of them costs, in plain samples: flops over those of a plain sample, comparisons counted in both.
    """

    def __init__(self, dim: int, symmetry: Symmetry, seed: int) -> None:
        self.dim, self.symmetry, self.seed, self.size, self.work = dim, symmetry, seed, 1, 1.0
        if symmetry == "none":
            return
        self.blocks = g = 1 << (min(dim, MOST_BLOCKS).bit_length() - 1)
        self.size = 2 * g
        self.work = _work(dim, g)
        self.width = -(-dim // g)  # coordinates of a block; the last ones are filled up with zeros

    def parts(self, draws: int) -> int:
        """Into how many parts, each with axes of its own, to divide draws whose orbits are to be compared in pairs.

        Draws that lie in one cell because they are close have all their orbits in the same cells, if they go by the
        same axes. Turning the atoms to other axes costs as much as ``dim`` draws; it may cost a tenth of the search.
        """
        return 1 if self.size == 1 else max(1, min(MOST_PARTS, draws // (10 * self.dim)))

    def axes(self, part: int = 0) -> Tensor:
        """Orthonormal axes (g, w, d) of the blocks: in random directions under "rotations", so that none dominates;
        under "signs" those of the coordinates, in another order for each part."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(0, part) if part else (0,))
        generator = np.random.Generator(np.random.Philox(sequence))
        axes = np.eye(self.dim)
        if self.symmetry == "rotations":
            axes = np.linalg.qr(generator.standard_normal((self.dim, self.dim)))[0]
        elif part:
            axes = generator.permutation(axes)
        padded = np.zeros((self.width * self.blocks, self.dim))
        padded[: self.dim] = axes
        # coordinate j belongs to block j mod g, so that blocks of a cube mix leading and trailing axes
        blocks = padded.reshape(self.width, self.blocks, self.dim).transpose(1, 0, 2)
        return torch.from_numpy(np.ascontiguousarray(blocks))

    def of(self, z: Tensor, basis: Tensor) -> Orbits:
        """Orbits of draws z (B, d) about the centre of symmetry; ``basis``: the axes (g, w, d) as a frame sees them."""
        g = len(basis)
        padded = torch.nn.functional.pad(z, (0, self.width * g - z.shape[1]))
        return Orbits(padded.reshape(len(z), self.width, g).transpose(1, 2).to(basis).contiguous(), basis)


@dataclass(frozen=True)
class Orbits:
    """A request to search the points of orbits: T = 2 g for each of B draws, in the order +H z, -H z.

    Block b of a draw, as a vector, is z[:, b] @ basis[b].
    """

    z: Tensor  # (B, g, w)
    basis: Tensor  # (g, w, d)

    def __len__(self) -> int:
        return 2 * self.z.shape[0] * self.z.shape[1]

    def halves(self) -> Tensor:
        """The points + H z (B g, d), draw by draw; the others are their opposites. Float32, whatever the portion."""
        blocks = torch.einsum("bgw,gwd->gbd", self.z.double(), self.basis.double())
        points = torch.tensordot(signs(len(blocks)).to(blocks), blocks, dims=1)  # (g, B, d)
        return points.float().transpose(0, 1).reshape(len(self) // 2, self.basis.shape[2])

    def points(self) -> Tensor:
        """All points (B T, d)."""
        half = self.halves().unflatten(0, (len(self.z), self.z.shape[1]))
        return torch.cat([half, -half], dim=1).flatten(0, 1)


def _work(dim: int, g: int) -> float:
    log = g.bit_length() - 1
    return (2 * dim + g * log + (1 + COMPARE) * 2 * g) / (2 * g * (2 * (dim + 1) + COMPARE))


def work(x: Tensor | Orbits) -> float:
    """What a sample of a request costs, in plain samples; see ``Orbit``."""
    return _work(x.basis.shape[2], len(x.basis)) if isinstance(x, Orbits) else 1.0


def signs(g: int) -> Tensor:
    """The Hadamard matrix (g, g) of Sylvester."""
    return torch.from_numpy(hadamard(g).astype(np.float64))


def points(x: Tensor | Orbits) -> Tensor:
    """The samples of a request one by one, (B, d)."""
    return x.points() if isinstance(x, Orbits) else x
