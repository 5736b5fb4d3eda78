"""The step: averaged stochastic Newton steps on the facet graph, damped by the margins; docs/math.md (14), (16).

Pure functions from state to state, so that a stop at any moment leaves the last whole state behind. On a grid every
process has the vectors of its own atoms, those of one target row the same ones; its pairs are its own.
Legend: n atoms, B samples of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distot import entropic, graph
from distot.assign import Winners
from distot.grid import Axis, Grid, Split

RATE = 0.5  # share of the Newton step that is taken first
DECAY = 0.5  # steps shrink like (1 + t)^-DECAY
SMOOTHING = 0.7  # first temperature, in tau; it falls like (1 + t)^-⅓ and then, so that no bias stays, like 1 / t
SMOOTHING_TURN = 200.0  # t of that turn
AVERAGING = 2.5  # the average of iterates has weights ~ t^1.5: mix 2.5 / (t + 2.5)
MEMORY = 0.98  # margins are sums that decay by this factor in a unit of time
PAIRS_LEAST, PAIRS_MOST = 4.0, 16.0  # an atom: pairs of winner and runner-up in the graph, the later half of all kept
PAIRS_A_BATCH = 0.2  # an atom: more of one batch would tie the graph to the noise of the gradient
DAMPING_FIRST, DAMPING_LEAST, DAMPING_MOST = 1.0, 0.05, 4.0  # of the Newton step, times nu_i / tau_i
STRETCH = 0.5  # damping aims at steps that move paired atoms apart by this many margins at most, root mean square
TRUST, NOISE = 1.5, 12.0  # a step failed if the next batch's chi2 exceeds this times the last one, and this many errors
BRAKE, FLOOR = 3.0, 2.0  # then damping grows by BRAKE, and stays above FLOOR times the one that failed, for a while
SMALL = 1 << 15  # atoms, up to which all processes keep all pairs
OUTLIER = 100.0  # atoms whose margins exceed the median atom's by more count no more in the mean
PRIOR = 5.0  # wins that the mean margin is worth beside an atom's own
LEAST_SPREAD = 1e-6  # variance of the logarithms of margins over atoms


@dataclass(frozen=True)
class State:
    """All that a resumed run needs. Vectors are float64, one value for each own atom, in the frame."""

    heights: Tensor
    average: Tensor  # the answer
    margin_sum: Tensor  # decayed sum of margins of the samples that each atom won
    margin_count: Tensor  # decayed number of those samples
    pairs: tuple[Tensor, ...] = ()  # (2, m) int32, winner and runner-up of samples of recent steps, oldest first
    drawn: tuple[int, ...] = ()  # how many pairs there are of these steps in all
    margin: float = 0.0  # tau: the mean margin over all samples, 0 before the first step
    damping: float = DAMPING_FIRST
    floor: float = 0.0  # of the damping, since a step failed
    error: float = 1e30  # chi2 of the heights before the last step, from its batch alone
    step: int = 0
    time: float = 0.0  # t of the formulas: samples of all steps, in first batches
    since: float = 0.0  # t at which the average began
    samples: int = 0  # all search work so far, in plain samples

    @property
    def smoothing(self) -> float:
        """Width of the smoothing between best and runner-up of mean margin in the coming step; 0: hard winners."""
        return SMOOTHING * self.margin * (1 + self.time) ** (-1 / 3) * (1 + self.time / SMOOTHING_TURN) ** (-2 / 3)


def starving(state: State, mass: Tensor, split: Split) -> Tensor:
    """Own atoms that lately won less than a tenth of the samples they should, where those are at least 2."""
    expected = mass * split.axis.sum(state.margin_count.sum())
    return ((expected >= 2) & (state.margin_count < 0.1 * expected)).nonzero()[:, 0]


def mean_margin(margin_sum: Tensor, margin_count: Tensor) -> Tensor:
    """Mean margin, to which an atom contributes at most OUTLIER times the median atom's.

    A single far atom wins its samples by margins of another order of magnitude, and is no measure for the others.
    """
    won = margin_count > 0
    means, counts = margin_sum[won] / margin_count[won], margin_count[won]
    return (counts @ means.clamp(max=OUTLIER * float(means.median()))) / counts.sum()


def begin(heights: Tensor, samples: int, split: Split) -> State:
    """The first state. Heights are shifted to a median of 0, which a far atom does not move, and stay about there."""
    heights = heights - split.gather(heights).median()
    zero = torch.zeros_like(heights)
    return State(heights, heights, zero, zero, samples=samples)


@dataclass(frozen=True)
class Tally:
    """What samples say about each own atom: sums over them, float64; and the pairs (2, m) int32 of some of them."""

    sums: Tensor  # (3, own): smoothed number of samples won, number won, margins of those won
    pairs: Tensor  # winner and runner-up
    samples: int

    def __add__(self, other: Tally) -> Tally:
        pairs = torch.cat([self.pairs, other.pairs], dim=1)
        return Tally(self.sums + other.sums, pairs, self.samples + other.samples)


def count(near: Winners, split: Split, temperature: float | Tensor | None = None, chosen: slice = slice(None)) -> Tally:
    """Tally of B samples whose k winners are known; they share each sample by a softmax, if there is a temperature.

    temperature: one for all, or of each sample (B, 1). chosen: the samples whose pairs are kept.
    """
    best, margin = near.index[:, 0], near.margin
    won = split.add(best, torch.stack([torch.ones_like(margin), margin], dim=1)).T
    soft = won[0]
    if temperature is not None:
        soft = split.add(near.index.flatten(), entropic.shares(near, temperature).flatten())
    return Tally(torch.cat([soft[None], won]), near.index[chosen, :2].T.int(), len(best))


def narrowing(state: State, split: Split) -> Tensor | None:
    """What smoothing is multiplied by at each of all atoms (n,): the root of its margin over tau, by (14).

    None before the first step, when nothing is known of margins.
    """
    if not state.smoothing:
        return None
    sums, counts = split.gather(torch.stack([state.margin_sum, state.margin_count], dim=1)).T
    tau = sums.new_tensor(state.margin)
    return (scales(sums, counts, tau) / tau).sqrt()


def temperature(state: State, narrow: Tensor, near: Winners) -> Tensor:
    """Smoothing of each sample (B, 1), less where the cell of its winner or of its runner-up is narrow."""
    return state.smoothing * narrow[near.index[:, :2]].amin(dim=1, keepdim=True)


def everywhere(split: Split) -> bool:
    """Whether every process keeps all pairs, as it saves more time than it costs memory."""
    return split.n <= SMALL


def update(
    state: State,
    tally: Tally,
    first_batch: int,
    mass: Tensor,
    work: int,
    split: Split,
    grid: Grid,
    epsilon: float = 0.0,
) -> State:
    """One step of (14) with (16) from the tallies of all processes, whose samples cost ``work`` plain samples.

    epsilon: the fixed temperature of the entropic problem, by which facets are wider than the margins say.
    A batch of s first batches is a step of length s: late steps, which are short, may so be taken together.
    The damping follows the steps: more of it where they stretch pairs of neighbours beyond STRETCH margins, where
    the graph, which is a linear picture, is no longer to be trusted; less of it where they do not. A few atoms may
    still go much too far, as a cell that was empty shows no facets: the next batch tells, and the damping jumps.
    """
    n, held = split.n, tally.samples if split.axis.rank == 0 else 0  # a column's samples are counted once
    batch, new = grid.world.sum(torch.tensor([held, tally.pairs.shape[1]], dtype=torch.float64)).tolist()
    span = batch / first_batch
    hits, wins, margins = grid.sample.sum(tally.sums)
    margin_sum = MEMORY**span * state.margin_sum + margins
    margin_count = MEMORY**span * state.margin_count + wins
    every = split.gather(torch.stack([hits, wins, margin_sum, margin_count, mass], dim=1))
    hits, wins, sums, counts, nu = (column.contiguous() for column in every.T)
    tau = mean_margin(sums, counts)
    margin = scales(sums, counts, tau) + epsilon
    fresh, world = tally.pairs, grid.world
    if everywhere(split):
        fresh, world = grid.sample.gather(fresh.T).T, Axis()
        new = fresh.shape[1]
    drawn, pairs = (*state.drawn, int(new)), (*state.pairs, fresh)
    room = int(n * min(max(0.5 * PAIRS_A_BATCH * state.time, PAIRS_LEAST), PAIRS_MOST))
    while sum(drawn) - drawn[0] >= room:
        drawn, pairs = drawn[1:], pairs[1:]

    found = graph.build(torch.cat(pairs, dim=1), margin, world)
    hold = (sums + PRIOR * tau) / (counts + PRIOR) + epsilon  # wider, so that crowded atoms may move together
    newton = found.solve(nu - hits / batch, state.damping * nu / hold)
    step = span * RATE * (1 + state.time) ** -DECAY * (newton - nu @ newton)
    error = float(((wins - 1) * wins / nu).sum()) / (batch * (batch - 1)) - 1
    floor, damping = state.floor * MEMORY**span, state.damping * (found.stretch(step) / STRETCH) ** 0.5
    failed = error > TRUST * max(state.error, 0.0) + NOISE * (2 * n) ** 0.5 / batch
    if failed and not epsilon:  # whose soft masses the wins do not show
        floor, damping = max(floor, min(FLOOR * state.damping, 1.0)), BRAKE * state.damping
    time = state.time + span
    heights = state.heights + split.own(step)
    weight = AVERAGING * span / (time - state.since + AVERAGING * span)
    average = state.average + weight * (heights - state.average)
    return State(
        heights,
        average,
        margin_sum,
        margin_count,
        pairs,
        drawn,
        float(tau),
        min(max(damping, floor, DAMPING_LEAST), DAMPING_MOST),
        floor,
        error,
        state.step + 1,
        time,
        state.since,
        state.samples + work,
    )


def scales(sums: Tensor, counts: Tensor, tau: Tensor) -> Tensor:
    """The margin of each atom (n,), from sums of the margins of its wins and their (decayed) number.

    Margins may differ by orders of magnitude where latents lie unevenly. So the mean of an atom is drawn towards tau on
    a logarithmic scale, by the share of noise in what is seen of its spread over all atoms (empirical Bayes; noise is
    taken for PRIOR / wins, as light atoms are the worse off with too small a margin); an atom without wins has tau.
    """
    won = (counts > 0) & (sums > 0)
    wins, seen = counts[won], (sums[won] / counts[won]).log()
    spread = float((wins @ (seen - (wins @ seen) / wins.sum()).square() - len(wins)) / wins.sum())
    trust = max(spread, LEAST_SPREAD) / (max(spread, LEAST_SPREAD) + PRIOR / wins)
    found = tau.expand_as(sums).clone()
    found[won] = (trust * seen + (1 - trust) * tau.log()).exp()
    return found


def within(state: State, limit: float, mass: Tensor, split: Split) -> State:
    """The state with heights of mean 0 over all mass, and none further from it than the limit of their cost, if any."""
    if math.isinf(limit):
        return state
    mean = split.axis.total(float(mass @ state.heights))
    heights, average = ((its - mean).clamp(-limit, limit) for its in (state.heights, state.average))
    return replace(state, heights=heights, average=average)


def chosen(first: int, batch: int, split: Split) -> slice:
    """Of the samples from number ``first`` of a batch on, those whose pairs this process keeps for the graph."""
    stride = max(1, int(batch / (PAIRS_A_BATCH * split.n)))
    if everywhere(split):
        return slice(-first % stride, None, stride)
    begin = -first % stride + stride * ((split.axis.rank + -first // stride) % split.axis.size)
    return slice(begin, None, stride * split.axis.size)


def lifted(state: State, heights: Tensor, work: int) -> State:
    """The state with other heights, found with ``work`` plain samples."""
    return replace(state, heights=heights, samples=state.samples + work)
