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
from distot.twins import Twins

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
TWIN_DAMPING_MOST = 20.0
COLD = 1e-30  # temperature at which the best twin takes all, and margin where nothing is known of twins

VECTORS = ("heights", "average", "margin_sum", "margin_count")
TWIN_VECTORS = ("twin_sum", "twin_count")  # where there are groups


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
    twin_sum: Tensor | None = None  # as margin_sum, of margins to the next atom of the own group; None without groups
    twin_count: Tensor | None = None  # decayed number of samples in which there was one
    twin_damping: float = DAMPING_FIRST  # of the Newton step within groups

    @property
    def vectors(self) -> dict[str, Tensor]:
        """All values of own atoms, by name."""
        every = {name: getattr(self, name) for name in (*VECTORS, *TWIN_VECTORS)}
        return {name: its for name, its in every.items() if its is not None}

    @property
    def cooling(self) -> float:
        """Width of the smoothing in the coming step, in units of a margin."""
        return SMOOTHING * (1 + self.time) ** (-1 / 3) * (1 + self.time / SMOOTHING_TURN) ** (-2 / 3)

    @property
    def smoothing(self) -> float:
        """Width of the smoothing between best and runner-up of mean margin in the coming step; 0: hard winners."""
        return self.margin * self.cooling


def starving(state: State, mass: Tensor, split: Split, twins: Twins | None = None) -> Tensor:
    """Own atoms that lately won less than a tenth of the samples they should, where those are at least 2.

    Of a group all do or none does: within it the step knows the way.
    """
    expected, won = mass * split.axis.sum(state.margin_count.sum()), state.margin_count
    if twins is not None:
        every = twins.sums(split.gather(torch.stack([expected, won], dim=1)))[twins.group]
        expected, won = split.own(every).T
    return ((expected >= 2) & (won < 0.1 * expected)).nonzero()[:, 0]


def mean_margin(margin_sum: Tensor, margin_count: Tensor) -> Tensor:
    """Mean margin, to which an atom contributes at most OUTLIER times the median atom's.

    A single far atom wins its samples by margins of another order of magnitude, and is no measure for the others.
    """
    won = margin_count > 0
    means, counts = margin_sum[won] / margin_count[won], margin_count[won]
    return (counts @ means.clamp(max=OUTLIER * float(means.median()))) / counts.sum()


def begin(heights: Tensor, samples: int, split: Split, twins: Twins | None = None) -> State:
    """The first state. Heights are shifted to a median of 0, which a far atom does not move, and stay about there."""
    heights = heights - split.gather(heights).median()
    zero = torch.zeros_like(heights)
    near = None if twins is None else zero
    return State(heights, heights, zero, zero, samples=samples, twin_sum=near, twin_count=near)


@dataclass(frozen=True)
class Tally:
    """What samples say about each own atom: sums over them, float64; and the pairs (2, m) int32 of some of them."""

    sums: Tensor  # (3, own): smoothed number of samples won, number won, margins of those won; with groups (5, own):
    # margins to other groups, then margins within the own one, and the number of those
    pairs: Tensor  # winner and runner-up; with groups the best of another group, and the next one of the own
    samples: int

    def __add__(self, other: Tally) -> Tally:
        pairs = torch.cat([self.pairs, other.pairs], dim=1)
        return Tally(self.sums + other.sums, pairs, self.samples + other.samples)


@dataclass(frozen=True)
class Softness:
    """How samples are shared in a step: the temperature ``between`` best and runner-up, to be multiplied by
    ``narrow`` (n,), and, where there are groups, that ``within`` each of them (groups,)."""

    between: float
    narrow: Tensor
    within: Tensor | None = None

    def width(self, two: Tensor) -> Tensor:
        """The temperature (B, 1) of samples whose best and runner-up are these atoms (B, 2)."""
        return self.between * self.narrow[two].amin(dim=1, keepdim=True)


def count(
    near: Winners,
    split: Split,
    temperature: float | Softness | None = None,
    chosen: slice = slice(None),
    twins: Twins | None = None,
) -> Tally:
    """Tally of B samples whose k winners are known; they share each sample by a softmax, if there is a temperature.

    chosen: the samples whose pairs are kept. twins: groups, whose atoms are all among the k if one of them is best.
    """
    if twins is not None:
        return _count_groups(near, split, temperature, chosen, twins)
    best, margin = near.index[:, 0], near.margin
    won = split.add(best, torch.stack([torch.ones_like(margin), margin], dim=1)).T
    soft = won[0]
    if temperature is not None:
        width = temperature.width(near.index[:, :2]) if isinstance(temperature, Softness) else temperature
        soft = split.add(near.index.flatten(), entropic.shares(near, width).flatten())
    return Tally(torch.cat([soft[None], won]), near.index[chosen, :2].T.int(), len(best))


def _count_groups(
    near: Winners, split: Split, temperature: float | Softness | None, chosen: slice, twins: Twins
) -> Tally:
    """``count`` with groups: winner and best atom of another group share a sample, and each its part with its group."""
    score, group = near.score.double(), twins.group[near.index]
    same = group == group[:, :1]
    beside = same.clone()
    beside[:, 0] = False
    first, rival, twin = torch.zeros_like(group[:, :1]), *(_first(its) for its in (~same, beside))
    two = near.index.gather(1, torch.cat([first, rival], dim=1))
    margin, closer = near.apart(torch.cat([rival, twin], dim=1)).T
    seen = beside.any(dim=1)
    sums = torch.stack([torch.ones_like(margin), margin, torch.where(seen, closer, 0.0), seen.double()], dim=1)
    won = split.add(two[:, 0], sums).T
    soft = won[0]
    if isinstance(temperature, Softness) and temperature.within is not None:
        between = torch.softmax(score.gather(1, torch.cat([first, rival], dim=1)) / temperature.width(two), dim=1)
        share = torch.zeros_like(score)
        for part, its in zip(between.T, (same, group == group.gather(1, rival)), strict=True):
            within = torch.where(its, score / temperature.within[group], -torch.inf)
            share += part[:, None] * torch.softmax(within, dim=1)
        soft = split.add(near.index.flatten(), share.flatten())
    own = near.index.gather(1, torch.cat([first, twin], dim=1))[chosen]
    pairs = torch.cat([two[chosen], own[seen[chosen]]]).T.int()
    return Tally(torch.cat([soft[None], won]), pairs, len(score))


def _first(marked: Tensor) -> Tensor:
    """The first column that is marked in each row (B, k), (B, 1); 0 if none is."""
    return marked.int().argmax(dim=1, keepdim=True)


def softness(state: State, split: Split, twins: Twins | None) -> Softness | None:
    """How samples are shared in the coming step; None before the first step, when nothing is known of margins.

    Smoothing is multiplied by the root of an atom's margin over tau, by (14): less of it where cells are narrow.
    """
    if not state.smoothing:
        return None
    sums, counts = split.gather(torch.stack([state.margin_sum, state.margin_count], dim=1)).T
    tau = sums.new_tensor(state.margin)
    if twins is None:
        return Softness(state.smoothing, (scales(sums, counts, tau) / tau).sqrt())
    sums, counts = twins.sums(torch.stack([sums, counts], dim=1)).T
    narrow = (scales(sums, counts, tau) / tau).sqrt()[twins.group]
    return Softness(state.smoothing, narrow, state.cooling * twin_margins(state, split, twins))


def twin_margins(state: State, split: Split, twins: Twins) -> Tensor:
    """Mean margin between the atoms of each group (groups,); of few samples drawn towards what its width says."""
    assert state.twin_sum is not None
    assert state.twin_count is not None
    sums, counts = twins.sums(split.gather(torch.stack([state.twin_sum, state.twin_count], dim=1))).T
    usual = twins.width * sums.sum() / (counts @ twins.width).clamp_min(COLD)
    return ((sums + PRIOR * usual) / (counts + PRIOR)).clamp_min(COLD)


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
    twins: Twins | None = None,
) -> State:
    """One step of (14) with (16) from the tallies of all processes, whose samples cost ``work`` plain samples.

    epsilon: the fixed temperature of the entropic problem, by which facets are wider than the margins say.
    A batch of s first batches is a step of length s: late steps, which are short, may so be taken together.
    The damping follows the steps: more of it where they stretch pairs of neighbours beyond STRETCH margins, where
    the graph, which is a linear picture, is no longer to be trusted; less of it where they do not. A few atoms may
    still go much too far, as a cell that was empty shows no facets: the next batch tells, and the damping jumps.
    With groups each of them takes that step as if it were one atom, and its atoms another one against each other.
    """
    held = tally.samples if split.axis.rank == 0 else 0  # a column's samples are counted once
    batch, new = grid.world.sum(torch.tensor([held, tally.pairs.shape[1]], dtype=torch.float64)).tolist()
    span = batch / first_batch
    hits, wins, margins, *within = grid.sample.sum(tally.sums)
    margin_sum = MEMORY**span * state.margin_sum + margins
    margin_count = MEMORY**span * state.margin_count + wins
    every = split.gather(torch.stack([hits, wins, margin_sum, margin_count, mass], dim=1))
    missing = every[:, 4] - every[:, 0] / batch
    if twins is not None:
        every = twins.sums(every)
    hits, wins, sums, counts, nu = (column.contiguous() for column in every.T)
    n, tau = len(nu), mean_margin(sums, counts)
    margin = scales(sums, counts, tau) + epsilon
    fresh, world = tally.pairs, grid.world
    if everywhere(split):
        fresh, world = grid.sample.gather(fresh.T).T, Axis()
        new = fresh.shape[1]
    drawn, pairs = (*state.drawn, int(new)), (*state.pairs, fresh)
    room = int(split.n * min(max(0.5 * PAIRS_A_BATCH * state.time, PAIRS_LEAST), PAIRS_MOST))
    while sum(drawn) - drawn[0] >= room:
        drawn, pairs = drawn[1:], pairs[1:]

    known, twin_pairs = _parted(torch.cat(pairs, dim=1), twins)
    found = graph.build(known, margin, world)
    hold = (sums + PRIOR * tau) / (counts + PRIOR) + epsilon  # wider, so that crowded atoms may move together
    newton = found.solve(nu - hits / batch, state.damping * nu / hold)
    pace = span * RATE * (1 + state.time) ** -DECAY
    step = pace * (newton - nu @ newton)
    error = float(((wins - 1) * wins / nu).sum()) / (batch * (batch - 1)) - 1
    floor, damping = state.floor * MEMORY**span, state.damping * (found.stretch(step) / STRETCH) ** 0.5
    failed = error > TRUST * max(state.error, 0.0) + NOISE * (2 * n) ** 0.5 / batch
    if failed and not epsilon:  # whose soft masses the wins do not show
        floor, damping = max(floor, min(FLOOR * state.damping, 1.0)), BRAKE * state.damping
    if twins is not None:
        nearer = tuple(
            MEMORY**span * old + its for old, its in zip((state.twin_sum, state.twin_count), within, strict=True)
        )
        state = replace(state, twin_sum=nearer[0], twin_count=nearer[1])
        apart, twin_damping = _within(
            state, missing, twin_pairs, world, world.total(known.shape[1]), mass, split, twins, pace
        )
        state, step = replace(state, twin_damping=twin_damping), step[twins.group] + apart
    time = state.time + span
    heights = state.heights + split.own(step)
    weight = AVERAGING * span / (time - state.since + AVERAGING * span)
    return replace(
        state,
        heights=heights,
        average=state.average + weight * (heights - state.average),
        margin_sum=margin_sum,
        margin_count=margin_count,
        pairs=pairs,
        drawn=drawn,
        margin=float(tau),
        damping=min(max(damping, floor, DAMPING_LEAST), DAMPING_MOST),
        floor=floor,
        error=error,
        step=state.step + 1,
        time=time,
        samples=state.samples + work,
    )


def _parted(pairs: Tensor, twins: Twins | None) -> tuple[Tensor, Tensor]:
    """Pairs (2, m) of different groups, by the numbers of these; and those of atoms of one group."""
    if twins is None:
        return pairs, pairs[:, :0]
    groups = twins.group[pairs.long()]
    same = groups[0] == groups[1]
    return groups[:, ~same], pairs[:, same]


def _within(
    state: State,
    missing: Tensor,
    pairs: Tensor,
    world: Axis,
    samples: float,
    mass: Tensor,
    split: Split,
    twins: Twins,
    pace: float,
) -> tuple[Tensor, float]:
    """The step (n,) of atoms against others of their group, none more than a margin, and the damping of the next one.

    missing: mass (n,) that atoms lack; pairs (2, m) within groups, from so many ``samples``.
    """
    nu = split.gather(mass)
    whole = twins.sums(torch.stack([nu, missing], dim=1))[twins.group]
    margin = twin_margins(state, split, twins)[twins.group]
    found = graph.build(pairs, margin, world, samples)
    newton = found.solve(missing - nu * whole[:, 1] / whole[:, 0], state.twin_damping * nu / margin)
    newton -= (twins.sums(nu * newton)[twins.group]) / whole[:, 0]
    step = torch.clamp(pace * newton, -margin, margin)
    damping = state.twin_damping * (found.stretch(step) / STRETCH) ** 0.5
    return step, min(max(damping, DAMPING_LEAST), TWIN_DAMPING_MOST)


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
