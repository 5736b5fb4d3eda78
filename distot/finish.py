"""From samples to exact masses in the plane: sampling and Newton's method by turns, until the latter gets there.

Legend: n atoms.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from distot import descent, exact, newton, solver
from distot.assign import Assigner
from distot.atoms import Rows
from distot.problem import Problem
from distot.schedule import Options, StopRule
from distot.solver import Progress
from distot.watch import Stop, Watch

FIRST = 8  # samples per atom, of search work, after which Newton's method is tried; then whenever they have doubled


def iterate(
    problem: Problem, rows: Rows, assigner: Assigner, options: Options, watch: Watch, progress: Progress
) -> Progress:
    """Exact heights, with the reason "exact", from a progress that has begun; goal and budget bound the sampling alone.

    The reason is "sampled" if Newton's method was stopped, or has failed when sampling was at its end: then the heights
    are those of sampling. They are saved before every trial, so that another process can go on from there.
    """
    rule = StopRule(problem.target.n, options.until_chi2, problem.orbit.work)
    limit = float("inf") if options.max_samples is None else options.max_samples
    plane, late = exact.plane(problem, rows), False
    while True:
        if progress.reason is None:
            budget = int(min(_turn(problem, progress), limit))
            progress = solver.iterate(problem, assigner, replace(options, max_samples=budget), watch, progress)
            if progress.reason == "interrupted":
                return progress
            late = progress.reason == "max_seconds"
            progress = replace(progress, reason="sampled")
            watch.save(progress.state.step, progress.part(problem), progress.scalars())
        try:
            found = _newton(plane, options, watch, progress)
        except Stop:
            return progress
        if found.why is None:
            heights = torch.as_tensor(found.heights - np.median(found.heights)).to(progress.state.average.device)
            state = replace(progress.state, heights=heights, average=heights, step=progress.state.step + 1)
            return replace(progress, state=state, reason="exact")
        if late or rule.done(progress.history) or _spent(problem, progress) > limit:
            watch.warn(f"the masses are not exact: {found.why}")
            return progress
        watch.tell("note", text=f"Newton's method waits for better heights: {found.why}")
        progress = replace(progress, reason=None)


def _spent(problem: Problem, progress: Progress) -> float:
    """Search work after another step."""
    return progress.state.samples + float(descent.most_work(problem, progress.state))


def _turn(problem: Problem, progress: Progress) -> float:
    """Search work after which it is Newton's turn."""
    turn, spent = float(FIRST * problem.target.n), _spent(problem, progress)
    while turn < spent:
        turn *= 2
    return turn


def _newton(plane: exact.Plane, options: Options, watch: Watch, progress: Progress) -> newton.Outcome:
    """A trial of Newton's method. Raises Stop after a signal, or when it is time for the certificate."""
    reserve = solver.certificate_seconds(options, len(plane.mass), watch.seconds_per_sample)

    def each(news: dict[str, float]) -> None:
        watch.tell("newton", **news)
        watch.poll(reserve)

    return newton.solve(plane, progress.state.average.cpu().numpy(), each)
