"""The step: averaged stochastic Newton steps on the facet graph, damped by the margins; docs/math.md (14), (16).

Pure functions from state to state, so that a stop at any moment leaves the last whole state behind.
Legend: n atoms, B samples of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distot import entropic, graph
from distot.assign import Winners

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
OUTLIER = 100.0  # atoms whose margins exceed the median atom's by more count no more in the mean
PRIOR = 5.0  # wins of mean margin added to each atom's own
FULL_STEP = 0.2  # expected wins in a batch from which an atom takes the full step; below, one win would move it too far


@dataclass(frozen=True)
class State:
    """All that a resumed run needs. Vectors are float64 (n,), in the frame."""

    heights: Tensor
    average: Tensor  # the answer
    margin_sum: Tensor  # decayed sum of margins of the samples that each atom won
    margin_count: Tensor  # decayed number of those samples
    pairs: Tensor  # (2, m) int32, winner and runner-up of m recent samples
    damping: float = DAMPING_FIRST
    floor: float = 0.0  # of the damping, since a step failed
    error: float = 1e30  # chi2 of the heights before the last step, from its batch alone
    step: int = 0
    time: float = 0.0  # t of the formulas: samples of all steps, in first batches
    samples: int = 0  # all search work so far, in plain samples

    @property
    def margin(self) -> float:
        """tau: the mean margin over all samples, 0 before the first step."""
        return float(mean_margin(self.margin_sum, self.margin_count)) if float(self.margin_count.sum()) else 0.0

    @property
    def smoothing(self) -> float:
        """Width of the smoothing between best and runner-up in the coming step; 0 means hard winners."""
        return SMOOTHING * self.margin * (1 + self.time) ** (-1 / 3) * (1 + self.time / SMOOTHING_TURN) ** (-2 / 3)


def starving(state: State, mass: Tensor) -> Tensor:
    """Indices of atoms that lately won less than a tenth of the samples they should, where those are at least 2."""
    expected = mass * state.margin_count.sum()
    return ((expected >= 2) & (state.margin_count < 0.1 * expected)).nonzero()[:, 0]


def mean_margin(margin_sum: Tensor, margin_count: Tensor) -> Tensor:
    """Mean margin, to which an atom contributes at most OUTLIER times the median atom's.

    A single far atom wins its samples by margins of another order of magnitude, and is no measure for the others.
    """
    won = margin_count > 0
    means, counts = margin_sum[won] / margin_count[won], margin_count[won]
    return (counts @ means.clamp(max=OUTLIER * float(means.median()))) / counts.sum()


def begin(heights: Tensor, samples: int) -> State:
    """The first state. Heights are shifted to a median of 0, which a far atom does not move, and stay about there."""
    heights = heights - heights.median()
    zero = torch.zeros_like(heights)
    pairs = torch.empty(2, 0, dtype=torch.int32, device=heights.device)
    return State(heights, heights, zero, zero, pairs, samples=samples)


@dataclass(frozen=True)
class Tally:
    """What a batch says about each atom: sums over its samples, float64 (n,); and the pairs (2, B) int32."""

    hits: Tensor  # smoothed number of samples won
    wins: Tensor
    margins: Tensor  # summed over the samples won
    pairs: Tensor  # winner and runner-up of each sample

    def __add__(self, other: Tally) -> Tally:
        pairs = torch.cat([self.pairs, other.pairs], dim=1)
        return Tally(self.hits + other.hits, self.wins + other.wins, self.margins + other.margins, pairs)


def count(near: Winners, temperature: float, n: int) -> Tally:
    """Tally of samples whose k winners are known; they share each sample by a softmax, if the temperature is not 0."""
    best, margin = near.index[:, 0], near.margin
    if temperature > 0:
        share = entropic.shares(near, temperature)
    else:
        share = torch.zeros_like(near.score, dtype=torch.float64)
        share[:, 0] = 1.0
    zero = torch.zeros(n, dtype=torch.float64, device=best.device)
    hits = zero.index_add(0, near.index.flatten(), share.flatten())
    wins, margins = zero.index_add(0, best, torch.ones_like(margin)), zero.index_add(0, best, margin)
    return Tally(hits, wins, margins, near.index[:, :2].T.int())


def update(state: State, tally: Tally, first_batch: int, mass: Tensor, work: int, epsilon: float = 0.0) -> State:
    """One step of (14) with (16) from the tally of a batch, which cost ``work`` plain samples.

    epsilon: the fixed temperature of the entropic problem, by which facets are wider than the margins say.
    A batch of s first batches is a step of length s: late steps, which are short, may so be taken together.
    The damping follows the steps: more of it where they stretch pairs of neighbours beyond STRETCH margins, where
    the graph, which is a linear picture, is no longer to be trusted; less of it where they do not. A few atoms may
    still go much too far, as a cell that was empty shows no facets: the next batch tells, and the damping jumps.
    """
    batch = tally.pairs.shape[1]
    span = batch / first_batch
    margin_sum = MEMORY**span * state.margin_sum + tally.margins
    margin_count = MEMORY**span * state.margin_count + tally.wins
    margin = (margin_sum + PRIOR * mean_margin(margin_sum, margin_count)) / (margin_count + PRIOR) + epsilon
    kept = tally.pairs[:, :: max(1, int(batch / (PAIRS_A_BATCH * len(mass))))]
    room = int(len(mass) * min(max(0.5 * PAIRS_A_BATCH * state.time, PAIRS_LEAST), PAIRS_MOST))
    pairs = torch.cat([state.pairs, kept], dim=1)[:, -room:]

    found = graph.build(pairs, margin)
    excess = (tally.hits / batch - mass) * (mass * batch / FULL_STEP).clamp(max=1)
    newton = found.solve(-excess, (state.damping * mass / margin).float()).double()
    step = span * RATE * (1 + state.time) ** -DECAY * (newton - mass @ newton)
    error = float(((tally.wins - 1) * tally.wins / mass).sum()) / (batch * (batch - 1)) - 1
    floor, damping = state.floor * MEMORY**span, state.damping * (found.stretch(step) / STRETCH) ** 0.5
    failed = error > TRUST * max(state.error, 0.0) + NOISE * (2 * len(mass)) ** 0.5 / batch
    if failed and not epsilon:  # whose soft masses the wins do not show
        floor, damping = max(floor, min(FLOOR * state.damping, 1.0)), BRAKE * state.damping
    time = state.time + span
    heights = state.heights + step
    average = state.average + AVERAGING * span / (time + AVERAGING * span) * (heights - state.average)
    return State(
        heights,
        average,
        margin_sum,
        margin_count,
        pairs,
        min(max(damping, floor, DAMPING_LEAST), DAMPING_MOST),
        floor,
        error,
        state.step + 1,
        time,
        state.samples + work,
    )


def lifted(state: State, heights: Tensor, work: int) -> State:
    """The state with other heights, found with ``work`` plain samples."""
    return replace(state, heights=heights, samples=state.samples + work)
