"""Where the solver starts: heights of the Gaussian problem (12) on a few centroids, refined from level to level.

Legend: n atoms, K nodes, d dimension. Everything is in the frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distot import assign, descent, optim, schedule, tree, twins
from distot.assign import Assigner, Winners
from distot.atoms import Atoms, Framed, as_atoms, each_row, tile_rows
from distot.entropic import Soft
from distot.errors import InputError
from distot.grid import Grid, Split
from distot.orbit import Orbits, points
from distot.power import Array
from distot.problem import Problem
from distot.source import Stream
from distot.tree import Level

CLAMP = 1e-12  # smallest eigenvalue of S0^½ S S0^½, relative to the largest
SAMPLES_PER_NODE = 30  # for the steps on a level, of a source without symmetry
SETTLED = 0.5  # share of them after which winners count for the cell centres
CENTRE_SAMPLES = 10  # for each cell centre of a warm start; at least CENTRE_LEAST
CENTRE_LEAST = 256
PROBE = 4  # samples an atom to find out how good the heights of a warm start are
STEPS = 1 << 20  # step numbers set aside for a level
TIGHT = 1e-5  # squared width, in radians, of a node of directions that is taken for a point
GRAZING = 1e-2  # the least product of a direction with the centre of its node's cell, where heights are continued
FAR = 4.0  # deviations of the source by which given heights of twins may contradict each other
SIGHTED = 4096  # samples that are looked at for whether they see any atom


@dataclass(frozen=True)
class Normal:
    """The Brenier map between Gaussians with the moments of source and target; math (12)."""

    mean: Array  # (d,) of the target; the source's is 0 in the frame
    whiten: Array  # (d, d), |(y - mean) whiten|² = (y - mean)ᵀ B^-1 (y - mean)

    def length(self, y: Tensor) -> Tensor:
        """yᵀ B^-1 y of vectors (n, d) -> (n,) float64."""
        return (y.double() @ torch.as_tensor(self.whiten, device=y.device)).square().sum(dim=1)

    def heights(self, y: Tensor | Atoms) -> Tensor:
        """Heights (n,) of points (n, d), with B^-1 = R (R S R)^-½ R and R = S0^½."""
        mean = torch.as_tensor(self.mean, device=y.device)
        return each_row(as_atoms(y), lambda tile: -0.5 * self.length(tile.double() - mean))

    def inverse(self, y: Tensor) -> Tensor:
        """Where the map takes y (n, d) from, (n, d) float64."""
        whiten = torch.as_tensor(self.whiten, device=y.device)
        return (y.double() - torch.as_tensor(self.mean, device=y.device)) @ whiten @ whiten.T

    def seats(self, nodes: Tensor) -> Tensor:
        """The atoms (K, d) that stand for nodes, given by the means (K, d) of theirs."""
        return nodes

    def continued(self, heights: Tensor, centres: Tensor, nodes: Tensor, finer: Tensor) -> Tensor:
        """Heights (B,) of atoms (B, d) from height, cell centre and mean of the node of each; math (13)."""
        away = finer.double() - nodes.double()
        return heights - (centres * away).sum(dim=1) - 0.5 * self.length(away)


class Directions:
    """What takes the place of ``Normal`` at the cost -log<x, y>: cells begin about their atoms."""

    def heights(self, y: Tensor | Atoms) -> Tensor:
        return torch.zeros(len(y), dtype=torch.float64, device=y.device)

    def inverse(self, y: Tensor) -> Tensor:
        return y.double()

    def seats(self, nodes: Tensor) -> Tensor:
        return nodes / nodes.norm(dim=1, keepdim=True).clamp_min(TIGHT)

    def continued(self, heights: Tensor, centres: Tensor, nodes: Tensor, finer: Tensor) -> Tensor:
        """As ``Normal.continued``, by math (29): the height at which it ties with its node in the centre of its cell,
        less a square, whose factor is the ratio of the widths of cell and node: 1 for a node of a single point."""
        seats, y = self.seats(nodes.double()), self.seats(finer.double())
        at, to = ((centres * its).sum(dim=1).clamp_min(GRAZING) for its in (seats, y))
        cell, node = (1 - its.double().square().sum(dim=1) for its in (centres, nodes))
        bend = torch.where(node > TIGHT, cell.clamp_min(0) / node.clamp_min(TIGHT), 1.0).sqrt()
        return heights + at.log() - to.log() - 0.5 * bend * (y - seats).square().sum(dim=1)


Guess = Normal | Directions


def guess_of(problem: Problem) -> Guess:
    """What is taken for the map before anything is known of it; that of ``normal`` costs what it says."""
    return Directions() if problem.cost.spherical else normal(problem)


def normal(problem: Problem) -> Normal:
    """Costs n d² flops and two eigendecompositions (d, d)."""
    mean, cov = problem.target.moments()
    values, vectors = np.linalg.eigh(problem.source_cov / problem.frame.source_scale**2)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    spectrum, axes = np.linalg.eigh(root @ cov @ root)
    largest = float(spectrum[-1])
    if largest <= 0:
        return Normal(mean, np.zeros_like(cov))
    return Normal(mean, root @ axes * np.maximum(spectrum, CLAMP * largest) ** -0.25)


def work(n: int, orbit_work: float) -> int:
    """What ``multilevel`` costs, in plain samples, give or take a batch."""
    return tree.work(n) + round(sum(orbit_work**0.5 * SAMPLES_PER_NODE * k * k / n for k in tree.widths(n)))


def multilevel(
    problem: Problem, assigner: str, poll: Callable[[], None], guess: Guess | None = None
) -> tuple[Tensor, int]:
    """Heights of own atoms, float64, and the work for them: solves for ever more centroids, then refines to the atoms.

    ``poll`` is called between batches and may raise to stop.
    """
    guess = guess or guess_of(problem)
    grown = tree.grow(problem.target, problem.grid, problem.seed, poll)
    levels, samples = grown.levels, float(tree.work(problem.target.n))
    if not levels:
        return guess.heights(problem.target.atoms), 0
    heights, assigner = guess.heights(levels[0].atoms), assign.feasible(problem, assigner)
    for number, level in enumerate(levels):
        finer = levels[number + 1].atoms if number + 1 < len(levels) else grown.leaves
        coarse = replace(problem, target=problem.target.replaced(guess.seats(level.atoms), level.mass, level.split))
        if level.split.axis.size == 1:
            coarse = replace(coarse, grid=Grid())  # every process solves it for itself
        heights, centres, spent = _solve(coarse, assigner, heights, number * STEPS, guess, poll)
        heights = prolong(heights, centres, level, finer, guess)
        samples += spent * level.split.n / problem.target.n
    return grown.home(heights), round(samples)


def transfer(problem: Problem, old: Problem, heights: Tensor, assigner: str) -> Tensor:
    """Heights of own atoms in the frame of ``problem`` from those of an old one, whose latents may be other ones.

    Each atom takes its height from the nearest old one, continued to second order. For an atom that was there
    before this is its old height. Costs a search for every atom and CENTRE_SAMPLES for every old one.
    Raises InputError if the old problem had another cost.
    """
    if old.cost != problem.cost:
        raise InputError(f"init was solved for the cost {old.cost.name!r}, this problem has {problem.cost.name!r}")
    frame, target = problem.frame, old.target
    offset = torch.from_numpy(old.frame.target_centre - frame.target_centre)
    scale = torch.tensor(frame.target_scale, dtype=torch.float64)

    def user(old_atoms: Tensor) -> Tensor:  # relative to the new centre
        return old.frame.target_out(old_atoms.cpu()) + offset

    atoms = target.atoms.moved(lambda tile: (user(tile) / scale).float()).to(problem.target.atoms.device)
    raw = old.frame.unit * heights.cpu() - torch.from_numpy(target.tilt)
    tilt = each_row(target.atoms, lambda tile: user(tile) @ torch.from_numpy(frame.source_centre))
    begun = ((raw + tilt.cpu()) / frame.unit).to(atoms.device)
    coarse = replace(problem, target=problem.target.replaced(atoms, target.mass, target.split))
    search = assign.over(coarse, assigner)
    guess = guess_of(problem)
    won = Won(coarse)
    count = max(CENTRE_LEAST, CENTRE_SAMPLES * target.n)
    for group in assign.searches(coarse, search, Stream.START, STEPS - 1, count, begun, 1, lambda: None):
        for _, x, near in group:
            won.add(x, near)
    centres = won.centres(guess)
    half = each_row(atoms, lambda tile: -0.5 * tile.double().square().sum(dim=1))
    axis, own, rows_each, out = problem.grid.target, problem.target.atoms, tile_rows(target.dim), []
    for number in range(-(-max(axis.objects(len(own))) // rows_each)):
        mine = own[number * rows_each : (number + 1) * rows_each]
        lengths = axis.objects(len(mine))
        rows = axis.gather(mine, lengths)  # all search for those of each
        node = search(rows, half, k=1).index[:, 0]
        begins, centre = (target.split.pick(values, node) for values in (begun, centres))
        continued = guess.continued(begins, centre, _picked(atoms, target.split, node), rows)
        out.append(Split(tuple(lengths), axis).own(continued))
    return torch.cat(out)


def _picked(atoms: Atoms, split: Split, index: Tensor) -> Tensor:
    """Any of all atoms (m, d), everywhere, from own ones; as ``Split.pick`` for those in memory."""
    place = split.place(index)
    own = place < split.count
    found = torch.zeros(len(index), atoms.shape[1], dtype=torch.float32, device=atoms.device)
    found[own] = atoms[place[own]]
    return split.axis.sum(found)


def probe(
    problem: Problem, assigner: Assigner, heights: Tensor, soft: Soft | None, poll: Callable[[], None]
) -> tuple[float, int]:
    """About the chi2 of heights, no less than its noise, from PROBE samples an atom, whole orbits; and their work."""
    n, samples = problem.target.n, problem.draws(PROBE * problem.target.n) * problem.orbit.size
    grid, split = problem.grid, problem.target.split
    hits = torch.zeros_like(heights)
    k, epsilon = (2, None) if soft is None else (soft.top_k, soft.epsilon)
    for group in assign.searches(problem, assigner, Stream.START, 0, PROBE * n, heights, k, poll):
        for *_, near in group:
            hits += optim.count(near, split, epsilon).sums[0]
    hits = grid.sample.sum(hits)
    mass = torch.as_tensor(problem.target.mass, device=heights.device)
    plain = float(split.axis.sum(((hits / samples - mass) ** 2 / mass).sum())) - n / samples
    return max(plain, 0.0) + (2 * n) ** 0.5 / samples, round(samples * problem.orbit.work)


def check_sight(problem: Problem, assigner: Assigner) -> None:
    """Raises InputError if some of SIGHTED samples see no atom at a finite cost."""
    if not problem.cost.spherical:
        return
    atoms, axis = problem.target.atoms, problem.grid.sample
    level, blind, count = torch.zeros(problem.target.split.count, dtype=torch.float32, device=atoms.device), 0, 0
    for group in assign.searches(problem, assigner, Stream.MOMENTS, 0, SIGHTED, level, 1, lambda: None):
        for *_, near in group:
            blind += int((near.score[:, 0] <= problem.cost.unseen).sum())
            count += len(near.score)
    if number := int(axis.total(blind)):
        raise InputError(
            f"{number:,} of {int(axis.total(count)):,} samples of the sphere see no latent within a right angle, and "
            "-log<x, y> is infinite there: the latents lie in a half space, or nearly, and every plan costs infinitely "
            "much; take latents from all directions, or the cost 'quadratic'"
        )


def prolong(heights: Tensor, centres: Tensor, level: Level, finer: Tensor | Atoms, guess: Guess) -> Tensor:
    """Heights of finer atoms, to second order about their node; math (13), (29)."""
    out = torch.empty(len(finer), dtype=torch.float64, device=finer.device)
    for first, tile in as_atoms(finer).tiles():
        rows = slice(first, first + len(tile))
        node = level.node[rows]
        out[rows] = guess.continued(heights[node], centres[node], level.atoms[node], tile)
    return out


def of_groups(problem: Problem) -> Problem:
    """The problem with one atom for each group of twins, the first one, with the mass of all.

    The tree would give a group a node of its own, and between nodes as different as that (13) is no longer even.
    """
    target, twins = problem.target, problem.target.twins
    if twins is None:
        return problem
    split, first = target.split, twins.first().cpu()
    own = torch.arange(split.first, split.first + split.count)
    chosen = (split.own(first) == own).nonzero()[:, 0]
    mass = twins.sums(split.gather(torch.from_numpy(target.mass)).to(twins.group.device)).cpu()
    mine = mass[split.own(twins.group).cpu()[chosen]].numpy()
    atoms = target.atoms.among(chosen.numpy()) if isinstance(target.atoms, Framed) else target.atoms[chosen]
    counts = tuple(split.axis.objects(len(chosen)))
    return replace(problem, target=target.replaced(atoms, mine, Split(counts, split.axis)))


def to_groups(problem: Problem, heights: Tensor, guess: Guess) -> Tensor:
    """Heights of own atoms from those of the first one of each group, which is own (m,): see ``of_groups``."""
    target, split = problem.target, problem.target.split
    if target.twins is None:
        return heights
    first = target.twins.first().cpu()
    ones = (first == torch.arange(split.n)).cumsum(0) - 1
    return together(problem, split.own(split.axis.gather(heights).cpu()[ones[first]]).to(heights.device), guess)


def together(problem: Problem, heights: Tensor, guess: Guess, far: float = 0.0) -> Tensor:
    """Heights of own atoms, those of a group continued from its first one.

    Two atoms at a distance r tie where their heights differ by r times a coordinate of the samples there. far: others
    than the first keep their heights if these are within so many deviations of the source.
    """
    target, split = problem.target, problem.target.split
    if target.twins is None:
        return heights
    every = split.gather(heights).cpu()
    out = split.own(every).clone()
    for number, to in target.twins.followers():
        base = twins.rows(target.atoms, to, split)
        away = twins.rows(target.atoms, number, split) - base
        wanted = every[to] - (guess.inverse(base) * away).sum(dim=1)
        own = (number >= split.first) & (number < split.first + split.count)
        wrong = own & ((every[number] - wanted).abs() >= far * away.norm(dim=1))
        out[number[wrong] - split.first] = wanted[wrong]
    return out.to(heights.device)


def _end(nodes: int, orbit_work: float) -> float:
    """Time, in first batches, at which a level is solved well enough."""
    return SAMPLES_PER_NODE * nodes * orbit_work**-0.5 / schedule.first_batch(nodes, orbit_work)


def _solve(
    coarse: Problem, assigner: str, heights: Tensor, first: int, guess: Guess, poll: Callable[[], None]
) -> tuple[Tensor, Tensor, int]:
    """Average heights (K,) of own centroids after a fixed number of samples, cell centres (K, d), and the work.

    The centres are those of the samples of the later steps, which come free.
    """
    search = assign.over(coarse, assigner)
    mass = torch.as_tensor(coarse.target.mass, device=heights.device)
    state, won = optim.begin(heights, 0, coarse.target.split), Won(coarse)
    end = _end(coarse.target.n, coarse.orbit.work)
    while state.time < end:
        each = won.add if state.time >= SETTLED * end else None
        state = descent.advance(coarse, search, state, mass, Stream.START, first + state.step, poll, each=each)
    return state.average, won.centres(guess), state.samples


class Won:
    """Samples that each of K own atoms has won: their sum and number."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        k, d = problem.target.atoms.shape
        # the last row takes the samples that atoms of other processes win
        self.sums = torch.zeros(k + 1, d + 1, dtype=torch.float64, device=problem.target.atoms.device)

    def add(self, x: Tensor | Orbits, near: Winners) -> None:
        values = torch.nn.functional.pad(points(x), (0, 1), value=1.0)
        self.sums.index_add_(0, self.problem.target.split.place(near.index[:, 0]), values.double())

    def centres(self, guess: Guess) -> Tensor:
        """Mean sample (K, d) of each cell; an empty cell gets the point that ``guess`` maps to its atom. They take the
        place of the sums, which are large."""
        total, count = self.problem.grid.sample.sum(self.sums[:-1]).tensor_split([-1], dim=1)
        for first, tile in self.problem.target.atoms.tiles():
            rows = slice(first, first + len(tile))
            mean = total[rows] / count[rows].clamp_min(1)
            total[rows] = torch.where(count[rows] > 0, mean, guess.inverse(tile))
        return total
