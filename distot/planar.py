"""Power cells in the plane, cut out of a square, from the convex hull of their lifted atoms (Qhull).

The cell of atom i is where z -> <z, p_i> + g_i is largest. A facet of the upper hull of the points (p_i, g_i) stands
for the point where the planes of its three corners meet, an edge of the hull for the border of two cells; docs/math.md
(24). Legend: n atoms, m edges, z a point of the plane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, QhullError

from distot.errors import DistotError
from distot.power import Array

Index = NDArray[np.int64]
OUTSIDE = -1  # what lies beyond an edge on the border of the square
FAR, BELOW = 4.0, 8.0  # of the helpers, see ``_hull``
ROUND = 1e-4  # twice the area of a triangle over its longest side squared; below, it is a sliver
THIN = 1e-12  # twice its area over a long side; below, its corners may be on a line up to rounding


class Uneven(DistotError):
    """Latents and heights whose cells cannot be told in float64."""

    def __init__(self, why: str) -> None:
        super().__init__(f"latents or heights are too uneven for exact cells in float64: {why}")


@dataclass(frozen=True)
class Edges:
    """Borders of the cells, each once: counter-clockwise about ``cell``, clockwise about the atom ``beyond`` it."""

    cell: Index  # (m,)
    beyond: Index  # (m,), or OUTSIDE
    start: Array  # (m, 2)
    end: Array  # (m, 2)

    def among(self, chosen: NDArray[Any]) -> Edges:
        return Edges(self.cell[chosen], self.beyond[chosen], self.start[chosen], self.end[chosen])

    def total(self, values: Array, n: int, turn: float = 1.0) -> Array:
        """Sums over the borders of each cell (n, ...) of what ``values`` (m, ...) say of ``cell``; the atom beyond gets
        their negative; ``turn`` -1: the same."""
        inner = self.beyond != OUTSIDE
        rows, signed = np.concatenate([self.cell, self.beyond[inner]]), np.concatenate([values, -turn * values[inner]])
        sums = [np.bincount(rows, column, n).astype(np.float64) for column in signed.reshape(len(rows), -1).T]
        return np.stack(sums, axis=-1).reshape(n, *values.shape[1:])


def borders(points: Array, heights: Array, half: float) -> Edges:
    """Borders of the cells of atoms ``points`` (n, 2) with ``heights`` (n,) in the square |z_1|, |z_2| <= ``half``.

    The cells fill the square: the edges of each are closed curves, up to rounding. Atoms may lie on a line, or be one.
    Takes about a second for 100,000 atoms. Raises Uneven if the hull is beyond float64.
    """
    p = points - np.median(points, axis=0)
    spread = float(np.abs(p).max()) or 1.0
    p = p / spread
    reach = np.abs(p).sum(axis=1)
    g = (heights - np.median(heights)) / (half * spread)
    least = (g - reach).max()  # u is nowhere below it in the square, which is |z| <= 1 from here on
    able = np.flatnonzero(g + reach >= least)
    found = _hull(p[able], g[able], least - BELOW)
    for axis in (0, 1):
        for side in (1.0, -1.0):
            found = _clip(found, axis, side)
    found = found.among((found.start != found.end).any(axis=1))
    names = np.append(able, OUTSIDE)
    return Edges(names[found.cell], names[found.beyond], half * found.start, half * found.end)


def polygons(edges: Edges, n: int) -> list[Array]:
    """Corners (k, 2) of each cell, counter-clockwise; (0, 2) for one that is empty."""
    inner = edges.beyond != OUTSIDE
    cell = np.concatenate([edges.cell, edges.beyond[inner]])
    corner = np.concatenate([edges.start, edges.end[inner]])
    count = np.bincount(cell, minlength=n)
    middle = np.stack([np.bincount(cell, column, n) for column in corner.T], axis=1) / np.maximum(count, 1)[:, None]
    away = corner - middle[cell]
    order = np.lexsort((np.arctan2(away[:, 1], away[:, 0]), cell))
    return np.split(corner[order], np.cumsum(count)[:-1])


def _hull(p: Array, g: Array, low: float) -> Edges:
    """Borders of all cells in the plane, of points |p| <= 1.

    Four helpers, atoms FAR away with heights ``low``, BELOW the least value of u in |z| <= 1, win nowhere there and
    everywhere beyond |z| = 5, so that every other cell is bounded and the hull never flat. To others they are OUTSIDE.
    """
    helpers = FAR * np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    p, g = np.concatenate([p, helpers]), np.concatenate([g, np.full(4, low)])
    try:
        hull = ConvexHull(np.column_stack([p, g]))
    except QhullError as error:
        raise Uneven(f"Qhull fails: {str(error).splitlines()[0]}") from error
    corners, plane = hull.simplices.astype(np.int64), hull.equations
    upper = plane[:, 2] > 0
    s, k = np.repeat(np.arange(len(corners)), 3), np.tile(np.arange(3), len(corners))
    t = hull.neighbors[s, k].astype(np.int64)
    once = (s < t) & upper[s] & upper[t]
    s, k, t = s[once], k[once], t[once]
    a, b, c = corners[s, (k + 1) % 3], corners[s, (k + 2) % 3], corners[s, k]
    d = corners[t].sum(axis=1) - a - b
    if not ((corners[t] == d[:, None]).sum(axis=1) == 1).all():
        raise Uneven("the hull is not one of triangles")
    # of a -> b one triangle is on the left; the rounder of the two says which
    own, other = _roundness(p[a], p[b], p[c]), _roundness(p[a], p[b], p[d])
    left = np.where(np.abs(own) >= np.abs(other), own > 0, other < 0)
    parted = (plane[hull.neighbors] == plane[:, None]).all(axis=2).any(axis=1)
    z, n = _meeting(p[corners], g[corners], plane, parted), len(p) - 4
    turned = a >= n  # a helper is what lies beyond
    left, cell, beyond = left ^ turned, np.where(turned, b, a), np.where(turned, a, b)
    beyond = np.where(beyond < n, beyond, OUTSIDE)
    found = Edges(cell, beyond, z[np.where(left, t, s)], z[np.where(left, s, t)])
    return found.among((cell < n) & (found.start != found.end).any(axis=1))


def cross(u: Array, v: Array) -> Array:
    """u_1 v_2 - u_2 v_1 of vectors (m, 2)."""
    return u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]


def norm(u: Array) -> Array:
    """Lengths of vectors (m, 2)."""
    return np.hypot(u[:, 0], u[:, 1])


def _roundness(a: Array, b: Array, c: Array) -> Array:
    """Twice the signed area of triangles over their longest side squared (m,)."""
    sides = [((u - v) ** 2).sum(axis=1) for u, v in ((a, b), (b, c), (c, a))]
    return cross(b - a, c - a) / np.maximum(np.max(sides, axis=0), np.finfo(float).tiny)


def _meeting(p: Array, g: Array, plane: Array, parted: NDArray[np.bool_]) -> Array:
    """Where the planes of three atoms meet (m, 2): from their differences, which keep the digits of small triangles far
    from others; for slivers of a facet that Qhull has ``parted`` into triangles from its plane."""
    one, two = p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]
    up, down = g[:, 1] - g[:, 0], g[:, 2] - g[:, 0]
    area, longest = cross(one, two), np.sqrt(np.maximum((one**2).sum(axis=1), (two**2).sum(axis=1)))
    good = np.abs(area) > THIN * longest
    good &= ~parted | (np.abs(_roundness(p[:, 0], p[:, 1], p[:, 2])) > ROUND)
    met = np.stack([down * one[:, 1] - up * two[:, 1], up * two[:, 0] - down * one[:, 0]], axis=1)
    steep = np.where(plane[:, 2:3] == 0, 1.0, plane[:, 2:3])  # those are no upper facets
    return np.where(good[:, None], met / np.where(good, area, 1.0)[:, None], plane[:, :2] / steep)


def _clip(edges: Edges, axis: int, side: float) -> Edges:
    """The part of cells and edges where side z_axis <= 1. What is cut open is closed along the line."""
    start, end = edges.start.copy(), edges.end.copy()
    before, after = 1 - side * start[:, axis], 1 - side * end[:, axis]
    out, back = (before >= 0) & (after < 0), (before < 0) & (after >= 0)
    cut = out | back
    share = before[cut] / (before[cut] - after[cut])
    met = start[cut] + share[:, None] * (end[cut] - start[cut])
    met[:, axis] = side
    crossing = np.empty_like(start)
    crossing[cut] = met
    end[out], start[back] = crossing[out], crossing[back]
    kept = Edges(edges.cell, edges.beyond, start, end).among((before >= 0) | (after >= 0))

    first, first_cell = _sorted(edges, crossing, out, back)
    last, last_cell = _sorted(edges, crossing, back, out)
    if not np.array_equal(first_cell, last_cell):
        raise Uneven("their borders are not closed")
    return Edges(
        np.concatenate([kept.cell, first_cell]),
        np.concatenate([kept.beyond, np.full(len(first), OUTSIDE)]),
        np.concatenate([kept.start, first]),
        np.concatenate([kept.end, last]),
    )


def _sorted(edges: Edges, crossing: Array, own: NDArray[Any], other: NDArray[Any]) -> tuple[Array, Index]:
    """Where curves leave, by cells in order, and these cells: ``cell`` is left at ``own``, ``beyond`` at ``other``."""
    other = other & (edges.beyond != OUTSIDE)
    cell = np.concatenate([edges.cell[own], edges.beyond[other]])
    order = cell.argsort(kind="stable")
    return np.concatenate([crossing[own], crossing[other]])[order], cell[order]
