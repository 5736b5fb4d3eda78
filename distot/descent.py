"""One step of the descent on any problem: draw a batch, search, update the heights, lift atoms that starve.

Legend: n atoms, d dimension, B samples of a batch. On a grid all processes take the step together.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distot import assign, optim, schedule
from distot.assign import Assigner, Winners
from distot.atoms import blocks
from distot.entropic import Soft
from distot.errors import Diverged
from distot.optim import State, Tally
from distot.orbit import Orbits, points
from distot.problem import Problem
from distot.source import Stream

LIFT_EVERY = 2  # steps between two looks for starving atoms
LIFT_WORK = 0.25  # of the step's work may go into it
LIFT_SAMPLES = 0.2  # an atom, to see how far the starving ones have to rise

Kept = tuple[int, Tensor, Tensor]
"""Samples of a portion: the number of the first, all of them (B, d), and u_h (B,)."""


def advance(
    problem: Problem,
    assigner: Assigner,
    state: State,
    mass: Tensor,
    stream: Stream,
    step: int,
    poll: Callable[[], None],
    soft: Soft | None = None,
    each: Callable[[Tensor | Orbits, Winners], None] | None = None,
) -> State:
    """The state after one more step, whose samples are those of (stream, step); ``poll`` may raise to stop.

    mass: of own atoms, on the device of the heights. soft: the entropic problem, where no atom starves.
    ``each`` gets the samples and their winners by portion. Raises Diverged in all processes if a height is not finite.
    """
    n, orbit, split, grid = problem.target.n, problem.orbit, problem.target.split, problem.grid
    wanted = schedule.batch(n, orbit.work, state.time)
    batch = problem.draws(wanted) * orbit.size
    tally: Tally | None = None
    lifting = soft is None and state.step % LIFT_EVERY == 1 and starves(problem, state, mass)
    kept: list[Kept] = []
    twins = problem.target.twins if soft is None else None
    k = soft.top_k if soft is not None else 2 if twins is None else twins.most + 1
    temperature = optim.softness(state, split, twins) if soft is None else soft.epsilon
    found = assign.searches(problem, assigner, stream, step, wanted, state.heights, k, poll)
    for first, x, near in (portion for group in found for portion in group):
        if each is not None:
            each(x, near)
        counted = optim.count(near, split, temperature, optim.chosen(first, batch, split), twins)
        tally = counted if tally is None else tally + counted
        if lifting:
            stride = max(1, int(batch / (LIFT_SAMPLES * n)))
            some = every(first, stride)
            kept.append((-(-first // stride), points(x)[some], near.score[some, 0]))
    assert tally is not None
    work = round(batch * orbit.work)
    epsilon = 0.0 if soft is None else soft.epsilon
    with grid.meter.timed("update"):
        state = optim.update(state, tally, schedule.first_batch(n, orbit.work), mass, work, split, grid, epsilon, twins)
    if lifting:
        state = lift(problem, state, optim.starving(state, mass, split, twins), kept, LIFT_WORK * work)
    if grid.world.any(not bool(torch.isfinite(state.heights.float()).all())):
        raise Diverged(
            f"the heights are not finite any more after step {state.step}; masses or distances of the latents differ "
            "by more than arithmetic can hold: leave out the extreme ones"
        )
    return optim.within(state, problem.cost.limit, mass, split)


def most_work(problem: Problem, state: State) -> float:
    """What the next step costs at most, in plain samples."""
    n, work = problem.target.n, problem.orbit.work
    return schedule.batch(n, work, state.time) * work * (1 + LIFT_WORK) + 1


def every(first: int, stride: int) -> slice:
    """Of samples that count from ``first``, those whose number is a multiple of ``stride``."""
    return slice(-first % stride, None, stride)


def starves(problem: Problem, state: State, mass: Tensor) -> bool:
    """Whether any atom does, anywhere."""
    target = problem.target
    return problem.grid.target.any(len(optim.starving(state, mass, target.split, target.twins)) > 0)


def lift(problem: Problem, state: State, hungry: Tensor, kept: list[Kept], work: float) -> State:
    """Brings starving atoms half the way to the height at which each would win one of B samples; math 5 c.

    hungry: own ones. kept: samples with u_h, known from the search of the step; so many of them are searched as cost
    ``work`` plain samples, over all processes.

    Half the way, again and again, does not pass the height of one win in B, which is too much where B < n. A group
    rises as a whole, as far as the first of its atoms needs.
    """
    grid, atoms = problem.grid, problem.target.atoms
    starving = grid.target.total(len(hungry))
    if not starving:
        return state
    samples = grid.sample.total(sum(len(x) for _, x, _ in kept))
    stride = max(1, math.ceil(samples * starving / (work * problem.target.n)))
    reach = torch.full((len(hungry),), -torch.inf, dtype=torch.float64, device=atoms.device)
    for rows in blocks(len(hungry), problem.target.dim):
        tile = atoms[hungry[rows]]
        for first, x, potential in kept:
            some = every(first, stride)
            if len(x[some]):
                search = assign.plain(x[some].contiguous(), problem.cost)
                best = search(tile, -potential[some], k=1).score[:, 0].double()
                reach[rows] = torch.maximum(reach[rows], best)
    rise = -grid.sample.max(reach) - state.heights[hungry]
    if (twins := problem.target.twins) is not None:
        split, needed = problem.target.split, torch.full_like(state.heights, torch.inf)
        needed[hungry] = rise
        least = needed.new_full((len(twins.width),), torch.inf)
        least.scatter_reduce_(0, twins.group, split.gather(needed), "amin")
        rise = split.own(least[twins.group])[hungry]
    heights = state.heights.index_add(0, hungry, 0.5 * rise.clamp_min(0))
    return optim.lifted(state, heights, round(samples / stride * starving / problem.target.n))
