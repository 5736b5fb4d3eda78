"""Soft winners at a fixed temperature epsilon: shares of a sample, exact log-sum-exp, masses and their error.

Legend: B samples, n atoms, k winners kept, M samples in all. Scores and epsilon are in the frame unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distot.assign import Assigner, Winners
from distot.power import Array
from distot.problem import Problem
from distot.source import Stream

TILE_BYTES = 32 << 20  # scores held at once for an exact log-sum-exp


@dataclass(frozen=True)
class Soft:
    """The regularised problem: temperature in the frame's unit of score, and how many winners a search returns."""

    epsilon: float
    top_k: int


def shares(near: Winners, epsilon: float) -> Tensor:
    """Softmax of the k best scores over epsilon, (B, k) float64: the entropic plan given x, cut at k winners."""
    return torch.softmax(near.score.double() / epsilon, dim=1)


def potential(atoms: Tensor, x: Tensor, heights: Tensor, epsilon: float) -> Tensor:
    """epsilon log sum_i exp((<x, y_i> + h_i) / epsilon) over all n atoms, (B,) float64, by tiles."""
    width = max(1, TILE_BYTES // (8 * max(len(x), 1)))
    total = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    for a in range(0, len(atoms), width):
        score = torch.addmm(heights[a : a + width].float(), x, atoms[a : a + width].T).double()
        total = torch.logaddexp(total, (score / epsilon).logsumexp(dim=1))
    return epsilon * total


def cell_masses(
    problem: Problem,
    assigner: Assigner,
    heights: Tensor,
    soft: Soft,
    samples: int,
    stream: Stream,
    step: int,
    poll: Callable[[], None],
    each: Callable[[Tensor, Winners, Tensor], None] | None = None,
) -> tuple[Array, Array]:
    """Sums (n,) of the shares, and of their squares, over ``samples`` independent samples.

    ``each`` gets (x in user units, winners, shares) by block.
    """
    total = torch.zeros(problem.target.n, dtype=torch.float64, device=heights.device)
    squares = torch.zeros_like(total)
    for key, size in problem.keys(stream, step, samples):
        poll()
        x = problem.source.draw(key, size)
        near = assigner(problem.frame.source_in(x).to(heights.device), heights, k=soft.top_k)
        p = shares(near, soft.epsilon)
        total.index_add_(0, near.index.flatten(), p.flatten())
        squares.index_add_(0, near.index.flatten(), p.square().flatten())
        if each is not None:
            each(x, near, p)
    return total.cpu().numpy(), squares.cpu().numpy()


def chi2(total: Array, squares: Array, samples: int, mass: Array) -> tuple[float, float]:
    """Unbiased chi2 (8) of soft masses, from pairs of different samples, and a bound on its standard error.

    The kernel sum_i p_i(x) p_i(x') / nu_i - 1 varies no more than that of hard winners, n - 1 at the solution; its
    projection sum_i r_i p_i(x), r_i the relative error of mass i, no more than sum_i r_i² E p_i by Jensen.
    """
    pairs = float(((total**2 - squares) / mass).sum()) / (samples * (samples - 1.0))
    mean = total / samples
    z1, z2 = float((mean / mass - 1) ** 2 @ mean), len(mass) - 1.0
    return pairs - 1.0, float(np.sqrt((4 * z1 * (samples - 2) + 2 * z2) / (samples * (samples - 1.0))))
