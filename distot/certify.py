"""The certificate: how good heights are, from fresh independent samples and an exact search.

Legend: M samples, n atoms. Numbers in brackets are those of docs/math.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distot.assign import Assigner, Searched, Winners, searches
from distot.entropic import Soft, potential, shares
from distot.grid import Axis
from distot.masses import LEVEL, Estimate, Masses, upper
from distot.orbit import points
from distot.power import Array
from distot.problem import Problem
from distot.source import Stream

PICKED = 1 << 25  # numbers of winning atoms that are picked out at once


@dataclass(frozen=True)
class Certificate:
    """Quality of heights, each figure with its standard error. Costs are E|x - y|², in squared user units.

    At the cost "log" they are E[-log<x, y>] instead, and so is the bound, whatever its name says: it is one on the
    least such cost of any plan. ``unseen`` are samples that see no atom within a right angle: there it is infinite.

    chi2: squared relative error of the cell masses, math (8); unbiased, so it may be slightly negative.
    empty: atoms that won none of the samples; empty_by_chance: how many would at the exact solution.
    w2_squared_bound: lower bound on W2², math (9), and its one-sided limit at ``level``: with that confidence the true
    W2² is above it, whatever the heights. map_cost + mismatch = the bound, math (10).

    At a fixed epsilon all of this is about the entropic plan: masses are those of soft winners, the bound is one on
    twice the entropic cost, and map_cost + mismatch + regularisation = the bound; empty is not counted. ``truncation``
    is the mean share of a sample that its k winners leave out; what it takes from the masses is not in chi2.
    """

    samples: int
    atoms: int
    chi2: float
    chi2_error: float
    chi2_upper: float
    empty: int
    empty_by_chance: float
    w2_squared_bound: float
    w2_squared_bound_error: float
    w2_squared_limit: float
    map_cost: float
    map_cost_error: float
    mismatch: float
    mismatch_error: float
    level: float
    seed: int
    stream_step: int
    epsilon: float | None = None  # in units of cost
    regularisation: float = 0.0
    truncation: float = 0.0
    cost: str = "quadratic"
    unseen: int = 0

    @property
    def bound(self) -> float:
        """Lower bound on the least cost, in the units of ``map_cost``: ``w2_squared_bound``."""
        return self.w2_squared_bound

    @property
    def bound_error(self) -> float:
        return self.w2_squared_bound_error

    @property
    def limit(self) -> float:
        """One-sided limit of ``bound``: ``w2_squared_limit``."""
        return self.w2_squared_limit

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cell_masses(
    problem: Problem,
    assigner: Assigner,
    heights: Tensor,
    soft: Soft | None,
    samples: int,
    stream: Stream,
    step: int,
    poll: Callable[[], None],
    each: Callable[[Tensor, Winners, Tensor], None] | None = None,
    ahead: Callable[[Tensor], None] | None = None,
) -> Masses:
    """Masses of the cells, hard or soft, from at least ``samples`` fresh samples, whole orbits.

    ``each`` gets (samples (B, d) in the frame, winners, their shares (B, k)) by portion; before that ``ahead`` gets the
    indices of the winners of some portions in a row.
    """
    wanted = max(samples, 2 * problem.orbit.size)
    masses = Masses(problem.target.split, problem.orbit.size, wanted)
    k = 1 if soft is None else soft.top_k
    for group in searches(problem, assigner, stream, step, wanted, heights, k, poll):
        for some in bites(group, PICKED // problem.target.dim):
            if ahead is not None:
                ahead(torch.cat([near.index for *_, near in some]))
            for first, x, near in some:
                share = torch.ones_like(near.score, dtype=torch.float64) if soft is None else shares(near, soft.epsilon)
                masses.add(first, near.index, share)
                if each is not None:
                    each(points(x), near, share)
    masses.sum(problem.grid.sample)
    return masses


def bites(group: list[Searched], winners: int) -> Iterator[list[Searched]]:
    """A list of portions cut into shorter ones, of so many winners at most where that is more than one portion."""
    some: list[Searched] = []
    for portion in group:
        if some and sum(near.index.numel() for *_, near in [*some, portion]) > winners:
            yield some
            some = []
        some.append(portion)
    yield some


def default_samples(n: int) -> int:
    """Samples of a certificate: 10 per atom up to a million, then no fewer than 2 per atom; at least 10,000."""
    return max(10_000, 2 * n, min(10 * n, 1_000_000))


def certify(
    problem: Problem,
    assigner: Assigner,
    heights: Tensor,
    samples: int | None = None,
    *,
    soft: Soft | None = None,
    step: int = 0,
    level: float = LEVEL,
    poll: Callable[[], None] = lambda: None,
) -> Certificate:
    """Certificate of heights (n,) in the frame, from samples of the CERTIFY stream, which nothing else uses.

    ``step`` names an independent set of samples. The search is exact: an inexact one overstates (9); so would a
    log-sum-exp over k winners alone, which is why that of a soft certificate runs over all atoms.
    """
    target, frame, size, grid, price = problem.target, problem.frame, problem.orbit.size, problem.grid, problem.cost
    split, device, times = target.split, heights.device, price.times
    half_weight = _half_weights(problem, heights)
    wanted_weight = split.axis.total(float(target.mass @ half_weight))
    half = torch.from_numpy(half_weight).to(device)
    epsilon = 0.0 if soft is None else soft.epsilon * frame.unit
    entropy = split.axis.total(float(target.mass @ np.log(target.mass)))
    bound, cost, won, plan, left, blind = (Running(size) for _ in range(6))
    latents_of: Callable[[Tensor], Tensor]

    def ahead(index: Tensor) -> None:
        nonlocal latents_of
        latents_of = target.atoms.some(split.place(index).clamp_max(split.count - 1))

    def each(x: Tensor, near: Winners, share: Tensor) -> None:
        best = near.score[:, 0].double() if soft is None else potential(problem, x, heights, soft.epsilon)
        own = split.place(near.index)
        paid = share * torch.where(own < split.count, 1.0, 0.0)  # each winner's by the process that owns it
        own = own.clamp_max(split.count - 1)
        y = frame.target_out(latents_of(own))
        moved = (paid * price.between(frame, x[:, None], y)).sum(1)
        moved, weight = split.axis.sum(torch.stack([moved, (paid * half[own]).sum(1)]))
        seen = best > price.unseen
        # where the cost is infinite any number is a bound; this one has (10) hold
        bound.add(torch.where(seen, price.of_samples(frame, x) - frame.unit * best, moved - weight))
        blind.add(1 - seen.double())
        cost.add(moved)
        won.add(weight)
        plan.add(torch.special.xlogy(share, share).sum(1))
        if soft is not None:
            left.add(1 - ((near.score.double() - best[:, None]) / soft.epsilon).exp().sum(1))

    wanted = default_samples(target.n) if samples is None else samples
    masses = cell_masses(problem, assigner.exact, heights, soft, wanted, Stream.CERTIFY, step, poll, each, ahead)
    for running in (bound, cost, won, plan, left, blind):
        running.sum(grid.sample)
    chi2, m = masses.chi2(target.mass), size * bound.count
    w2, w2_error = times * (bound.mean + wanted_weight - epsilon * entropy), times * bound.error
    return Certificate(
        samples=m,
        atoms=target.n,
        chi2=chi2.value,
        chi2_error=chi2.error,
        chi2_upper=upper(chi2, level),
        empty=int(split.axis.total(int((masses.total == 0).sum()))) if soft is None else 0,
        empty_by_chance=split.axis.total(float(np.exp(m * np.log1p(-target.mass)).sum())) if soft is None else 0.0,
        w2_squared_bound=w2,
        w2_squared_bound_error=w2_error,
        w2_squared_limit=Estimate(w2, w2_error).lower(level),
        map_cost=times * cost.mean,
        map_cost_error=times * cost.error,
        mismatch=times * (wanted_weight - won.mean),
        mismatch_error=times * won.error,
        level=level,
        seed=problem.seed,
        stream_step=step,
        epsilon=None if soft is None else epsilon,
        regularisation=times * epsilon * (plan.mean - entropy) if soft is not None else 0.0,
        truncation=max(left.mean, 0.0),
        cost=price.name,
        unseen=round(blind.mean * m),
    )


def _half_weights(problem: Problem, heights: Tensor) -> Array:
    """b(y_i) + h_i of own atoms, math (27); that is ½ w_i of math (6), with h measured against centred samples."""
    target, frame = problem.target, problem.frame
    out = frame.unit * heights.double().cpu().numpy()
    for first, tile in target.atoms.tiles():
        out[first : first + len(tile)] += problem.cost.of_atoms(frame, frame.target_out(tile).cpu()).numpy()
    return out


class Running:
    """Mean and standard error of a stream of values, merged block by block without cancellation.

    ``size`` values in a row are those of one orbit, and count as one observation, their mean.
    """

    def __init__(self, size: int = 1) -> None:
        self.size, self.count, self.mean, self.squares = size, 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        if len(values):
            values = values.unflatten(0, (-1, self.size)).mean(dim=1)
            mean = float(values.mean())
            self._merge(len(values), mean, float((values - mean).square().sum()))

    def sum(self, axis: Axis) -> None:
        """Makes it that of the values of all processes."""
        parts = axis.objects((self.count, self.mean, self.squares))
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        for count, mean, squares in parts:
            if count:
                self._merge(count, mean, squares)

    def _merge(self, n: int, mean: float, squares: float) -> None:
        apart, total = mean - self.mean, self.count + n
        self.squares += squares + apart**2 * self.count * n / total
        self.mean += apart * n / total
        self.count = total

    @property
    def error(self) -> float:
        return float(np.sqrt(self.squares / max(self.count - 1, 1) / max(self.count, 1)))
