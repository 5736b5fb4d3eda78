"""The certificate: how good heights are, from fresh independent samples and an exact search.

Legend: M samples, n atoms. Numbers in brackets are those of docs/math.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distot import entropic
from distot.assign import Assigner, Winners
from distot.entropic import Soft
from distot.power import Array
from distot.problem import Problem
from distot.source import Stream
from distot.target import blocks

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float

    def lower(self, level: float = LEVEL) -> float:
        """One-sided lower confidence limit."""
        return self.value - NormalDist().inv_cdf(level) * self.error


@dataclass(frozen=True)
class Certificate:
    """Quality of heights, each figure with its standard error. Costs are E|x - y|², in squared user units.

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def chi2(counts: Array, mass: Array) -> Estimate:
    """Unbiased chi2 (8) of counts (n,) of independent samples, with its standard error.

    The estimator is a U-statistic with kernel 1[i(x) = i(y)] / nu_i - 1, so its variance is
    (4 (M - 2) z1 + 2 z2) / (M (M - 1)) with z1 = Var(p_i / nu_i) and z2 = Var(kernel), both estimated by factorial
    moments of the counts. z2 is taken no smaller than n - 1, its value at the solution.

    Raises ValueError for fewer than two samples.
    """
    m = float(counts.sum())
    if m < 2:
        raise ValueError(f"chi2 needs at least two samples, not {m:.0f}")
    pairs = float((counts * (counts - 1) / mass).sum()) / (m * (m - 1))  # sum p² / nu
    triples = float((counts * (counts - 1) * (counts - 2) / mass**2).sum()) / max(m * (m - 1) * (m - 2), 1.0)
    squares = float((counts * (counts - 1) / mass**2).sum()) / (m * (m - 1))  # sum p² / nu²
    z1 = max(triples - pairs**2, 0.0)
    z2 = max(squares - pairs**2, len(mass) - 1.0)
    return Estimate(pairs - 1.0, float(np.sqrt((4 * (m - 2) * z1 + 2 * z2) / (m * (m - 1)))))


def chi2_upper(found: Estimate, level: float = LEVEL) -> float:
    """One-sided upper confidence limit of chi2.

    The estimate and its error rise and fall together, so value + z error falls short of the truth too often; the
    second-order term of the limit on the logarithmic scale, value exp(z error / value), mends that.
    """
    reach = NormalDist().inv_cdf(level) * found.error
    return found.value + reach + reach**2 / (2 * max(found.value, found.error))


def cell_counts(
    problem: Problem,
    assigner: Assigner,
    heights: Tensor,
    samples: int,
    stream: Stream,
    step: int,
    poll: Callable[[], None],
    each: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Array:
    """Counts (n,) of ``samples`` fresh independent samples; ``each`` gets (x in user units, winner, score) by block."""
    counts = torch.zeros(problem.target.n, dtype=torch.int64, device=heights.device)
    for key, size in problem.keys(stream, step, samples):
        poll()
        x = problem.source.draw(key, size)
        near = assigner(problem.frame.source_in(x).to(heights.device), heights, k=1)
        counts += torch.bincount(near.index[:, 0], minlength=problem.target.n)
        if each is not None:
            each(x, near.index[:, 0], near.score[:, 0])
    return counts.cpu().numpy().astype(np.float64)


def mass_error(
    problem: Problem,
    assigner: Assigner,
    heights: Tensor,
    soft: Soft | None,
    samples: int,
    stream: Stream,
    step: int,
    poll: Callable[[], None],
) -> Estimate:
    """chi2 of the heights from ``samples`` fresh independent samples."""
    if soft is None:
        return chi2(cell_counts(problem, assigner, heights, samples, stream, step, poll), problem.target.mass)
    found = entropic.cell_masses(problem, assigner, heights, soft, samples, stream, step, poll)
    return Estimate(*entropic.chi2(*found, samples, problem.target.mass))


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

    ``step`` names an independent set of samples. The assigner must be exact: an inexact search overstates (9); so
    would a log-sum-exp over k winners alone, which is why that of a soft certificate runs over all atoms.
    """
    target, frame = problem.target, problem.frame
    wanted = default_samples(target.n) if samples is None else samples
    shift = torch.from_numpy(frame.source_centre - frame.target_centre)
    half_weight = _half_weights(problem, heights)
    wanted_weight = float(target.mass @ half_weight)
    bound, cost = Running(), Running()

    if soft is not None:
        return _soft(problem, assigner, heights, wanted, soft, step, level, poll, shift, half_weight)

    def each(x: Tensor, winner: Tensor, score: Tensor) -> None:
        away = x - torch.from_numpy(frame.source_centre)
        bound.add(0.5 * away.square().sum(1) + away @ shift - frame.unit * score.double().cpu())
        y = frame.target_out(target.atoms[winner]).cpu()
        cost.add(0.5 * (away - y + shift).square().sum(1))

    counts = cell_counts(problem, assigner, heights, wanted, Stream.CERTIFY, step, poll, each)
    masses = chi2(counts, target.mass)
    won = float(counts @ half_weight) / wanted
    spread = float(counts @ (half_weight - won) ** 2) / max(wanted - 1, 1)
    w2, w2_error = 2 * (bound.mean + wanted_weight), 2 * bound.error
    return Certificate(
        samples=wanted,
        atoms=target.n,
        chi2=masses.value,
        chi2_error=masses.error,
        chi2_upper=chi2_upper(masses, level),
        empty=int((counts == 0).sum()),
        empty_by_chance=float(np.exp(wanted * np.log1p(-target.mass)).sum()),
        w2_squared_bound=w2,
        w2_squared_bound_error=w2_error,
        w2_squared_limit=Estimate(w2, w2_error).lower(level),
        map_cost=2 * cost.mean,
        map_cost_error=2 * cost.error,
        mismatch=2 * (wanted_weight - won),
        mismatch_error=2 * float(np.sqrt(spread / wanted)),
        level=level,
        seed=problem.seed,
        stream_step=step,
    )


def _soft(
    problem: Problem,
    assigner: Assigner,
    heights: Tensor,
    wanted: int,
    soft: Soft,
    step: int,
    level: float,
    poll: Callable[[], None],
    shift: Tensor,
    half_weight: Array,
) -> Certificate:
    """The certificate of the entropic plan."""
    target, frame = problem.target, problem.frame
    epsilon = soft.epsilon * frame.unit
    entropy = float(target.mass @ np.log(target.mass))
    wanted_weight = float(target.mass @ half_weight)
    half = torch.from_numpy(half_weight)
    bound, cost, won, plan, left = Running(), Running(), Running(), Running(), Running()

    def each(x: Tensor, near: Winners, p: Tensor) -> None:
        inside = frame.source_in(x).to(heights.device)
        full = entropic.potential(target.atoms, inside, heights, soft.epsilon)
        away = x - torch.from_numpy(frame.source_centre)
        bound.add(0.5 * away.square().sum(1) + away @ shift - frame.unit * full.cpu())
        index, share = near.index.cpu(), p.cpu()
        y = frame.target_out(target.atoms[near.index]).cpu()
        cost.add((share * 0.5 * (away[:, None] - y + shift).square().sum(2)).sum(1))
        won.add((share * half[index]).sum(1))
        plan.add(torch.special.xlogy(share, share).sum(1))
        left.add(1 - ((near.score.double() - full[:, None]) / soft.epsilon).exp().sum(1).cpu())

    total, squares = entropic.cell_masses(problem, assigner, heights, soft, wanted, Stream.CERTIFY, step, poll, each)
    masses = Estimate(*entropic.chi2(total, squares, wanted, target.mass))
    w2, w2_error = 2 * (bound.mean + wanted_weight - epsilon * entropy), 2 * bound.error
    return Certificate(
        samples=wanted,
        atoms=target.n,
        chi2=masses.value,
        chi2_error=masses.error,
        chi2_upper=chi2_upper(masses, level),
        empty=0,
        empty_by_chance=0.0,
        w2_squared_bound=w2,
        w2_squared_bound_error=w2_error,
        w2_squared_limit=Estimate(w2, w2_error).lower(level),
        map_cost=2 * cost.mean,
        map_cost_error=2 * cost.error,
        mismatch=2 * (wanted_weight - won.mean),
        mismatch_error=2 * won.error,
        level=level,
        seed=problem.seed,
        stream_step=step,
        epsilon=epsilon,
        regularisation=2 * epsilon * (plan.mean - entropy),
        truncation=max(left.mean, 0.0),
    )


def _half_weights(problem: Problem, heights: Tensor) -> Array:
    """½ w_i = ½|y_i - source_centre|² + h_i (n,), math (6), with h measured against centred samples."""
    target, frame = problem.target, problem.frame
    shift = torch.from_numpy(frame.source_centre - frame.target_centre)
    out = frame.unit * heights.double().cpu().numpy()
    for rows in blocks(target.n):
        away = frame.target_out(target.atoms[rows]).cpu() - shift
        out[rows] += 0.5 * away.square().sum(1).numpy()
    return out


class Running:
    """Mean and standard error of a stream of values, merged block by block without cancellation."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        n, mean = len(values), float(values.mean())
        apart = mean - self.mean
        total = self.count + n
        self.squares += float((values - mean).square().sum()) + apart**2 * self.count * n / total
        self.mean += apart * n / total
        self.count = total

    @property
    def error(self) -> float:
        return float(np.sqrt(self.squares / max(self.count - 1, 1) / max(self.count, 1)))
