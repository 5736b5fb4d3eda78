"""One step of the descent on any problem: draw a batch, search, update the heights, lift atoms that starve.

Legend: n atoms, d dimension, B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distot import assign, optim, schedule
from distot.assign import Assigner, Winners
from distot.entropic import Soft
from distot.optim import State, Tally
from distot.orbit import Orbits, points
from distot.problem import Problem
from distot.source import Stream

LIFT_EVERY = 2  # steps between two looks for starving atoms
LIFT_WORK = 0.25  # of the step's work may go into it
LIFT_SAMPLES = 0.2  # an atom, to see how far the starving ones have to rise


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

    mass: the target's (n,), on the device of the heights. soft: the entropic problem, where no atom starves.
    ``each`` gets the samples and their winners by block.
    """
    n, orbit = problem.target.n, problem.orbit
    tally: Tally | None = None
    searched: list[tuple[Tensor | Orbits, Tensor]] = []
    k, temperature = (2, state.smoothing) if soft is None else (soft.top_k, soft.epsilon)
    for x in problem.batch(stream, step, schedule.batch(n, orbit.work, state.time)):
        poll()
        near = assigner(x, state.heights, k)
        if each is not None:
            each(x, near)
        counted = optim.count(near, temperature, n)
        tally = counted if tally is None else tally + counted
        if sum(len(potential) for _, potential in searched) < LIFT_SAMPLES * n:
            searched.append((x, near.score[:, 0]))
    assert tally is not None
    work = round(tally.pairs.shape[1] * orbit.work)
    epsilon = 0.0 if soft is None else soft.epsilon
    state = optim.update(state, tally, schedule.first_batch(n, orbit.work), mass, work, epsilon)
    if soft is None and state.step % LIFT_EVERY == 0 and len(hungry := optim.starving(state, mass)):
        state = lift(problem, state, hungry, searched, LIFT_WORK * work)
    return state


def most_work(problem: Problem, state: State) -> float:
    """What the next step costs at most, in plain samples."""
    n, work = problem.target.n, problem.orbit.work
    return schedule.batch(n, work, state.time) * work * (1 + LIFT_WORK) + 1


def lift(
    problem: Problem, state: State, hungry: Tensor, searched: list[tuple[Tensor | Orbits, Tensor]], work: float
) -> State:
    """Brings starving atoms half the way to the height at which each would win one of B samples; math 5 c.

    searched: portions of samples with u_h (B,), known from the search of the step; of them LIFT_SAMPLES an atom, or as
    many as cost ``work`` plain samples. Half the way, again and again, does not pass the height of one win in B, which
    is too much where B < n.
    """
    n, atoms = problem.target.n, problem.target.atoms[hungry]
    left = samples = max(1, int(min(LIFT_SAMPLES * n, work * n / len(hungry))))
    reach = torch.full((len(hungry),), -torch.inf, dtype=torch.float64, device=atoms.device)
    for x, potential in searched:
        some = points(x)[:left]
        found = assign.plain(some)(atoms, -potential[: len(some)], k=1).score[:, 0]
        reach = torch.maximum(reach, found.double())
        if not (left := left - len(some)):
            break
    heights = state.heights.index_add(0, hungry, 0.5 * (-reach - state.heights[hungry]).clamp_min(0))
    return optim.lifted(state, heights, round((samples - left) * len(hungry) / n))
