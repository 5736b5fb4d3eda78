"""A tree of coarser and coarser targets: k-means centroids of the atoms, then of those centroids, and so on.

The start solves the coarsest problem first and refines its heights from level to level.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distot.power import Array

BRANCH = 8  # atoms to a node, on average
LEAST = 12  # nodes of the coarsest level
ITERATIONS = 10


@dataclass(frozen=True)
class Level:
    """Nodes that stand for the atoms of the next finer level."""

    atoms: Tensor  # (K, d) float32 centroids, in the frame
    mass: Array  # (K,)
    node: Tensor  # (finer,) int64, the node of each finer atom


def widths(n: int) -> list[int]:
    """Nodes wanted on each level for n atoms, coarsest first."""
    found = []
    while (n := n // BRANCH) >= LEAST:
        found.append(n)
    return found[::-1]


def grow(atoms: Tensor, mass: Array, seed: int) -> list[Level]:
    """The levels above atoms (n, d), coarsest first, without empty nodes.

    Raises InputError if FAISS is not installed.
    """
    if not (wanted := widths(len(atoms))):
        return []
    from distot.assign.faiss import kmeans

    levels: list[Level] = []
    for width in wanted[::-1]:
        node = torch.unique(kmeans(atoms, width, ITERATIONS, seed + 1), return_inverse=True)[1].to(atoms.device)
        weight = torch.as_tensor(mass, device=atoms.device)
        total = _sum(node, weight)
        atoms = (_sum(node, weight[:, None] * atoms) / total[:, None]).float()
        mass = total.cpu().numpy()
        levels.append(Level(atoms, mass, node))
    return levels[::-1]


def work(n: int) -> int:
    """What ``grow`` costs, in plain samples: one sample is a search among n atoms, math (11)."""
    return round(sum(fine * coarse * (ITERATIONS + 1) / n for fine, coarse in _pairs(n)))


def _pairs(n: int) -> Iterator[tuple[int, int]]:
    for width in widths(n)[::-1]:
        yield n, width
        n = width


def _sum(node: Tensor, values: Tensor) -> Tensor:
    """Values (n, ...) summed over each node, float64."""
    shape = (int(node.max()) + 1, *values.shape[1:])
    return torch.zeros(shape, dtype=torch.float64, device=node.device).index_add_(0, node, values.double())
