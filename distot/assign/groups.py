"""Atoms grouped by k-means, and what is known of where each group wins: the ground of lists.py and likely.py.

Legend: B samples, n atoms, d dimension, K lists; z are samples and w atoms along the principal axes of the target.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distot._native import search_lists
from distot.assign import Winners
from distot.assign.faiss import split
from distot.assign.native import Native
from distot.atoms import blocks
from distot.errors import InputError

ITERATIONS = 5  # of k-means
PRIOR = 20.0  # wins with the common variance added to each list's own


class Groups:
    """About ``width`` lists of atoms (n, d), which are kept list after list; ``plain`` searches all of them.

    ``scored`` adds up the scores that were computed, in units of n. Raises InputError for atoms on a GPU, or where
    FAISS is not installed.
    """

    def __init__(self, atoms: Tensor, width: int, plain: Native | None) -> None:
        if atoms.device.type != "cpu":
            raise InputError(f"the lists assigner searches on the CPU, the atoms are on {atoms.device}; use 'dense'")
        n = len(atoms)
        self.plain, self.scored = plain or Native(atoms), 0.0
        node = np.zeros(n, dtype=np.int64)
        for clusters in (round(min(n, width) ** 0.5), min(n, width)):
            node = split(atoms.numpy(), node, clusters, ITERATIONS, 0, lambda: None)
        order = torch.from_numpy(node.argsort(kind="stable"))
        self.order, self.names, self.atoms = order, order.int(), atoms[order]
        self.place = torch.empty_like(order).index_copy_(0, order, torch.arange(n))
        self.sizes = torch.from_numpy(np.bincount(node))
        self.starts = torch.nn.functional.pad(self.sizes.cumsum(0), (1, 0))
        centroid = self.sums(self.atoms) / self.sizes[:, None]
        mean = (self.sizes.double() / n) @ centroid
        scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for rows in blocks(n):
            away = atoms[rows].double() - mean
            scatter += away.T @ away
        self.axes = torch.linalg.eigh(scatter).eigenvectors.float()
        self.middle = centroid @ self.axes.double()  # (K, d) float64, centroids as w

    def list_of(self, index: Tensor) -> Tensor:
        """The lists of atoms (B,)."""
        return torch.searchsorted(self.starts, self.place[index], right=True) - 1

    def sums(self, values: Tensor) -> Tensor:
        """Values of atoms (n, ...) summed over each list (K, ...), float64."""
        return torch.from_numpy(np.add.reduceat(values.numpy(), self.starts[:-1].numpy(), axis=0, dtype=np.float64))

    def largest(self, values: Tensor) -> Tensor:
        """The largest of values of atoms (n,) in each list (K,)."""
        return torch.from_numpy(np.maximum.reduceat(values.numpy(), self.starts[:-1].numpy()))

    def everywhere(self, x: Tensor, heights: Tensor, k: int) -> Winners:
        """The winners among all atoms."""
        self.scored += len(x)
        return self.plain(x, heights, k)

    def visit(
        self,
        x: Tensor,
        heights: Tensor,
        routes: Routes,
        guide: Tensor,
        limit: Tensor | None,
        ceiling: Tensor | None = None,
        near: Winners | None = None,
        k: int = 2,
    ) -> Winners:
        """Winners in the lists whose route from sample x is at least ``limit`` and less than ``ceiling`` (B,).

        Without a limit it is the k-th best score that the sample has so far. ``near`` are winners to go on from. A
        sample that met fewer than k atoms has indices beyond n.
        """
        more = near is not None
        if near is None:
            near = Winners(torch.empty(len(x), k, dtype=torch.int64), torch.empty(len(x), k))
        scored = search_lists(
            x[:, None].contiguous(),
            self.atoms[:, None],
            heights.float()[self.order],
            torch.get_num_threads(),
            self.plain.isa,
            near.index,
            near.score,
            more,
            self.starts,
            self.names,
            routes.way,
            routes.bias,
            guide,
            limit,
            ceiling,
        )
        self.scored += scored / len(self.names)
        return near


class Routes:
    """How much a sample with guide g (w,) is drawn to each list: <way_c, g> + bias_c, for way (K, w), bias (K,)."""

    def __init__(self, way: Tensor, bias: Tensor, isa: str) -> None:
        self.way, self.bias, self.isa = way.float(), bias.float(), isa

    def best(self, guide: Tensor) -> tuple[Tensor, Tensor]:
        """The list to which each guide (B, w) is drawn most, and how much."""
        found = Native(self.way, self.isa)(guide, self.bias, 1)
        return found.index[:, 0], found.score[:, 0]


class Won:
    """Moments of the samples that each list has won, and of their winners, along the axes of the target."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        lists, dim = groups.middle.shape
        self.count = torch.zeros(lists, dtype=torch.float64)
        self.sum, self.square = torch.zeros(2, lists, dim, dtype=torch.float64)
        self.cross, self.w = torch.zeros(2, dim, dtype=torch.float64)

    def add(self, z: Tensor, winner: Tensor) -> None:
        """Samples (B, d) and the atoms that won them (B,)."""
        node, w = self.groups.list_of(winner), self.groups.atoms[self.groups.place[winner]] @ self.groups.axes
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

    def centres(self) -> Tensor:
        """Mean sample (K, d) of each list; of one that has won nothing, where the regression puts its centroid."""
        total = self.count.sum()
        guess = self.sum.sum(0) / total + (self.groups.middle - self.w / total) / self.slope()
        return torch.where(self.count[:, None] > 0, self.sum / self.count.clamp_min(1)[:, None], guess)

    def variance(self) -> Tensor:
        """Variance (K, d) of the samples of each list, shrunk towards the common one."""
        mean = self.sum / self.count.clamp_min(1)[:, None]
        within = (self.square - self.sum * mean).clamp_min(0)
        common = within.sum(0) / self.count.sum()
        return (within + PRIOR * common) / (self.count[:, None] + PRIOR)
