"""Exact search that leaves out lists of atoms of which a bound says that they cannot win; docs/math.md (20).

With m_c the centroid of list c and any point x_c, scale s > 0 and positive matrix B, by Young's inequality the score at
x of each atom i of the list is at most

    <x, m_c> + s/2 (x - x_c)' B (x - x_c) + max_i [ h_i + <x_c, y_i - m_c> + (y_i - m_c)' B^-1 (y_i - m_c) / (2 s) ],

one inner product of d + 1 numbers. It is tight near x_c, for which the mean of the samples that the list has won is
taken, if B is about the derivative of the transport map, which a regression of winners on samples gives.

Legend: B samples, n atoms, d dimension, K lists; z are samples along the principal axes of the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distot.assign import Exact, Winners
from distot.assign.groups import Groups, Routes, Won
from distot.assign.native import Native
from distot.atoms import blocks
from distot.orbit import Orbits, points

LISTS = 4.0  # times the root of n
SCALES = 2.0 ** torch.arange(-4, 4, dtype=torch.float64)  # tried for s
JUDGES = 256  # samples that choose among them
LEARN = 64  # samples that are searched exhaustively first, at least
BEGIN = 4096  # of those, at most in one call
ROUNDING = 2.0**-22  # relative error of a product of float32
FIRST = 1e-5  # a sample visits the lists whose bound is this close to the largest first


@dataclass(frozen=True)
class Bounds:
    """Math (20), in units of the target's principal axes."""

    slope: Tensor  # (d,), the diagonal of B
    offset: Tensor  # (n,), what the bracket adds to the height of each atom
    bias: Tensor  # (K,)
    way: Tensor  # (K, d + 2), of (z, ½ z' B z, slack)
    size: float  # the largest numbers in it


class Lists(Exact):
    """The winners of the first samples, searched exhaustively, teach where lists win; later ones are learned from, too.

    Winners and scores are those of the plain search of the samples one by one, bit for bit, whatever was learned: of
    orbits too, whose scores are rounded otherwise where they are searched as such.

    ``plain``: an exhaustive search to share. ``scored``: scores computed so far, in units of n.
    """

    name = "lists"

    def __init__(self, atoms: Tensor, plain: Native | None = None, groups: Groups | None = None) -> None:
        self.groups = groups or Groups(atoms, round(LISTS * len(atoms) ** 0.5), plain)
        self.won, self.seen, self.fitted = Won(self.groups), 0, 0  # fitted: samples seen when the bounds were made
        self.bounds: Bounds | None = None  # replaced as a whole, as other threads may search, too

    def anew(self) -> Lists:
        """The same lists, with nothing learned yet."""
        return Lists(self.groups.atoms, groups=self.groups)

    @property
    def density(self) -> float:
        """Lists for each atom."""
        return len(self.groups.sizes) / len(self.groups.names)

    @property
    def scored(self) -> float:
        return self.groups.scored

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        samples = points(x)
        if self.bounds is not None or len(samples) <= BEGIN:
            return self._searched(samples, heights, k)
        parts = [self._searched(part, heights, k) for part in (samples[:BEGIN], samples[BEGIN:])]
        return Winners(torch.cat([its.index for its in parts]), torch.cat([its.score for its in parts]))

    def _searched(self, x: Tensor, heights: Tensor, k: int) -> Winners:
        bounds = self.bounds
        if len(x) == 0 or bounds is None:
            near = self.groups.everywhere(x, heights, k)
        else:
            near = self._visit(bounds, x, heights, k)
        z = x @ self.groups.axes
        self.won.add(z, near.index[:, 0])
        self.seen += len(z)
        if self.seen >= max(2 * self.fitted, LEARN):
            self.bounds = self._fit(z[:JUDGES].double(), near.score[:JUDGES, -1].double(), heights)
            self.fitted = self.seen
        return near

    def _fit(self, z: Tensor, score: Tensor, heights: Tensor) -> Bounds:
        """Chooses x_c, B and s of the bounds; s so that few of the samples z, with this k-th best score, visit."""
        groups, h = self.groups, heights.double()[self.groups.order]
        slope, reach = self.won.slope(), self.won.centres()
        node = torch.arange(len(reach)).repeat_interleave(groups.sizes)
        linear, square = torch.empty_like(h), torch.empty_like(h)
        for rows in blocks(len(h)):
            away = (groups.atoms[rows] @ groups.axes).double() - groups.middle[node[rows]]
            linear[rows], square[rows] = (away * reach[node[rows]]).sum(1), 0.5 * (away.square() / slope).sum(1)
        loss = 0.5 * (z**2 @ slope + (reach**2 @ slope)[:, None]) - (reach * slope) @ z.T  # ½ (x - x_c)' B (x - x_c)
        plane = groups.middle @ z.T - score
        visits = [(plane + s * loss + groups.largest(h + linear + square / s)[:, None] >= 0).sum(1) for s in SCALES]
        scale = SCALES[torch.stack(visits).argmin(0)]
        direction = groups.middle - scale[:, None] * slope * reach
        return Bounds(
            slope=slope,
            offset=linear + square / scale[node],
            bias=0.5 * scale * (reach**2 @ slope),
            way=torch.cat([direction, scale[:, None], torch.ones(len(scale), 1, dtype=torch.float32)], 1),
            size=float(direction.norm(dim=1).amax() + groups.middle.norm(dim=1).amax()),
        )

    def _visit(self, bounds: Bounds, x: Tensor, heights: Tensor, k: int) -> Winners:
        groups, h, z = self.groups, heights.double()[self.groups.order], (x @ self.groups.axes).double()
        bias, half = bounds.bias + groups.largest(h + bounds.offset), 0.5 * (z**2 @ bounds.slope)
        terms = z.norm(dim=1) * bounds.size + half * bounds.way[:, -2].amax() + bias.abs().amax() + h.abs().amax()
        slack = (z.shape[1] + 4) * ROUNDING * terms
        routes = Routes(bounds.way, bias, groups.plain.isa)
        guide = torch.cat([z, half[:, None], slack[:, None]], 1).float()
        if not all(torch.isfinite(part).all() for part in (guide, routes.way, routes.bias)):
            return groups.everywhere(x, heights, k)  # numbers too large for the bounds
        to, top = routes.best(guide)
        order = to.argsort()  # samples with the same lists stand together
        x, guide, first = x[order], guide[order], (top - FIRST * (top.abs() + 1e-30))[order]
        near = groups.visit(x, heights, routes, guide, limit=first, k=k)
        near = groups.visit(x, heights, routes, guide, limit=None, ceiling=first, near=near)
        back = order.argsort()
        return Winners(near.index[back], near.score[back])
