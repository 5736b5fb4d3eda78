"""The loop: start, then step after step, looking at chi2 now and then, until the goal or the budget.

Legend: n atoms, d dimension. The loop knows nothing of files or terminals; ``Watch`` does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot import descent, optim, schedule, start, tree
from distot.assign import Assigner
from distot.certify import Certificate, cell_masses, certify, default_samples
from distot.entropic import Soft
from distot.errors import Diverged, InputError, StoreError
from distot.grid import Axis
from distot.optim import State
from distot.problem import Problem
from distot.schedule import Check, Options, StopRule
from distot.source import BLOCK, Stream
from distot.store import Checkpoint, Part
from distot.watch import Stop, Watch

SCALARS = ("drawn", "margin", "damping", "floor", "error", "step", "time", "since", "samples", "twin_damping")
LATE = 2.0  # chi2 over the share of winners that the search may miss, from which on steps are exact
NOISE = 3.0  # errors by which the average must be worse than the newest heights to begin anew
EPSILON_MOST = 1e20  # and its inverse the least, in the frame: further off float32 does not hold scores over epsilon
LEAST_CERTIFIED = 256  # samples of a certificate, if time was over before the first step
RESERVE = 0.2  # at most this share of max_seconds is kept for the certificate
FINISH = 0.5  # this share of max_seconds is kept for Newton's method, if masses are to be exact


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the problem and the options, all that is needed to go on."""

    state: State
    next_check: int
    history: tuple[Check, ...] = ()
    started: bool = True  # False if even the start was cut short; then it is done again on resume
    reason: str | None = None  # see solution.REASONS; None while running

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays of a checkpoint: vectors of own atoms; own pairs (m, 2), and how many of each step they are."""
        pairs = self.state.pairs
        flat = torch.cat(pairs, dim=1).T if pairs else torch.empty(0, 2, dtype=torch.int32)
        return {name: its.cpu().numpy() for name, its in self.state.vectors.items()} | {
            "pairs": flat.cpu().numpy(),
            "pairs_of_step": np.array([its.shape[1] for its in pairs], dtype=np.int64),
        }

    def part(self, problem: Problem) -> Part:
        """What this process writes into a checkpoint; vectors that others have, too, are written once."""
        split, grid, arrays = problem.target.split, problem.grid, self.arrays()
        if not grid.leads and optim.everywhere(split):
            arrays |= {"pairs": arrays["pairs"][:0], "pairs_of_step": 0 * arrays["pairs_of_step"]}
        if grid.sample.rank:
            return Part(0, 0, {name: arrays[name] for name in ("pairs", "pairs_of_step")})
        return Part(split.first, split.count, arrays)

    def scalars(self) -> dict[str, Any]:
        """Scalars of a checkpoint."""
        return {name: getattr(self.state, name) for name in SCALARS} | {
            "next_check": self.next_check,
            "history": [check.to_dict() for check in self.history],
            "started": self.started,
            "reason": self.reason,
        }


def restore(saved: Checkpoint, problem: Problem) -> Progress:
    """The inverse of ``Progress.arrays`` and ``Progress.scalars`` on any grid, ready to run on.

    A process reads the vectors of its own atoms, and all pairs or those which fall to it when they are dealt out.
    Raises StoreError for what no run of this problem can have written.
    """
    split, scalars = problem.target.split, saved.scalars
    whole = saved.count == split.n
    world = Axis() if optim.everywhere(split) else problem.grid.world
    device = problem.target.atoms.device
    own = slice(split.first, split.first + split.count)
    there = {name for part in saved.written for name in part["arrays"]}
    state: dict[str, Any] = {
        name: torch.as_tensor(saved.read(name, own), device=device)
        for name in optim.VECTORS + optim.TWIN_VECTORS
        if name in there or name in optim.VECTORS
    }
    if problem.target.twins is not None and optim.TWIN_VECTORS[0] not in there:  # of a version that knew no groups
        state |= dict.fromkeys(optim.TWIN_VECTORS, torch.zeros_like(state["heights"]))
    dealt: list[list[Tensor]] = [[] for _ in scalars["drawn"]]
    for number, (pairs, lengths) in enumerate(saved.parts("pairs", "pairs_of_step")):
        if not _sound(pairs, lengths, split.n, len(dealt)):
            raise StoreError(f"checkpoint {saved.name} is damaged: its pairs are not those of {split.n:,} atoms")
        begin = (world.rank - number) % world.size
        for its, part in zip(dealt, torch.from_numpy(pairs).split(lengths.tolist()), strict=True):
            its.append(part[begin :: world.size].T)
    if not (whole and all(bool(torch.isfinite(state[name]).all()) for name in optim.VECTORS)):
        raise StoreError(f"checkpoint {saved.name} is damaged: it has no finite heights of {split.n:,} atoms")
    state |= {name: scalars.get(name, 0.0) for name in SCALARS}
    state["pairs"] = tuple(torch.cat(its, dim=1).to(device) for its in dealt)
    state["drawn"] = tuple(scalars["drawn"])
    return Progress(
        State(**state),
        scalars["next_check"],
        tuple(Check(**check) for check in scalars["history"]),
        scalars["started"],
        scalars["reason"],
    )


def _sound(pairs: NDArray[Any], lengths: NDArray[Any], n: int, steps: int) -> bool:
    """Whether these can be pairs (m, 2) of n atoms, and how many of each step they are."""
    whole = pairs.dtype.kind == lengths.dtype.kind == "i" and pairs.shape[1:] == (2,) and lengths.shape == (steps,)
    numbers = whole and bool((lengths >= 0).all()) and int(lengths.sum()) == len(pairs)
    return numbers and (not len(pairs) or bool(pairs.min() >= 0 and pairs.max() < n))


def begin(
    problem: Problem, assigner: Assigner, options: Options, watch: Watch, init: NDArray[Any] | None = None
) -> Progress:
    """Gaussian and multilevel start, or the heights ``init`` of own atoms in the frame. Stopped early, it returns what
    is known by then, with the reason."""
    n, work, reason, moment = problem.target.n, problem.orbit.work, None, 0.0
    twins = problem.target.twins
    guess = start.guess_of(problem) if init is None or twins is not None else None
    given = guess.heights(problem.target.atoms) if init is None and guess is not None else torch.as_tensor(init)
    heights, samples = given.to(problem.target.atoms.device), 0
    spare = float("inf") if options.max_samples is None else options.max_samples // 4
    reserve = (RESERVE + FINISH * options.exact) * (options.max_seconds or 0.0)
    poll = partial(watch.poll, reserve)
    try:
        poll()
        if init is not None and start.PROBE * n * work <= spare:
            watch.tell("start", nodes=[])
            error, samples = start.probe(problem, assigner, heights, entropic_part(problem, options), poll)
            moment = schedule.moment(n, work, error)
        elif init is None and guess is not None and start.work(n, work) <= spare:
            watch.tell("start", nodes=tree.widths(n))
            heights, samples = start.multilevel(start.of_groups(problem), options.assigner, poll, guess)
            heights = start.to_groups(problem, heights, guess)
    except Stop as stop:
        reason = stop.reason
    if init is not None and guess is not None:
        heights = start.together(problem, heights, guess, start.FAR)
    check = StopRule(n, options.until_chi2, work).first(samples)
    state = replace(optim.begin(heights, samples, problem.target.split, twins), time=moment)
    mass = torch.as_tensor(problem.target.mass, device=state.heights.device)
    state = optim.within(state, problem.cost.limit, mass, problem.target.split)
    return Progress(state, check, started=reason is None, reason=reason)


def iterate(problem: Problem, assigner: Assigner, options: Options, watch: Watch, progress: Progress) -> Progress:
    """Steps until the goal, the budget or a signal; the reason is in the result. Checkpoints on the way.

    Raises StoreError if latents cannot be read any more; what one process has computed alone is saved before. Raises
    Diverged if heights are not finite any more; those of the step before are saved.
    """
    n, device, work = problem.target.n, problem.target.atoms.device, problem.orbit.work
    mass = torch.as_tensor(problem.target.mass, device=device)
    rule, soft = StopRule(n, options.until_chi2, work), entropic_part(problem, options)
    limit = float("inf") if options.max_samples is None else options.max_samples
    told, meter = assigner.why, problem.grid.meter
    try:
        while True:
            state = progress.state
            if told != (told := assigner.why):
                watch.tell("assigner", assigner=assigner.name, why=told)
            reserve = certificate_seconds(options, n, watch.seconds_per_sample)
            reserve += FINISH * options.exact * (options.max_seconds or 0.0)
            poll = partial(watch.poll, reserve)
            size = rule.size(state.samples, progress.history)
            if progress.next_check <= state.samples <= limit - size * work:
                with watch.timed(size):
                    progress = look(problem, assigner, soft, rule, progress, size, poll)
                watch.tell("check", **progress.history[-1].to_dict())
                watch.tell("grid", **problem.grid.report())
                if rule.done(progress.history):
                    return replace(progress, reason="until_chi2")
                continue
            if state.samples + descent.most_work(problem, state) > limit:
                return replace(progress, reason="max_samples")
            with watch.timed(schedule.batch(n, work, state.time)):
                search = assigner.exact if late(options, progress.history) else assigner
                state = descent.advance(problem, search, state, mass, Stream.STEP, state.step, poll, soft)
            progress = replace(progress, state=state)
            watch.tell(
                "step",
                step=state.step,
                samples=state.samples,
                samples_per_second=round(1 / watch.seconds_per_sample, 1),
                margin=state.margin * problem.frame.unit,
                wanted=wanted if (wanted := min(limit, rule.wanted(progress.history))) < float("inf") else None,
                sent=meter.bytes,
                waited=round(meter.seconds, 3),
            )
            if watch.due():
                with meter.timed("store"):
                    watch.save(state.step, progress.part(problem), progress.scalars())
    except Stop as stop:
        return replace(progress, reason=stop.reason)
    except (Diverged, StoreError) as error:  # or latents that are read as they are needed cannot be any more
        together = isinstance(error, Diverged)
        if together or problem.grid.world.size == 1:  # else the others are not here to write their parts
            watch.save(progress.state.step, progress.part(problem), progress.scalars())
        raise


def late(options: Options, history: tuple[Check, ...]) -> bool:
    """Whether missed winners could be most of what chi2 is now, so that steps must be exact from here on.

    Winners missed with probability q in all add at most q to chi2, if they are those of a few atoms always.
    """
    return options.recall is not None and bool(history) and history[-1].chi2 < LATE * (1 - options.recall)


def look(
    problem: Problem,
    assigner: Assigner,
    soft: Soft | None,
    rule: StopRule,
    progress: Progress,
    size: int,
    poll: Callable[[], None],
) -> Progress:
    """Estimates chi2 of the average on ``size`` fresh samples and adds it to the history."""
    state, history = progress.state, progress.history
    masses = cell_masses(problem, assigner.exact, state.average, soft, size, Stream.CHECK, len(history), poll)
    spent = round(max(problem.draws(size), 2) * problem.orbit.size * problem.orbit.work)
    history += (rule.judge(masses.chi2(problem.target.mass), state.samples, spent, state.step, history),)
    state = replace(state, samples=state.samples + spent)
    if soft is None:
        state = renewed(problem, state, history[-1])
    return replace(progress, state=state, history=history, next_check=rule.next(history))


def renewed(problem: Problem, state: State, last: Check) -> State:
    """The state whose average begins anew if a look has shown it to be worse than the newest heights.

    Those have a chi2 of their own from the last batch. An average outlives its use where early heights were off by many
    cells, which are narrow there: it then takes long to forget them.
    """
    n = problem.target.n
    noise = (2 * n) ** 0.5 / schedule.batch(n, problem.orbit.work, state.time)
    if last.chi2 - 2 * last.error <= max(state.error, 0.0) + NOISE * noise:
        return state
    return replace(state, average=state.heights, since=state.time)


def certificate_seconds(options: Options, n: int, seconds_per_sample: float) -> float:
    """Time to keep back for the certificate when there is a deadline."""
    if options.max_seconds is None:
        return 0.0
    wanted = options.certificate_samples or default_samples(n)
    return min(wanted * seconds_per_sample, RESERVE * options.max_seconds)


def conclude(problem: Problem, assigner: Assigner, options: Options, progress: Progress, watch: Watch) -> Certificate:
    """The certificate of the average; smaller than asked if that is what the deadline leaves time for.

    Raises Stop after a signal.
    """
    heights, heed = progress.state.average, partial(watch.poll, -math.inf)
    samples = options.certificate_samples or default_samples(problem.target.n)
    if watch.deadline is not None:
        least, pace = BLOCK, watch.seconds_per_sample
        if not pace:  # no step was taken, and there may be no time for one
            least, pace = LEAST_CERTIFIED, _pace(problem, assigner, heights, heed)
        affordable = int((watch.deadline - time.monotonic()) / pace)
        samples = max(min(samples, least), min(samples, affordable))
    samples = problem.grid.world.objects(samples)[0]
    watch.tell("certify", samples=samples)
    return certify(problem, assigner, heights, samples, soft=entropic_part(problem, options), poll=heed)


def _pace(problem: Problem, assigner: Assigner, heights: Tensor, poll: Callable[[], None]) -> float:
    """Seconds that a sample takes, where no step has told."""
    began, count = time.monotonic(), 2 * problem.orbit.size
    cell_masses(problem, assigner.exact, heights, None, count, Stream.CERTIFY, 0, poll)
    return (time.monotonic() - began) / count


def entropic_part(problem: Problem, options: Options) -> Soft | None:
    """The options of the entropic problem in the frame, or None for plain OT.

    Raises InputError for an epsilon so far from the scale of the problem that float32 does not hold the quotients.
    """
    if options.epsilon is None:
        return None
    epsilon, unit = options.epsilon / problem.frame.unit, problem.frame.unit
    if not 1 / EPSILON_MOST <= epsilon <= EPSILON_MOST:
        raise InputError(
            f"epsilon must be between {unit / EPSILON_MOST:.3g} and {unit * EPSILON_MOST:.3g} for distances like "
            f"these, it is {options.epsilon:g}"
        )
    return Soft(epsilon, min(options.top_k, problem.target.n))
