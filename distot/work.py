"""The tasks: what each process of a grid does for a verb. One process is a grid, too.

On a grid all processes do the same task; the first one speaks, holds the lock of the run folder, and commits what all
have written. Legend: N latents, d dimension, B samples.
"""

from __future__ import annotations

import math
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distot import descent, finish, solver, start
from distot.case import OWN_LATENTS, Case, Room, locked, new_case, open_case, source_place
from distot.certify import Certificate
from distot.environment import environment
from distot.errors import DistotWarning, InputError, StoreError
from distot.given import numbers
from distot.problem import Problem
from distot.progress import listener
from distot.schedule import Options, StopRule
from distot.solution import Interrupted, Solution
from distot.solver import Progress
from distot.store import (
    Latents,
    Place,
    Run,
    Url,
    as_place,
    check_out,
    explained,
    need_space,
    read_npy,
    reference,
    referred,
    typed,
)
from distot.watch import Stop, Watch, signals

CLEARLY = 5.0  # errors of chi2
LARGEST = 1e30  # a height in the frame, where float32 still has room for scores


class Task(Protocol):
    """Something to do with a run, in this process or, by the same call in each, in many."""

    @property
    def run(self) -> Place | None: ...

    def __call__(self, room: Room) -> Any: ...

    def again(self) -> Task:
        """What is to be done after processes were lost."""
        ...


@dataclass(frozen=True)
class Solve:
    """Raises as ``api.solve`` does."""

    latents: object
    source: object
    mass: NDArray[Any] | None
    options: Options
    run: Place | None = None
    init: object = None
    copies: bool = False  # the new run keeps a copy of the latents even if they are in a store

    def __call__(self, room: Room) -> Solution:
        run = self.run
        if run is not None and any(room.grid.world.objects(run.exists())):
            raise StoreError(
                f"{run} exists already; continue it with `distot resume {typed(run)}`, or choose another name"
            )
        if run is not None:
            check_out(run, self.latents, self.init, source_place(self.source), goes_on=True)
        case = new_case(self.latents, self.source, self.mass, self.options, room)
        if self.init is not None:
            case = replace(case, init=_init(self.init, case.problem, self.options, room))
        if run is None:
            return _drive(case, None, (), room)
        whole = None if case.init is None else case.problem.target.split.gather(torch.from_numpy(case.init)).numpy()
        if room.grid.leads:
            replace(case, init=whole).create(run, self.copies)
        room.grid.world.objects(None)  # it is there for all
        folder = Run(run)
        with locked(folder, room):
            return _drive(replace(case, run=folder), None, (), room)

    def again(self) -> Task:
        if self.run is None or not (self.run / "config.json").is_file():
            return self
        latents = self.latents if isinstance(self.latents, Url) else None  # as it was named by who began
        return Resume(self.run, self.source if callable(self.source) else None, latents, settled=True)


@dataclass(frozen=True)
class Opened:
    """A task for a run that is there. What is None is as the run says."""

    run: Place
    source: object = None  # a callable, or a Source, if the run began with one
    latents: object = None  # where they are now
    changes: dict[str, Any] = field(default_factory=dict)  # options that are replaced; None takes a limit away

    def open(self, folder: Run, room: Room) -> tuple[Case, tuple[str, ...], Progress | None]:
        """As ``case.open_case``."""
        return open_case(folder, self.source, self.latents, self.changes, room)

    def reads(self) -> tuple[object, ...]:
        """Where the run and its latents are, which nothing may be written over."""
        with explained("read", self.run):
            stored = self.latents is None and (self.run / "config.json").is_file()
        return self.run, referred(Run(self.run).config["latents"], self.run) if stored else self.latents

    def remember(self, folder: Run, case: Case, room: Room) -> None:
        """Keeps in the run where its latents are now, so that it need not be said again."""
        own = folder.config["latents"] == OWN_LATENTS and (folder.path / OWN_LATENTS).exists()
        if self.latents is None or own or not isinstance(case.rows, Latents) or not room.grid.leads:
            return
        place = reference(case.rows.path, folder.path)
        if place != folder.config["latents"]:
            folder.move_latents(place)

    def begun(self, folder: Run, room: Room) -> tuple[Case, tuple[str, ...], Progress]:
        """The same. Raises StoreError if there is no checkpoint yet."""
        case, remarks, found = self.open(folder, room)
        if found is None:
            raise StoreError(f"{self.run} has no checkpoint yet; go on with: distot resume {typed(self.run)}")
        return case, remarks, found


@dataclass(frozen=True)
class Load(Opened):
    """Raises as ``api.load`` does."""

    def __call__(self, room: Room) -> Solution:
        case, remarks, found = self.begun(Run(self.run), room)
        return case.solution(found, remarks, case.kept(found))


@dataclass(frozen=True)
class Resume(Opened):
    """Raises as ``api.resume`` does."""

    settled: bool = False  # a run that has nothing left to do is given as it is, and not refused

    def __call__(self, room: Room) -> Solution:
        run, folder = self.run, Run(self.run)
        with locked(folder, room):
            case, remarks, found = self.open(folder, room)
            self.remember(folder, case, room)
            problem, options = case.problem, case.options
            if room.grid.leads:
                need_space(run, case.checkpoint_bytes)
            if found is None or not found.started:
                return _drive(case, None, remarks, room)
            rule = StopRule(problem.target.n, options.until_chi2, problem.orbit.work)
            if "until_chi2" in self.changes and found.history:
                found = replace(found, next_check=rule.next(found.history))
            if found.reason == "until_chi2" and options.until_chi2 is None:  # a goal that was taken away since
                found = replace(found, reason="max_samples")
            spent = found.state.samples + descent.most_work(problem, found.state)
            if found.reason == "sampled" and not self.changes.keys() & {"until_chi2", "max_samples"}:
                return _drive(case, found, remarks, room)
            if found.reason == "exact":
                done = "has exact masses already; there is nothing left to do"
            elif options.max_samples is not None and options.max_samples < spent:
                done = f"has spent its {options.max_samples:,} samples; give a larger --max-samples to go on"
            elif found.reason == "until_chi2" and "until_chi2" not in self.changes:
                done = f"has reached its goal of chi2 <= {options.until_chi2:g}; give a smaller --until-chi2 to go on"
            else:
                return _drive(case, replace(found, reason=None), remarks, room)
            certificate = case.kept(found)
            if certificate is not None and self.settled:
                return case.solution(found, remarks, certificate)
            if certificate is None:  # killed just before its end
                return _drive(case, replace(found, reason=found.reason or "max_samples"), remarks, room)
            raise InputError(f"{run} {done}")

    def again(self) -> Task:
        return replace(self, settled=True)


@dataclass(frozen=True)
class Certify(Opened):
    """Raises as ``api.certify`` does."""

    samples: int | None = None
    seed_step: int = 0

    def __call__(self, room: Room) -> Solution:
        folder = Run(self.run)
        with locked(folder, room):
            case, remarks, found = self.begun(folder, room)
            self.remember(folder, case, room)
            certificate = case.solution(found).certify(self.samples, self.seed_step)
            case.keep(certificate, found)
            return case.solution(found, remarks, certificate)

    def again(self) -> Task:
        return self


def _init(init: object, problem: Problem, options: Options, room: Room) -> NDArray[Any]:
    """Heights of own atoms in the frame for a warm start. Raises InputError for another shape, or not finite ones."""
    target = problem.target
    if isinstance(init, str | Path | Url) and as_place(init).suffix == ".npy":
        init = read_npy(Path(str(init)))
    if isinstance(init, str | Path | Url):
        init = Load(as_place(init), changes={"memory": options.memory})(replace(room, cache={}))
    if isinstance(init, Solution):
        held = init.held
        if held.problem.target.dim != target.dim:
            raise InputError(f"init was solved in dimension {held.problem.target.dim}, the latents have {target.dim}")
        return start.transfer(problem, held.problem, held.progress.state.average, options.assigner).cpu().numpy()
    heights = numbers(init, "init")
    if heights.shape != (target.latents,):
        raise InputError(
            f"init must hold one height for each of the {target.latents:,} latents, its shape is {heights.shape}; "
            "to start from a run with other latents give the run"
        )
    kept = heights[target.original]
    if wrong := int(target.split.axis.total(int((~np.isfinite(kept)).sum()))):
        raise InputError(f"init holds {wrong:,} heights that are NaN or infinite")
    found = problem.frame.heights_in(kept, target.tilt)
    largest = float(target.split.axis.max(torch.tensor(np.abs(found).max() if len(found) else 0.0)))
    if not largest < LARGEST:
        raise InputError(f"init holds heights of up to {largest * problem.frame.unit:.3g}; searches in float32 cannot")
    return found


def _drive(case: Case, progress: Progress | None, remarks: tuple[str, ...], room: Room) -> Solution:
    """Runs a case from the start, or from ``progress``, to its end; the caller holds the lock of the run folder.

    A progress that has a reason to stop gets its certificate only.
    """
    problem, assigner, options, run = case.problem, case.assigner, case.options, case.run
    world = problem.grid.world
    with listener(room.show if room.grid.leads else False, room.on_event) as listen:
        watch = Watch(run, listen, options.max_seconds, options.checkpoint_seconds, world, room.asked, room.spent)
        with signals(watch):
            if run is not None and run.config["options"] != options.to_dict():
                run.config["options"] = options.to_dict()
                if room.grid.leads:
                    run.save_config({})
            watch.tell(
                "begin" if progress is None else "resume",
                latents=problem.target.latents,
                atoms=problem.target.n,
                dim=problem.target.dim,
                source=problem.source.kind,
                assigner=assigner.name,
                device=str(problem.target.atoms.device),
                kept=problem.target.atoms.kept,
                grid=list(problem.grid.shape),
                step=0 if progress is None else progress.state.step,
                samples=0 if progress is None else progress.state.samples,
                goal=options.until_chi2,
                environment=environment(problem.target.atoms.device),
            )
            if why := problem.target.atoms.why:
                watch.tell("note", text=why)
            for note in problem.target.notes + remarks:
                watch.tell("note", text=note)
                warnings.warn(note, DistotWarning, stacklevel=room.level)
            if progress is None:
                progress = finish.on_a_line(problem, case.rows, options)
                progress = progress or solver.begin(problem, assigner, options, watch, case.init)
            if options.exact and progress.reason in (None, "sampled"):
                progress = finish.iterate(problem, case.rows, assigner, options, watch, progress)
            elif progress.reason is None:
                progress = solver.iterate(problem, assigner, options, watch, progress)
            watch.save(progress.state.step, progress.part(problem), progress.scalars(), must=True)
            solution = case.solution(progress, remarks)
            watch.tell("grid", **problem.grid.report())
            watch.tell("stop", reason=progress.reason, text=solution.explanation, samples=progress.state.samples)
            try:
                watch.poll(-math.inf)
                certificate = solver.conclude(problem, assigner, options, progress, watch)
            except Stop as stop:
                assert watch.signal is not None
                raise Interrupted(_farewell(run, watch.signal), solution, watch.signal) from stop
            case.keep(certificate, progress)
            watch.tell("certificate", **certificate.to_dict())
            for doubt in _doubts(certificate, progress, options):
                watch.warn(doubt)
            return case.solution(progress, remarks, certificate)


def _doubts(certificate: Certificate, progress: Progress, options: Options) -> Iterator[str]:
    """What a certificate says against the answer, beside its numbers."""
    if progress.reason == "exact" and certificate.chi2 - CLEARLY * certificate.chi2_error > (options.until_chi2 or 0):
        yield (
            f"all masses are exact, but searches in float32, as in assign and pairs, see a chi2 of "
            f"{certificate.chi2:.2g}: some latents lie too close together for them; keep one of each few"
        )
    if certificate.truncation > 0.01:
        yield (
            f"{certificate.truncation:.1%} of the entropic plan lies beyond the {options.top_k} best latents "
            f"of a sample; give a larger top_k, or a smaller epsilon"
        )
    if certificate.unseen:
        yield (
            f"{certificate.unseen:,} of {certificate.samples:,} samples see no latent within a right angle: "
            "there -log<x, y> is infinite, and so is the cost of every plan"
        )


def _farewell(run: Run | None, number: int) -> str:
    name = signal.Signals(number).name
    if run is None:
        return f"stopped by {name}; the solution so far is in this exception's .solution"
    return f"stopped by {name}; everything is saved, go on with: distot resume {typed(run.path)}"
