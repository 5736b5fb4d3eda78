"""What samples say about each power cell: its mass, its centre, what its transport costs, and how clear its wins are.

Legend: B samples, N latents, n atoms, d dimension. Numbers in brackets are those of docs/math.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.assign import Assigner, searches
from distot.certify import PICKED, bites
from distot.masses import Masses
from distot.orbit import points
from distot.power import Array
from distot.problem import Problem
from distot.source import Stream
from distot.store import Checkpoint, Part

VECTORS = ("total", "squares", "centre", "cost", "margin")


@dataclass(frozen=True)
class Sums:
    """Sums over the samples that own atoms have won: in the frame where not said otherwise.

    total, squares: (own,) of c_is and c_is² over orbits s, as in ``Masses``. centre: (own, d) float32 of x.
    cost: (own,) of |x - y|² in user units, or of -log<x, y>. margin: (own,) of best score less second best.
    """

    samples: int
    orbits: int
    total: Array
    squares: Array
    centre: NDArray[np.float32]
    cost: Array
    margin: Array

    def part(self, problem: Problem) -> Part:
        """What this process writes into a run folder."""
        split, grid = problem.target.split, problem.grid
        if grid.sample.rank:
            return Part(0, 0, {})
        return Part(split.first, split.count, {name: getattr(self, name) for name in VECTORS})

    @classmethod
    def stored(cls, saved: Checkpoint, problem: Problem) -> Sums:
        """The inverse of ``part``, on any grid."""
        split = problem.target.split
        own = slice(split.first, split.first + split.count)
        arrays = {name: saved.read(name, own) for name in VECTORS}
        return cls(saved.scalars["samples"], saved.scalars["orbits"], **arrays)


@dataclass(frozen=True)
class Cells:
    """Statistics of the power cells from fresh samples, in user units, by latent.

    A cell that won no sample has NaN for centre, cost and margin, and so has a latent of zero mass. Equal latents have
    one cell: its mass is divided among them as their wanted masses are, all else is the same for each.
    """

    samples: int
    mass: Array  # (N,)
    mass_error: Array  # (N,) standard error; 0 where a cell won nothing
    wanted: Array  # (N,) nu_i
    centre: NDArray[np.float32]  # (N, d): E[x | x in W_i]
    cost: Array  # (N,): E[|x - y_i|² | x in W_i], or E[-log<x, y_i> | x in W_i] at the cost "log"
    margin: Array  # (N,): E[best score - second best | x in W_i]


def measure(
    problem: Problem,
    assigner: Assigner,
    heights: Tensor,
    samples: int,
    step: int = 0,
    poll: Callable[[], None] = lambda: None,
) -> Sums:
    """Sums over at least ``samples`` fresh samples for heights (own,) in the frame, by an exact search.

    ``step`` names an independent set of samples. On a grid every process has those of its own atoms.
    """
    target, frame, grid, orbit = problem.target, problem.frame, problem.grid, problem.orbit
    split, d, wanted = target.split, target.dim, max(samples, 2 * orbit.size)
    masses = Masses(split, orbit.size, wanted)
    centre = torch.zeros(split.count, d, dtype=torch.float32, device=heights.device)
    cost, margin = (torch.zeros(split.count, dtype=torch.float64, device=heights.device) for _ in range(2))
    for group in searches(problem, assigner.exact, Stream.CELLS, step, wanted, heights, 2, poll):
        for some in bites(group, PICKED // d):
            mine = [_own(problem, x, near.index[:, 0]) for _, x, near in some]
            latents_of = target.atoms.some(torch.cat([place for *_, place in mine]))
            for (first, _, near), (kept, x, place) in zip(some, mine, strict=True):
                masses.add(first, near.index[:, :1], torch.ones_like(near.score[:, :1], dtype=torch.float64))
                lead = (near.score[kept, 0].double() - near.score[kept, 1].double()).clamp_min(0.0)
                paid = problem.cost.times * problem.cost.between(frame, x, frame.target_out(latents_of(place)))
                centre.index_add_(0, place, x)
                cost.index_add_(0, place, paid)
                margin.index_add_(0, place, lead)
    masses.sum(grid.sample)
    centre, cost, margin = (grid.sample.sum(values) for values in (centre, cost, margin))
    drawn = problem.draws(wanted)
    return Sums(
        drawn * orbit.size,
        drawn,
        masses.total,
        masses.squares,
        centre.cpu().numpy(),
        cost.cpu().numpy(),
        margin.cpu().numpy(),
    )


def _own(problem: Problem, x: object, winner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which samples of a portion own atoms have won, these samples (b, d), and by which atoms (b,)."""
    split = problem.target.split
    place = split.place(winner)
    kept = torch.nonzero(place < split.count)[:, 0]
    return kept, points(x)[kept], place[kept]  # type: ignore[arg-type]


def centres(problem: Problem, sums: Sums) -> tuple[Tensor, Tensor]:
    """Centres of own cells (own, d) in the frame, float32, and whether they are known: the cell has won a sample."""
    device = problem.target.atoms.device
    total = torch.from_numpy(sums.total).to(device)
    mean = torch.from_numpy(sums.centre).to(device) / total.clamp_min(1.0).float()[:, None]
    return mean, total > 0


def by_latent(problem: Problem, sums: Sums, mass: Array | None) -> Cells:
    """The statistics of all latents. mass: (N,) as it was wanted, of any sum; None: equal ones. For one process."""
    target, frame = problem.target, problem.frame
    nu = np.full(target.latents, 1.0 / target.latents) if mass is None else np.asarray(mass, dtype=np.float64)
    nu = nu / nu.sum()
    atom, there = np.maximum(target.atom_of, 0), target.atom_of >= 0
    share = np.where(there, nu / target.mass[atom], 0.0)
    m = float(sums.samples)
    error = np.sqrt(np.maximum(sums.squares - sums.total**2 / sums.orbits, 0.0)) / m
    count = np.where(there & (sums.total[atom] > 0), sums.total[atom], np.nan)
    centre = frame.source_centre + frame.source_scale * (sums.centre[atom] / count[:, None])
    return Cells(
        sums.samples,
        share * sums.total[atom] / m,
        share * error[atom],
        nu,
        centre.astype(np.float32),
        sums.cost[atom] / count,
        frame.unit * sums.margin[atom] / count,
    )
