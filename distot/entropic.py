"""Soft winners at a fixed temperature epsilon: shares of a sample, and the exact log-sum-exp.

Legend: B samples, n atoms, k winners kept. Scores and epsilon are in the frame unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distot.assign import Winners
from distot.assign.native import logsumexp
from distot.problem import Problem

TILE_BYTES = 32 << 20  # scores held at once for an exact log-sum-exp


@dataclass(frozen=True)
class Soft:
    """The regularised problem: temperature in the frame's unit of score, and how many winners a search returns."""

    epsilon: float
    top_k: int


def shares(near: Winners, epsilon: float | Tensor) -> Tensor:
    """Softmax of the k best scores over epsilon, (B, k) float64: the entropic plan given x, cut at k winners.

    epsilon: one for all, or of each sample (B, 1).
    """
    return torch.softmax(near.score.double() / epsilon, dim=1)


def potential(problem: Problem, x: Tensor, heights: Tensor, epsilon: float) -> Tensor:
    """epsilon log sum_i exp((<x, y_i> + h_i) / epsilon) over all n atoms, (B,) float64; heights: of own ones."""
    axis = problem.grid.target
    own = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=heights.device)
    for first, tile in problem.target.atoms.tiles():
        its = _potential(tile, x, heights[first : first + len(tile)], epsilon)
        own = its if first == 0 else epsilon * torch.logaddexp(own / epsilon, its / epsilon)
    if axis.size == 1:
        return own
    most = axis.max(own)
    return most + epsilon * axis.sum(((own - most) / epsilon).exp()).log()


def _potential(atoms: Tensor, x: Tensor, heights: Tensor, epsilon: float) -> Tensor:
    """The same over these atoms; on a GPU by tiles."""
    if atoms.device.type == "cpu":
        return logsumexp(atoms, x, heights, epsilon)
    width = max(1, TILE_BYTES // (8 * max(len(x), 1)))
    total = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    for a in range(0, len(atoms), width):
        score = torch.addmm(heights[a : a + width].float(), x, atoms[a : a + width].T).double()
        total = torch.logaddexp(total, (score / epsilon).logsumexp(dim=1))
    return epsilon * total
