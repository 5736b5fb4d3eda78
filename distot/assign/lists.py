"""Search by lists on the CPU: atoms are grouped by k-means, and a sample visits only lists where its winners may be.

Exact: a list is left out when a bound says that none of its atoms can win. With m_c the centroid of list c and any
point x_c, scale s > 0 and positive matrix B, by Young's inequality the score at x of each atom i of the list is at most

    <x, m_c> + s/2 (x - x_c)' B (x - x_c) + max_i [ h_i + <x_c, y_i - m_c> + (y_i - m_c)' B^-1 (y_i - m_c) / (2 s) ],

one inner product of d + 1 numbers. It is tight near x_c, for which the mean of the samples that the list has won is
taken, if B is about the derivative of the transport map, which a regression of winners on samples gives.

With a wanted recall: the samples that a list has won are described by a Gaussian with independent coordinates along the
axes of the target, and a sample visits the lists whose posterior probability is within a factor of the largest. The
factor follows from samples that are searched exactly, a few in every call. Docs: math.md section 5.

Legend: B samples, n atoms, d dimension, K lists; z are samples and w atoms along the principal axes of the target.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distot._native import search_lists
from distot.assign import Assigner, Winners
from distot.assign.faiss import split
from distot.assign.native import Native
from distot.errors import InputError
from distot.orbit import Orbits, points

EXACT_LISTS, LIKELY_LISTS = 4.0, 1.5  # times the root of n
ITERATIONS = 5  # of k-means
SCALES = 2.0 ** torch.arange(-4, 4)  # tried for s
JUDGES = 256  # samples that choose among them
LEARN, LEARN_A_LIST = 64, 32  # samples that are searched exhaustively first, in all or, with a recall, for each list
PRIOR = 20.0  # wins with the common variance added to each list's own
CHECKED = 128  # one sample in so many is searched exactly to measure the recall
WINDOW = 4096  # of those are remembered
ROUNDING = 4 * 2.0**-24
FIRST = 1e-5  # a sample visits the lists whose bound is this close to the largest first


class Lists:
    """``recall``: share of samples whose winner shall be found; None means all, exactly. ``exact``: to share.

    The first samples are searched by ``Native``; their winners teach where the lists win, and so do later ones.
    """

    name, why = "lists", ""

    def __init__(self, atoms: Tensor, recall: float | None = None, exact: Native | None = None) -> None:
        if atoms.device.type != "cpu":
            raise InputError(f"the lists assigner searches on the CPU, the atoms are on {atoms.device}; use 'dense'")
        n = len(atoms)
        self.recall, self.plain = recall, exact or Native(atoms)
        width = min(n, round((EXACT_LISTS if recall is None else LIKELY_LISTS) * n**0.5))
        node = np.zeros(n, dtype=np.int64)
        for clusters in (round(width**0.5), width):
            node = split(atoms.numpy(), node, clusters, ITERATIONS, 0, lambda: None)
        order = torch.from_numpy(node.argsort(kind="stable"))
        self.order, self.names, self.atoms = order, order.int(), atoms[order]
        self.places = torch.empty_like(order).index_copy_(0, order, torch.arange(n))
        self.sizes = torch.from_numpy(np.bincount(node))
        self.starts = torch.nn.functional.pad(self.sizes.cumsum(0), (1, 0))
        centre = atoms.double().mean(dim=0)
        covariance = torch.cov(atoms.double().T - centre[:, None], correction=0).reshape(atoms.shape[1], -1)
        self.axes = torch.linalg.eigh(covariance).eigenvectors.float()
        self.middle = self._sums(self.atoms @ self.axes) / self.sizes[:, None]  # (K, d) float64, of w
        self.won = _Won(*self.middle.shape)
        self.seen, self.scored = 0, 0.0  # samples; scores computed for them, in scores of exhaustive searches
        self._fitted = 0
        self._sure = (
            torch.empty(0, atoms.shape[1]),
            order[:0],
        )  # samples searched exactly, and the lists of their winners
        self._gaps = torch.empty(0)  # how far those lists were from the likeliest one

    @property
    def exact(self) -> Assigner:
        return self if self.recall is None else self.plain

    @property
    def found(self) -> float | None:
        """The recall measured on the last samples that were searched exactly; None before there were any."""
        return None if self.recall is None or not len(self._gaps) else float((self._gaps <= self._gap).double().mean())

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        if len(x) and self._fitted:
            near = (self._bounded if self.recall is None else self._likely)(points(x), heights, k)
        else:
            near = self.plain(x, heights, k)
            self.scored += len(x)
        z, place = points(x) @ self.axes, self.places[near.index[:, 0]]
        node, learn = self._list_of(place), torch.ones(len(x), dtype=torch.bool)
        if self.recall is not None:  # what was learned is judged by samples that it was not learned from
            learn[self.seen % CHECKED :: CHECKED if self._fitted else 4] = False
            self._judge(points(x)[~learn], z[~learn], None if self._fitted else node[~learn], heights)
        self.won.add(z[learn], self.atoms[place[learn]] @ self.axes, node[learn])
        self.seen += len(z)
        if self.seen >= max(2 * self._fitted, LEARN if self.recall is None else LEARN_A_LIST * len(self.sizes)):
            self._fit(z, near, heights)
            self._fitted = self.seen
        return near

    def _list_of(self, place: Tensor) -> Tensor:
        """The list of atoms, given where they stand in the order of the lists."""
        return torch.searchsorted(self.starts, place, right=True) - 1

    def _sums(self, values: Tensor) -> Tensor:
        """Values (n, ...), in the order of the lists, summed over each list, float64."""
        return torch.from_numpy(np.add.reduceat(values.double().numpy(), self.starts[:-1].numpy(), axis=0))

    def _largest(self, values: Tensor) -> Tensor:
        return torch.from_numpy(np.maximum.reduceat(values.numpy(), self.starts[:-1].numpy()))

    def _visit(
        self,
        x: Tensor,
        h: Tensor,
        bias: Tensor,
        guide: Tensor,
        limit: Tensor | None,
        ceiling: Tensor | None,
        near: Winners,
    ) -> None:
        """Adds to ``near`` what is in lists c with limit <= <way[c], guide> + bias[c] < ceiling; h in their order."""
        scored = search_lists(
            x[:, None].contiguous(),
            self.atoms[:, None],
            h.float(),
            torch.get_num_threads(),
            self.plain.isa,
            near.index,
            near.score,
            ceiling is not None,
            self.starts,
            self.names,
            self.way,
            bias,
            guide,
            limit,
            ceiling,
        )
        self.scored += scored / len(self.names)

    # exact

    def _fit(self, z: Tensor, near: Winners, heights: Tensor) -> None:
        """Learns where lists win from all samples so far."""
        if self.recall is None:
            self._bounds(z[:JUDGES].double(), near.score[:JUDGES, -1].double(), heights.double()[self.order])
        else:
            self._likelihood()
            self._gaps = self._gap_of(*self._sure)
            self._aim()

    def _bounds(self, z: Tensor, score: Tensor, h: Tensor) -> None:
        """Chooses x_c, B and s of the bound; s so that few of the samples z, with this k-th best score, visit."""
        slope, reach = self.won.slope(), self.won.centres(self.middle)
        deviation = (self.atoms @ self.axes).double() - self.middle.repeat_interleave(self.sizes, 0)
        linear = (deviation * reach.repeat_interleave(self.sizes, 0)).sum(1)
        square = 0.5 * (deviation.square() / slope).sum(1)
        away = 0.5 * (z**2 @ slope + (reach**2 @ slope)[:, None]) - (reach * slope) @ z.T
        visits = []
        for s in SCALES.tolist():
            top = self._largest(h + linear + square / s)
            visits.append((self.middle @ z.T + s * away + top[:, None] >= score).sum(1))
        scale = SCALES.double()[torch.stack(visits).argmin(0)]
        self.slope, self.offset = slope, linear + square / scale.repeat_interleave(self.sizes)
        self.bias = 0.5 * scale * (reach**2 @ slope)
        self.way = torch.cat(
            [self.middle - scale[:, None] * slope * reach, scale[:, None], torch.ones_like(scale)[:, None]], 1
        ).float()

    def _bounded(self, x: Tensor, heights: Tensor, k: int) -> Winners:
        h, z = heights.double()[self.order], (x @ self.axes).double()
        bias = self.bias + self._largest(h + self.offset)
        half = 0.5 * (z**2 @ self.slope)
        size = self.way[:, :-2].norm(dim=1).amax() + self.middle.norm(dim=1).amax()
        slack = z.norm(dim=1) * size + bias.abs().amax() + h.abs().amax() + half * self.way[:, -2].amax()
        guide = torch.cat([z, half[:, None], ((z.shape[1] + 4) * ROUNDING * slack)[:, None]], 1).float()
        if not (torch.isfinite(guide).all() and torch.isfinite(bias.float()).all() and torch.isfinite(self.way).all()):
            self.scored += len(x)
            return self.plain(x, heights, k)
        top = Native(self.way, self.plain.isa)(guide, bias, 1)
        order = top.index[:, 0].argsort()  # samples with the same lists stand together
        x, guide, first = x[order], guide[order], top.score[order, 0]
        first -= FIRST * (first.abs() + 1e-30)
        near = Winners(torch.empty(len(x), k, dtype=torch.int64), torch.empty(len(x), k))
        self._visit(x, h, bias.float(), guide, first, None, near)
        self._visit(x, h, bias.float(), guide, None, first, near)
        back = order.argsort()
        return Winners(near.index[back], near.score[back])

    # with a wanted recall

    def _likelihood(self) -> None:
        mean, variance = self.won.centres(self.middle), self.won.variance()
        share = (self.won.count + 0.5 * self.sizes / len(self.names)) / (self.won.count.sum() + 0.5)
        self.way = torch.cat([-0.5 / variance, mean / variance], 1).float()
        self.bias = share.log() - 0.5 * (mean**2 / variance + variance.log()).sum(1)

    def _likely(self, x: Tensor, heights: Tensor, k: int) -> Winners:
        z = x @ self.axes
        guide, bias = torch.cat([z**2, z], 1), self.bias.float()
        near = Winners(torch.empty(len(x), k, dtype=torch.int64), torch.empty(len(x), k))
        top = Native(self.way, self.plain.isa)(guide, bias, 1).score[:, 0]
        self._visit(x, heights.double()[self.order], bias, guide, top - self._gap, None, near)
        few = (near.index[:, -1] >= len(self.names)).nonzero()[:, 0]  # visited fewer than k atoms
        if len(few):
            again = self.plain(x[few], heights, k)
            near.index[few], near.score[few] = again.index, again.score
            self.scored += len(few)
        return near

    def _gap_of(self, z: Tensor, node: Tensor) -> Tensor:
        """How far the log probability of these lists (B,) is below that of the likeliest."""
        guide = torch.cat([z**2, z], 1)
        own = (guide * self.way[node]).sum(1) + self.bias[node].float()
        return (Native(self.way, self.plain.isa)(guide, self.bias, 1).score[:, 0] - own).clamp_min(0)

    def _judge(self, x: Tensor, z: Tensor, node: Tensor | None, heights: Tensor) -> None:
        """Remembers the lists of exact winners of these samples, if need be found now, and sets the gap by them."""
        if node is None:
            node = self._list_of(self.places[self.plain(x, heights, 1).index[:, 0]])
            self.scored += len(x)
            self._gaps = torch.cat([self._gaps, self._gap_of(z, node)])[-WINDOW:]
            self._aim()
        self._sure = torch.cat([self._sure[0], z])[-WINDOW:], torch.cat([self._sure[1], node])[-WINDOW:]

    def _aim(self) -> None:
        """The gap at which the recall is the wanted one, and a standard error more."""
        assert self.recall is not None
        error = (self.recall * (1 - self.recall) / len(self._gaps)) ** 0.5
        self._gap = float(self._gaps.double().quantile(min(1.0, self.recall + error)))


class _Won:
    """Moments of the samples that each list has won, and of their winners, along the axes of the target."""

    def __init__(self, lists: int, dim: int) -> None:
        self.count = torch.zeros(lists, dtype=torch.float64)
        self.sum, self.square = torch.zeros(2, lists, dim, dtype=torch.float64)
        self.cross, self.w = torch.zeros(2, dim, dtype=torch.float64)

    def add(self, z: Tensor, w: Tensor, node: Tensor) -> None:
        """Samples (B, d), their winners (B, d) and the lists of those (B,)."""
        z = z.double()
        self.count.index_add_(0, node, torch.ones_like(node, dtype=torch.float64))
        self.sum.index_add_(0, node, z)
        self.square.index_add_(0, node, z**2)
        self.cross += (z * w).sum(0)
        self.w += w.double().sum(0)

    def slope(self) -> Tensor:
        """Derivative (d,) of the transport map along each axis, by regression; positive."""
        total, mean = self.count.sum(), self.sum.sum(0) / self.count.sum()
        variance = self.square.sum(0) / total - mean**2
        slope = (self.cross / total - mean * self.w / total) / variance.clamp_min(1e-30)
        largest = float(slope.amax())
        return slope.clamp_min(1e-6 * largest) if largest > 0 else torch.ones_like(slope)

    def centres(self, middle: Tensor) -> Tensor:
        """Mean sample (K, d) of each list; of one that has won nothing, where the regression puts its centroid."""
        total = self.count.sum()
        guess = self.sum.sum(0) / total + (middle - self.w / total) / self.slope()
        return torch.where(self.count[:, None] > 0, self.sum / self.count.clamp_min(1)[:, None], guess)

    def variance(self) -> Tensor:
        """Variance (K, d) of the samples of each list, shrunk towards the common one."""
        mean = self.sum / self.count.clamp_min(1)[:, None]
        within = (self.square - self.sum * mean).clamp_min(0)
        common = within.sum(0) / self.count.sum()
        return (within + PRIOR * common) / (self.count[:, None] + PRIOR)
