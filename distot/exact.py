"""Exact cells of a problem in the plane: masses, centres, costs and polygons without sampling; docs/math.md (24), (25).

The source is a normal distribution, a square or a disc, seen as one of three standard shapes: x = centre + z M, where z
is standard normal, uniform on [-1/2, 1/2]^2, or uniform in the unit disc. The cells of x are those of z for the atoms
p = M y with the same heights. Legend: n atoms, m edges of cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import ndtri

from distot.atoms import Rows
from distot.errors import InputError
from distot.planar import OUTSIDE, Edges, Index, borders, cross, norm, polygons
from distot.power import Array
from distot.problem import Problem
from distot.source import Ball, Cube, Gaussian, Source

NODES, WEIGHTS = np.polynomial.legendre.leggauss(12)
PIECE = 2.0  # longest part of an edge, in standard deviations, that the nodes are spread over: the error is below 1e-16
DOUBT = 32.0  # roundings of what the edges of a cell add to its mass and take away, that it may be wrong by
FLAT = 1e8  # condition of M from which a normal distribution lies on a line


class Shape(ABC):
    """A standard density about zero; ``half``: all of its mass is in the square |z_1|, |z_2| <= half."""

    half: ClassVar[float]

    @abstractmethod
    def integrals(self, start: Array, end: Array) -> tuple[Array, Array, Array]:
        """What each edge (m, 2) to (m, 2) adds to the cell on its left: to its mass (m,) and first moment (m, 2); and
        the integral of the density along the edge (m,)."""

    @abstractmethod
    def within(self, z: Array, smallest: float) -> Array:
        """How far out the points z (m, 2) are (m,), by a norm: 1 on the border of where a cell of mass ``smallest``
        finds its place."""

    @abstractmethod
    def quantile(self, share: Array) -> Array:
        """Coordinates (m,) that put ``share`` of the mass below them, roughly."""


class Normal(Shape):
    """Standard normal. Beyond ten deviations is less than 1e-21 of it."""

    half = 10.0

    def integrals(self, start: Array, end: Array) -> tuple[Array, Array, Array]:
        length, unit, distance = _line(start, end)
        parts = np.ceil(length / PIECE).astype(np.int64)
        row = np.repeat(np.arange(len(length)), parts)
        number = np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)
        piece = (length / parts)[row, None]
        along = (start * unit).sum(axis=1)[row, None] + piece * (number[:, None] + 0.5 * (1 + NODES))
        square = distance[row, None] ** 2 + along**2
        outer = -np.expm1(-0.5 * square)
        radial = np.divide(outer, square, out=np.full_like(outer, 0.5), where=square > 1e-30)
        weights = 0.5 * piece * WEIGHTS / (2 * np.pi)
        density = np.bincount(row, (np.exp(-0.5 * square) * weights).sum(axis=1), len(length)).astype(np.float64)
        mass = distance * np.bincount(row, (radial * weights).sum(axis=1), len(length))
        return mass, -_outward(unit) * density[:, None], density

    def within(self, z: Array, smallest: float) -> Array:
        return norm(z) / np.sqrt(-2 * np.log(0.5 * smallest))

    def quantile(self, share: Array) -> Array:
        return ndtri(share)


class Square(Shape):
    """Uniform on [-1/2, 1/2]^2."""

    half = 0.5

    def integrals(self, start: Array, end: Array) -> tuple[Array, Array, Array]:
        mass = 0.5 * cross(start, end - start)
        return mass, (start + end) / 3 * mass[:, None], norm(end - start)

    def within(self, z: Array, smallest: float) -> Array:
        return 2 * np.abs(z).max(axis=1)

    def quantile(self, share: Array) -> Array:
        return share - 0.5


class Disc(Shape):
    """Uniform in the unit disc."""

    half = 1.0

    def integrals(self, start: Array, end: Array) -> tuple[Array, Array, Array]:
        length, unit, distance = _line(start, end)
        along = (start * unit).sum(axis=1)
        chord = np.sqrt(np.maximum(1 - distance**2, 0))
        enters, leaves = np.clip(-chord - along, 0, length), np.clip(chord - along, 0, length)
        before = np.arctan2(distance * enters, distance**2 + along * (along + enters))
        after = np.arctan2(distance * (length - leaves), distance**2 + (along + leaves) * (along + length))
        inside = leaves - enters

        def depth(t: Array) -> Array:
            return 0.5 * np.maximum(1 - distance**2 - (along + t) ** 2, 0)

        rule = depth(enters) + 4 * depth(0.5 * (enters + leaves)) + depth(leaves)  # Simpson's, exact for this parabola
        moment = -_outward(unit) * (inside * rule / (6 * np.pi))[:, None]
        return 0.5 * (distance * inside + before + after) / np.pi, moment, inside / np.pi

    def within(self, z: Array, smallest: float) -> Array:
        return norm(z)

    def quantile(self, share: Array) -> Array:
        return 2**0.5 * (share - 0.5)  # in the square within


def _line(start: Array, end: Array) -> tuple[Array, Array, Array]:
    """Length (m,) and direction (m, 2) of edges, and the distance (m,) of their lines from zero, positive if zero is on
    the left."""
    length = norm(end - start)
    unit = (end - start) / length[:, None]
    return length, unit, cross(start, unit)


def _outward(unit: Array) -> Array:
    """Normal (m, 2) on the right of directions: out of a cell that is gone round counter-clockwise."""
    return np.stack([unit[:, 1], -unit[:, 0]], axis=1)


@dataclass(frozen=True)
class Measured:
    """The cells of some heights."""

    edges: Edges
    mass: Array  # (n,)
    moment: Array  # (n, 2), the integral of z over each cell
    density: Array  # (m,), integrated along each edge
    doubt: Array  # (n,), a mass that could be rounding

    @property
    def hidden(self) -> NDArray[np.bool_]:
        """Empty cells (n,), as far as can be told."""
        return self.mass <= self.doubt


@dataclass(frozen=True)
class Plane:
    """A problem in standard shape. Heights are those of the frame; z (., 2) are points of the shape."""

    shape: Shape
    points: Array  # p (n, 2)
    mass: Array  # nu (n,), wanted
    matrix: Array  # M (2, 2), in user units

    def measure(self, heights: Array) -> Measured:
        """Exact cells for heights (n,). About a second for 20,000 atoms."""
        edges, n = borders(self.points, heights, self.shape.half), len(heights)
        mass, moment, density = self.shape.integrals(edges.start, edges.end)
        masses = edges.total(mass, n)
        bare = edges.total(density, n, -1.0) == 0
        masses[bare & (masses < 0.5)] = 0.0  # beyond the disc
        doubt = DOUBT * np.finfo(float).eps * edges.total(np.abs(mass), n, -1.0)
        return Measured(edges, masses, edges.total(moment, n), density, doubt)

    def hessian(self, found: Measured) -> sparse.csr_array:
        """Derivative of the masses by the heights (n, n), math (26): a Laplacian of the graph of neighbours."""
        inner = found.edges.beyond != OUTSIDE
        a, b = found.edges.cell[inner], found.edges.beyond[inner]
        weight = found.density[inner] / norm(self.points[a] - self.points[b])
        entries = np.concatenate([-weight, -weight, weight, weight])
        place = np.concatenate([a, b, a, b]), np.concatenate([b, a, a, b])
        return sparse.csr_array((entries, place), shape=(len(self.mass), len(self.mass)))

    def rounding(self, found: Measured, heights: Array) -> Array:
        """About the error of the masses (n,) that comes of the last digits of scores: more where latents are closer."""
        size = np.abs(heights - np.median(heights))
        size += self.shape.half * np.abs(self.points - np.median(self.points, axis=0)).sum(axis=1)
        return np.finfo(float).eps * (abs(self.hessian(found)) @ size)

    def chi2(self, found: Measured) -> float:
        """math (8)"""
        return float(((found.mass - self.mass) ** 2 / self.mass).sum())

    def error(self, found: Measured) -> float:
        """Largest relative error of a cell's mass."""
        return float((np.abs(found.mass - self.mass) / self.mass).max())


@dataclass(frozen=True)
class ExactCells:
    """The exact power cells of a solution in the plane, in user coordinates; n: distinct latents of positive mass.

    Masses are right to some 1e-15. Costs are in squared user units, as in a ``Certificate``, without error bars.
    Polygons are counter-clockwise, and cut off at ten standard deviations of a Gaussian, at the square around a ball.
    """

    latent: Index  # (n,) the row of each cell's latent; of equal latents the first
    mass: Array  # (n,)
    wanted: Array  # (n,) nu
    centre: Array  # (n, 2), E[x | x in the cell]; NaN for an empty cell
    polygons: list[Array]  # n of (k, 2); (0, 2) for an empty cell
    energy: float  # E[u_h], the mean of max_i <x, y_i> + h_i, for ``Solution.heights``
    w2_squared_bound: float  # math (9)
    map_cost: float  # E|x - T(x)|^2

    @property
    def chi2(self) -> float:
        """Squared relative error of the masses, math (8)."""
        return float(((self.mass - self.wanted) ** 2 / self.wanted).sum())

    @property
    def error(self) -> float:
        """Largest relative error of a mass."""
        return float((np.abs(self.mass - self.wanted) / self.wanted).max())

    def summary(self) -> dict[str, float]:
        """What is one number."""
        names = ("chi2", "error", "energy", "w2_squared_bound", "map_cost")
        return {name: float(getattr(self, name)) for name in names}


def check(source: Source, processes: int = 1) -> None:
    """Raises InputError for a problem whose cells are not computed exactly."""
    if source.dim != 2 or not isinstance(source, Gaussian | Cube | Ball):
        raise InputError(
            f"exact cells are computed in dimension 2 for a gaussian, cube or ball source; "
            f"this is a {source.kind} in dimension {source.dim}; leave exact away"
        )
    if processes > 1:
        raise InputError(f"exact cells are computed in one process, not {processes}; leave workers away")
    if np.linalg.cond(_standard(source)[1]) > FLAT:
        raise InputError("exact cells need a density in the plane, and this gaussian lies on a line (cov is singular)")


def _standard(source: Source) -> tuple[Shape, Array]:
    """The shape of a source and M (2, 2)."""
    if isinstance(source, Cube):
        return Square(), (source.high - source.low) * np.eye(2)
    if isinstance(source, Ball):
        return Disc(), source.radius * np.eye(2)
    axes = torch.eye(2, dtype=torch.float64)
    return Normal(), (source.place(axes) - source.place(torch.zeros_like(axes))).numpy()


def plane(problem: Problem, latents: Rows) -> Plane:
    """The problem in standard shape, with the latents (N, 2) in float64. Raises InputError as ``check`` does."""
    check(problem.source, problem.grid.world.size)
    frame, (shape, matrix) = problem.frame, _standard(problem.source)
    away = relative(problem, latents) / frame.target_scale
    return Plane(shape, away @ matrix.T / frame.source_scale, problem.target.mass, matrix)


def relative(problem: Problem, latents: Rows) -> Array:
    """Own atoms (own, d) float64 in user units, from the centre of the target."""
    every = np.asarray(latents[0 : latents.shape[0]])[problem.target.original]
    return every.astype(np.float64) - problem.frame.target_centre


def exact_cells(problem: Problem, latents: Rows, heights: Array) -> ExactCells:
    """The cells of heights (n,) in the frame. Raises InputError as ``check`` does."""
    seen, target, frame = plane(problem, latents), problem.target, problem.frame
    found = seen.measure(heights)
    nu, away, shift = target.mass, relative(problem, latents), frame.source_centre - frame.target_centre
    from_source = ((away - shift) ** 2).sum(axis=1)
    spread = float(np.trace(problem.source_cov))
    won = float((found.moment * seen.points).sum())  # E<x, T(x)> in the frame
    energy = frame.unit * (won + float(found.mass @ heights) - float(nu @ heights))  # for heights with mean 0
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = np.where(found.mass[:, None] > 0, found.moment / found.mass[:, None], np.nan)
    return ExactCells(
        latent=target.original,
        mass=found.mass,
        wanted=nu,
        centre=frame.source_centre + middle @ seen.matrix,
        polygons=[frame.source_centre + corners @ seen.matrix for corners in polygons(found.edges, target.n)],
        energy=energy + float(frame.source_centre @ (frame.target_centre + nu @ away)),
        w2_squared_bound=spread + float(nu @ from_source) - 2 * energy,
        map_cost=spread + float(found.mass @ from_source) - 2 * frame.unit * won,
    )
