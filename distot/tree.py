"""A k-means tree of the atoms: the nodes on which the solver also steps, math (16).

Its levels are clusterings of 8, 32, 128, ... nodes of at least LEAF atoms on average, each trained on its own. Atoms of
a cluster must rise and fall together to move mass between clusters; single steps (14) alone take very long to do that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distot.power import Array

FIRST, BRANCH, LEAF, MOST = 8, 4, 8, 8192
ITERATIONS = 10


@dataclass(frozen=True)
class Level:
    """One clustering: the node of each atom, and the mass each node should get."""

    node: Tensor  # (n,) int64
    mass: Tensor  # (nodes,) float64

    def sum(self, values: Tensor) -> Tensor:
        """Values of atoms (n,) summed over each node (nodes,)."""
        return torch.zeros_like(self.mass).index_add_(0, self.node, values)


def widths(n: int) -> list[int]:
    """Nodes wanted on each level for n atoms; none for fewer than FIRST * LEAF."""
    found, width = [], FIRST
    while width * LEAF <= n and width <= MOST:
        found.append(width)
        width *= BRANCH
    return found


def grow(atoms: Tensor, seed: int) -> list[Tensor]:
    """Trains the tree: for each level the node of each atom (n,) int64, without empty nodes.

    Raises InputError if FAISS is not installed.
    """
    if not (wanted := widths(len(atoms))):
        return []
    from distot.assign.faiss import kmeans

    labels = (kmeans(atoms, width, ITERATIONS, seed + 1) for width in wanted)
    return [torch.unique(node, return_inverse=True)[1] for node in labels]


def work(n: int) -> int:
    """What ``grow`` costs, in plain samples: one sample is a search among n atoms, math (11)."""
    return round(sum(width * (min(n, 256 * width) * ITERATIONS + n) / n for width in widths(n)))


def levels(nodes: list[Tensor], mass: Array, device: torch.device) -> list[Level]:
    """Levels with their wanted masses, from the nodes that ``grow`` found."""
    found = []
    for node in nodes:
        node = node.to(device)
        weight = torch.zeros(int(node.max()) + 1, dtype=torch.float64, device=device)
        found.append(Level(node, weight.index_add_(0, node, torch.as_tensor(mass, device=device))))
    return found
