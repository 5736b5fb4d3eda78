"""A tree of coarser and coarser targets: nodes are k-means clusters of the atoms, split again into smaller ones.

The start solves the coarsest problem first and refines its heights from level to level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distot.power import Array

BRANCH = 8  # atoms or nodes to a node, on average
LEAST = 12  # nodes of the coarsest level
ITERATIONS = 10  # of k-means


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


def grow(atoms: Tensor, mass: Array, seed: int, poll: Callable[[], None]) -> list[Level]:
    """The levels above atoms (n, d), coarsest first, without empty nodes. ``poll`` may raise to stop.

    Raises InputError if FAISS is not installed.
    """
    if not widths(len(atoms)):
        return []
    from distot.assign.faiss import split

    rows, weight = atoms.cpu().numpy(), torch.as_tensor(mass, device=atoms.device)
    nodes = [np.zeros(len(rows), dtype=np.int64)]  # of each atom, level by level from the root
    for width in widths(len(rows)):
        nodes.append(split(rows, nodes[-1], width, ITERATIONS, seed + 1, poll))
    levels = []
    for node, finer in pairwise([*nodes[1:], np.arange(len(rows))]):
        where = torch.from_numpy(node).to(atoms.device)
        total = _sum(where, weight)
        centre = (_sum(where, weight[:, None] * atoms) / total[:, None]).float()
        parent = np.empty(finer.max() + 1, dtype=np.int64)
        parent[finer] = node
        levels.append(Level(centre, total.cpu().numpy(), torch.from_numpy(parent).to(atoms.device)))
    return levels


def work(n: int) -> int:
    """What ``grow`` costs, in plain samples: one sample is a search among n atoms, math (11)."""
    return sum((BRANCH if level else width) * (ITERATIONS + 1) for level, width in enumerate(widths(n)))


def _sum(node: Tensor, values: Tensor) -> Tensor:
    """Values (n, ...) summed over each node, float64."""
    shape = (int(node.max()) + 1, *values.shape[1:])
    return torch.zeros(shape, dtype=torch.float64, device=node.device).index_add_(0, node, values.double())
