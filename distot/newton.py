"""Damped Newton on exact masses in the plane, after Kitagawa, Mérigot and Thibert; docs/math.md (26), (31).

Each step solves the Laplacian of the graph of neighbours, and is halved until no cell has less than half the least mass
that was there at the start, or is wanted. From any heights without an empty cell this ends at the exact ones, at last
with the square of the error in each step. Legend: n atoms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.sparse.linalg import splu

from distot.exact import Measured, Plane
from distot.planar import Uneven
from distot.power import Array

GOAL = 1e-9  # largest relative error of a mass
DIGITS = 32.0  # roundings of all scores, below which chi2 need not become smaller
ROUGH = 1e-4  # if the largest relative error is below this
ITERATIONS = 200
HALVINGS = 40  # of a step
MIXED = (2.0**-8, 2.0**-6, 2.0**-4, 2.0**-2, 1.0)  # shares of the spread-out heights that are tried against empty cells
AROUND, CORNERS = 512, 1 << 22  # points around a cell's place; scores that are computed at once


@dataclass(frozen=True)
class Outcome:
    """Heights (n,), their largest relative error, and why it is not what it should be; None if it is."""

    heights: Array
    error: float
    why: str | None = None


def solve(plane: Plane, heights: Array, each: Callable[[dict[str, float]], None] = lambda news: None) -> Outcome:
    """Heights (n,) of the wanted masses from ``heights``; ``each`` hears of every iteration.

    They are right to GOAL, or to the digits that float64 has for them where latents are very close to each other, which
    cannot be worse than ROUGH. Raises Uneven if the cells of the first heights cannot be told.
    """
    found = plane.measure(heights)
    if found.hidden.any():
        heights, found = opened(plane, heights, found)
        if hidden := int(found.hidden.sum()):
            return Outcome(
                heights, plane.error(found), f"{hidden} cells are empty, and no way was found to open them all"
            )
    floor, length = 0.5 * min(plane.mass.min(), found.mass.min()), 1.0
    for iteration in range(ITERATIONS):
        chi2, error = plane.chi2(found), plane.error(found)
        each({"iteration": iteration, "chi2": chi2, "error": error, "least": _least(plane, found), "length": length})
        if error <= GOAL:
            return Outcome(heights, error)
        rounded = error <= ROUGH and chi2 <= ((DIGITS * plane.rounding(found, heights)) ** 2 / plane.mass).sum()
        step = _step(plane, found)
        for length in 0.5 ** np.arange(1 if rounded else HALVINGS):
            trial = _tried(plane, heights + length * step)
            if trial and (trial.mass >= floor).all() and plane.chi2(trial) <= (1 - 0.5 * length) ** 2 * chi2:
                break
        else:
            return Outcome(
                heights, error, None if rounded else f"no step makes a relative error of {error:.1e} smaller"
            )
        heights, found = heights + length * step, trial
    error = plane.error(found)
    return Outcome(heights, error, f"{ITERATIONS} steps left a relative error of {error:.1e}")


def _tried(plane: Plane, heights: Array) -> Measured | None:
    """The cells of heights (n,), None if they are beyond float64."""
    try:
        return plane.measure(heights) if np.isfinite(heights).all() else None
    except Uneven:
        return None


def _step(plane: Plane, found: Measured) -> Array:
    """The Newton step (n,), NaN if there is none. A common constant changes nothing, so the stiffest atom stays put."""
    hessian = plane.hessian(found)
    stiff = hessian.diagonal()
    free = np.flatnonzero(np.arange(len(stiff)) != stiff.argmax())
    laplacian, step = hessian[free][:, free].tocsc(), np.zeros(len(stiff))
    wanted = (plane.mass - found.mass)[free]
    try:
        factors = splu(laplacian, "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    except RuntimeError:  # a pivot is zero: borders so far out that no density is left there
        return np.full(len(stiff), np.nan)
    step[free] = factors.solve(wanted)
    step[free] += factors.solve(wanted - laplacian @ step[free])
    return step


def opened(plane: Plane, heights: Array, found: Measured) -> tuple[Array, Measured]:
    """Heights near these where every cell has mass, if possible: the best of MIXED, by the worst cell.

    Atoms with an empty cell are raised until they touch u in the region of the mass. Then every atom has a point of
    that region in its cell, and so it has for the spread-out heights; those between the two open a cell around the
    point between the two points, math (31).
    """
    points, smallest = plane.points, float(plane.mass.min())
    raised = heights.copy()
    hidden = np.flatnonzero(found.hidden)
    corners, values = _touching(plane, heights, found, smallest)
    for some in np.array_split(hidden, -(-len(hidden) * len(corners) // CORNERS)):
        raised[some] = (values[:, None] - corners @ points[some].T).min(axis=0)

    spread_out = _spread_out(plane, smallest)
    best = heights, found
    for share in MIXED:
        mixed = (1 - share) * raised + share * spread_out
        trial = _tried(plane, mixed)
        if trial and _better(plane, trial, best[1]):
            best = mixed, trial
    return best


def _spread_out(plane: Plane, smallest: float) -> Array:
    """Heights (n,) of which every cell has a place of its own: a sum of concave functions of the two coordinates.

    Each has minus the quantiles of the shape as slopes, so that the point (G_1(p_1), G_2(p_2)) is in the cell of p, and
    atoms that are next to each other in a coordinate are apart there as the mass between them wants, however close.
    """
    share = 0.5 * (plane.mass + 1 / len(plane.mass))
    sites, ranked = np.empty_like(plane.points), []
    for k, values in enumerate(plane.points.T):
        distinct, place = np.unique(values, return_inverse=True)
        weight = np.bincount(place, share)
        quantiles = plane.shape.quantile((np.cumsum(weight) - 0.5 * weight) / weight.sum())
        sites[:, k] = quantiles[place]
        ranked.append((distinct, quantiles, place))
    scale = 0.95 / max(plane.shape.within(sites, smallest).max(), 0.95)
    heights = np.zeros(len(share))
    for distinct, quantiles, place in ranked:
        steps = np.diff(distinct) * 0.5 * (quantiles[1:] + quantiles[:-1])
        sums = np.concatenate([[0.0], np.cumsum(steps)])
        heights -= scale * (sums - sums[len(sums) // 2])[place]
    return heights


def _better(plane: Plane, one: Measured, other: Measured) -> bool:
    """Whether one has fewer empty cells than the other, or as many and a better worst cell."""
    counts = int(one.hidden.sum()), int(other.hidden.sum())
    return counts[0] < counts[1] or (counts[0] == counts[1] and _least(plane, one) > _least(plane, other))


def _least(plane: Plane, found: Measured) -> float:
    """The least of all cells' shares of their wanted masses."""
    return float((found.mass / plane.mass).min())


def _touching(plane: Plane, heights: Array, found: Measured, smallest: float) -> tuple[Array, Array]:
    """Points (m, 2) in the region of the mass, and u (m,) there: corners of cells, and some around the region."""
    edges = found.edges
    corners, cell = np.concatenate([edges.start, edges.end]), np.tile(edges.cell, 2)
    values = (corners * plane.points[cell]).sum(axis=1) + heights[cell]
    inside = plane.shape.within(corners, smallest) <= 1
    turn = 2 * np.pi * np.arange(AROUND) / AROUND
    ring = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    ring *= 0.999 / plane.shape.within(ring, smallest)[:, None]
    parts = np.array_split(ring, -(-len(ring) * len(heights) // CORNERS))
    on_ring = np.concatenate([(part @ plane.points.T + heights).max(axis=1) for part in parts])
    return np.concatenate([corners[inside], ring]), np.concatenate([values[inside], on_ring])
