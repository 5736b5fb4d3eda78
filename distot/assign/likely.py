"""Search with a wanted recall: a sample visits those lists of atoms that probably hold its winner; docs/math.md (21).

The samples that a list has won are described by a Gaussian with independent coordinates along the axes of the target.
A sample visits the lists whose log posterior is within a gap of the largest. The gap follows from samples that are
searched exactly, a few in every call.

Legend: B samples, n atoms, d dimension, K lists; z are samples along the principal axes of the target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distot.assign import Winners
from distot.assign.groups import Groups, Routes, Won
from distot.assign.native import Native
from distot.orbit import Orbits, points

LISTS = 1.5  # times the root of n
LEARN = 32  # samples for each list that are searched exhaustively first
CHECKED_FIRST, CHECKED = 4, 128  # one sample in so many judges the recall, at first and later
WINDOW = 4096  # of those are remembered


class Likely:
    """``recall``: share of samples whose winner shall be found. ``plain``: an exhaustive search to share.

    What was learned is judged by samples that it was not learned from. ``scored``: scores so far, in units of n.
    """

    name, why = "lists", ""

    def __init__(self, atoms: Tensor, recall: float, plain: Native | None = None) -> None:
        self.recall, self.groups = recall, Groups(atoms, round(LISTS * len(atoms) ** 0.5), plain)
        self.won, self.seen, self.fitted = Won(self.groups), 0, 0  # fitted: samples seen at the last fit
        self.judges = torch.empty(0, atoms.shape[1], dtype=torch.float32)  # z of the last exact searches
        self.truth = torch.empty(0, dtype=torch.int64)  # the lists of their winners
        self.gaps = torch.empty(0, dtype=torch.float32)  # how far those were from the likeliest one
        self.gap = 0.0  # how far to go

    @property
    def exact(self) -> Native:
        return self.groups.plain

    @property
    def scored(self) -> float:
        return self.groups.scored

    @property
    def found(self) -> float | None:
        """The recall measured on the last samples that were searched exactly; None before there were any."""
        return float((self.gaps <= self.gap).double().mean()) if len(self.gaps) else None

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        if len(x) == 0:
            return self.exact(x, heights, k)
        judge = torch.zeros(len(x), dtype=torch.bool)
        judge[self.seen % CHECKED :: CHECKED if self.fitted else CHECKED_FIRST] = True
        z = points(x) @ self.groups.axes
        if self.fitted:
            near = self._visit(points(x), z, heights, k)
            self._judge(z[judge], self.groups.everywhere(points(x)[judge], heights, 1).index[:, 0])
        else:
            near = self.exact(x, heights, k)
            self.groups.scored += len(x)
            self._judge(z[judge], near.index[judge, 0])
        self.won.add(z[~judge], near.index[~judge, 0])
        self.seen += len(z)
        if self.seen >= max(2 * self.fitted, LEARN * len(self.groups.sizes)):
            self._fit()
        return near

    def _fit(self) -> None:
        self.fitted, groups = self.seen, self.groups
        mean, variance = self.won.centres(), self.won.variance()
        share = (self.won.count + 0.5 * groups.sizes / len(groups.names)) / (self.won.count.sum() + 0.5)
        bias = share.log() - 0.5 * (mean**2 / variance + variance.log()).sum(1)
        self.routes = Routes(torch.cat([-0.5 / variance, mean / variance], 1), bias, groups.plain.isa)
        self.gaps = self._gaps(self.judges, self.truth)
        self._aim()

    def _visit(self, x: Tensor, z: Tensor, heights: Tensor, k: int) -> Winners:
        guide = torch.cat([z**2, z], 1)
        limit = self.routes.best(guide)[1] - self.gap
        near = self.groups.visit(x, heights, self.routes, guide, limit, k=k)
        few = (near.index[:, -1] >= len(self.groups.names)).nonzero()[:, 0]  # visited fewer than k atoms
        if len(few):
            again = self.groups.everywhere(x[few], heights, k)
            near.index[few], near.score[few] = again.index, again.score
        return near

    def _judge(self, z: Tensor, winner: Tensor) -> None:
        """Remembers exact winners, and sets the gap by them."""
        node = self.groups.list_of(winner)
        self.judges, self.truth = torch.cat([self.judges, z])[-WINDOW:], torch.cat([self.truth, node])[-WINDOW:]
        if self.fitted:
            self.gaps = torch.cat([self.gaps, self._gaps(z, node)])[-WINDOW:]
            self._aim()

    def _gaps(self, z: Tensor, node: Tensor) -> Tensor:
        """How far the log posterior of these lists (B,) is below that of the likeliest."""
        guide = torch.cat([z**2, z], 1)
        own = (guide * self.routes.way[node]).sum(1) + self.routes.bias[node]
        return (self.routes.best(guide)[1] - own).clamp_min(0)

    def _aim(self) -> None:
        """The gap at which the recall is the wanted one, and a standard error more."""
        error = (self.recall * (1 - self.recall) / len(self.gaps)) ** 0.5
        self.gap = float(self.gaps.double().quantile(min(1.0, self.recall + error)))
