"""Where the solver starts: heights of the Gaussian problem (12), then hungry atoms raised at one stroke (13)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distot import assign
from distot.assign import Assigner
from distot.power import Array
from distot.problem import Problem
from distot.source import Stream
from distot.target import blocks

CLAMP = 1e-12  # smallest eigenvalue of S0^½ S S0^½, relative to the largest
SAMPLES_PER_ATOM = 2
MOST_WANTED = 32  # an atom of large mass is raised to at most this many of the samples
CHUNK_BYTES = 128 << 20  # samples that are held at once for the reverse search


def gaussian_heights(problem: Problem) -> Array:
    """Heights (n,) in the frame of the optimal map between Gaussians with the moments of source and target.

    math (12), with B^-1 = R (R S R)^-½ R and R = S0^½. Costs two eigendecompositions (d, d) and n d² flops.
    """
    target = problem.target
    mean, cov = target.moments()
    values, vectors = np.linalg.eigh(problem.source_cov / problem.frame.source_scale**2)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    spectrum, axes = np.linalg.eigh(root @ cov @ root)
    largest = float(spectrum[-1])
    if largest <= 0:
        return np.zeros(target.n)
    whiten = root @ axes * np.maximum(spectrum, CLAMP * largest) ** -0.25  # |(y - m) whiten|² = (y - m) B^-1 (y - m)
    heights = np.empty(target.n)
    for rows in blocks(target.n):
        y = target.atoms[rows].double().cpu().numpy() - mean
        heights[rows] = -0.5 * ((y @ whiten) ** 2).sum(axis=1)
    return heights - float(np.median(heights))


def reverse_raise(
    problem: Problem, assigner: Assigner, heights: Array, samples: int, poll: Callable[[], None]
) -> tuple[Array, int]:
    """Lifts hungry atoms to the height at which each, the others held still, catches its mass; math (13).

    Hungry is an atom that wins at most half of the q_i = nu_i M samples it should, q_i rounded and not 0. An atom that
    should win more than MOST_WANTED is raised to that many only. Heights only rise. Returns heights and the work in
    samples: M for the search, and M times the share of hungry atoms for the search with swapped roles.
    ``poll`` is called between blocks and may raise to stop.
    """
    target, device = problem.target, problem.target.atoms.device
    keys = list(problem.keys(Stream.START, 0, samples))
    potential = torch.empty(samples, device=device)
    hits = torch.zeros(target.n, dtype=torch.float64, device=device)
    h = torch.as_tensor(heights, device=device)
    done = 0
    for key, size in keys:
        poll()
        near = assigner(problem.draw(key, size), h, k=1)
        potential[done : done + size] = near.score[:, 0]
        hits += torch.bincount(near.index[:, 0], minlength=target.n)
        done += size

    expected = np.rint(target.mass * samples)
    wanted = np.clip(expected, 1, min(MOST_WANTED, samples)).astype(np.int64)
    hungry = np.flatnonzero((hits.cpu().numpy() <= 0.5 * expected) & (expected > 0))
    raised = heights.copy()
    per_chunk = max(1, CHUNK_BYTES // (4 * target.dim * keys[0][1]))
    for group in (hungry[wanted[hungry] <= 2], hungry[wanted[hungry] > 2]):
        if len(group):
            q = torch.as_tensor(wanted[group], device=device)
            scores = torch.full((len(group), int(q.max())), -torch.inf, device=device)  # best found, descending
            for first in range(0, len(keys), per_chunk):
                chunk = keys[first : first + per_chunk]
                x = torch.cat([problem.draw(key, size) for key, size in chunk])
                start = sum(size for _, size in keys[:first])
                scores = _merge(x, -potential[start : start + len(x)], target.atoms, group, scores, poll)
            level = -scores.gather(1, q[:, None] - 1)[:, 0].double().cpu().numpy()
            raised[group] = np.maximum(heights[group], level)
    return raised, samples + round(samples * len(hungry) / target.n)


def lift(problem: Problem, heights: Tensor, hungry: Tensor, x: Tensor, potential: Tensor) -> tuple[Tensor, int]:
    """Brings starving atoms half the way to the height at which each would win one of the samples x (B, d); math (13).

    potential: u_h(x) (B,), known from the search of the step. Half the way, again and again, does not pass
    the height of one win in B, which is too much where B < n. Returns heights and the work in samples.
    """
    reach = assign.build("dense", x)(problem.target.atoms[hungry], -potential, k=1).score[:, 0].double()
    lifted = heights.index_add(0, hungry, 0.5 * (-reach - heights[hungry]).clamp_min(0))
    return lifted, round(len(x) * len(hungry) / problem.target.n)


def _merge(
    x: Tensor, heights: Tensor, atoms: Tensor, group: np.ndarray, scores: Tensor, poll: Callable[[], None]
) -> Tensor:
    """The largest of <x, y_i> - u(x) so far for each atom of the group: a search with atoms and samples swapped."""
    search = assign.build("dense", x)
    k = min(scores.shape[1], len(x))
    parts = []
    for rows in blocks(len(group)):
        poll()
        found = search(atoms[torch.as_tensor(group[rows], device=atoms.device)], heights, k).score
        both = torch.cat([scores[rows], found], dim=1)
        parts.append(both.sort(dim=1, descending=True).values[:, : scores.shape[1]])
    return torch.cat(parts)
