"""Exact masses: on a line by a formula; in the plane by sampling and Newton's method by turns, until it gets there.

Legend: n atoms.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from distot import descent, exact, newton, optim, solver
from distot.assign import Assigner
from distot.atoms import Rows
from distot.problem import Problem
from distot.schedule import Options, StopRule
from distot.solver import Progress
from distot.watch import Stop, Watch

FIRST = 8  # samples per atom, of search work, after which Newton's method is tried; then whenever they have doubled


def on_a_line(problem: Problem, rows: Rows, options: Options) -> Progress | None:
    """Exact heights, with the reason "exact", of a source on a line whose quantiles have a formula; else None.

    Cells lie in the order of their latents, and end where the source has as much mass below as they have together; math
    (36). All processes do the same.
    """
    target, frame, split = problem.target, problem.frame, problem.target.split
    if target.dim > 1 or problem.cost.spherical or options.epsilon is not None:
        return None
    own = torch.from_numpy(exact.relative(problem, rows)[:, 0] / frame.target_scale)
    y, mass = split.gather(torch.stack([own, torch.from_numpy(target.mass)], dim=1)).T
    order = y.argsort()
    ends = problem.source.quantiles(mass[order].cumsum(0)[:-1].clamp_max(1 - 1e-16))
    if ends is None:
        return None
    seen = (ends - float(frame.source_centre[0])) / frame.source_scale
    heights = torch.zeros_like(y)
    heights[order[1:]] = -(seen * y[order].diff()).cumsum(0)
    device = target.atoms.device
    return Progress(optim.begin(split.own(heights).to(device), 0, split), 0, reason="exact")


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
