"""What each process of a grid does for a verb: open or build the problem, run it, certify it. One is a grid, too.

On a grid all processes call the same function with the same arguments; the first one speaks, holds the lock of the run
folder, and commits what all have written. Legend: N latents, d dimension, n atoms.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from distot import assign, descent, optim, solver, start
from distot.assign import Assigner
from distot.atoms import ROWS, Rows
from distot.certify import Certificate
from distot.errors import DistotWarning, InputError, StoreError
from distot.grid import Grid
from distot.problem import Problem, build_problem
from distot.progress import listener
from distot.schedule import Options, StopRule
from distot.solution import Facts, Held, Interrupted, Solution, describe
from distot.solver import Progress
from distot.source import Source, from_spec
from distot.store import Dropped, Latents, Run, explained, need_space, open_latents
from distot.target import Cache
from distot.watch import Event, Watch, signals

Listen = Callable[[Event], None]


@dataclass(frozen=True)
class Room:
    """Where a verb works: the place in a grid, and who hears of it."""

    grid: Grid = field(default_factory=Grid)
    cache: Cache = field(default_factory=dict)  # of latents that were read, for when the same share is built again
    show: bool | None = None  # progress on the terminal; None: if it is one
    on_event: Listen | None = None
    asked: Callable[[], int | None] = lambda: None  # the number of a signal that was sent to the whole grid
    spent: float = 0.0  # seconds of the time limit that were spent before, by processes that were lost
    level: int = 4  # of the caller's frame, for warnings


@dataclass(frozen=True)
class Case:
    """A problem with everything that was chosen for it."""

    problem: Problem
    assigner: Assigner
    options: Options
    rows: Rows
    mass: NDArray[Any] | None  # as the user gave it
    init: NDArray[Any] | None = None  # heights of own atoms for a warm start, in the frame
    run: Run | None = None


def solve(
    latents: object,
    source: object,
    mass: NDArray[Any] | None,
    options: Options,
    run: Path | None,
    init: object,
    room: Room,
    copies: bool = False,
) -> Solution:
    """Raises as ``api.solve`` does. copies: the new run keeps a copy of the latents even if they are in a store."""
    if run is not None and any(room.grid.world.objects(run.exists())):
        raise StoreError(f"{run} exists already; continue it with `distot resume {run}`, or choose another name")
    rows = as_rows(latents)
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith(".zarr")):
        source = open_latents(source)[:]
    problem = _problem(rows, source, mass, options, room)
    warm = None if init is None else _init(init, problem, options, room)
    case = Case(problem, assign.over(problem, options.assigner, options.recall), options, rows, mass, warm)
    if run is None:
        return _drive(case, None, (), room)
    whole = None if warm is None else problem.target.split.gather(torch.from_numpy(warm)).numpy()
    if room.grid.leads:
        _create(replace(case, init=whole), run, copies)
    room.grid.world.objects(None)  # it is there for all
    folder = Run(run)
    with _locked(folder, room):
        return _drive(replace(case, run=folder), None, (), room)


def resume(
    run: Path, source: object, latents: object, changes: dict[str, Any], room: Room, again: bool = False
) -> Solution:
    """Raises as ``api.resume`` does. changes: the options that are replaced; None takes a limit away.

    again: after a loss of processes, which may have come when all was done.
    """
    with _locked(Run(run), room):
        case, remarks, found = _open(run, source, latents, changes, room)
        problem, options = case.problem, case.options
        if room.grid.leads:
            need_space(run, _checkpoint_bytes(problem))
        if found is None or not found.started:
            return _drive(case, None, remarks, room)
        rule = StopRule(problem.target.n, options.until_chi2, problem.orbit.work)
        if "until_chi2" in changes and found.history:
            found = replace(found, next_check=rule.next(found.history))
        spent = found.state.samples + descent.most_work(problem, found.state)
        if options.max_samples is not None and options.max_samples < spent:
            done = f"has spent its {options.max_samples:,} samples; give a larger --max-samples to go on"
        elif found.reason == "until_chi2" and "until_chi2" not in changes:
            done = f"has reached its goal of chi2 <= {options.until_chi2:g}; give a smaller --until-chi2 to go on"
        else:
            return _drive(case, replace(found, reason=None), remarks, room)
        certificate = _kept_certificate(case, found)
        if certificate is not None and again:
            return _solution(case, found, remarks, certificate)
        if certificate is None:  # killed just before its end
            return _drive(case, replace(found, reason=found.reason or "max_samples"), remarks, room)
        raise InputError(f"{run} {done}")


def load(run: Path, source: object, latents: object, changes: dict[str, Any], room: Room) -> Solution:
    """Raises as ``api.load`` does."""
    case, remarks, found = _open(run, source, latents, changes, room)
    if found is None:
        raise StoreError(f"{run} has no checkpoint yet; go on with: distot resume {run}")
    return _solution(case, found, remarks, _kept_certificate(case, found))


def certify(
    run: Path,
    samples: int | None,
    seed_step: int,
    source: object,
    latents: object,
    changes: dict[str, Any],
    room: Room,
) -> Solution:
    """Raises as ``api.certify`` does."""
    with _locked(Run(run), room):
        case, remarks, found = _open(run, source, latents, changes, room)
        if found is None:
            raise StoreError(f"{run} has no checkpoint yet; go on with: distot resume {run}")
        certificate = _solution(case, found, remarks, None).certify(samples, seed_step)
        _keep_certificate(case, found, certificate)
        return _solution(case, found, remarks, certificate)


def assign_file(
    run: Path,
    samples: Path | NDArray[Any],
    out: Path,
    source: object,
    latents: object,
    changes: dict[str, Any],
    room: Room,
) -> int:
    """The latents of samples (B, d), written by the first process to the npy file ``out`` (B,); B.

    Raises as ``api.assign_file`` does.
    """
    rows = _samples(samples)
    solution = load(run, source, latents, changes, room)
    partial = out.with_name(f".{out.name}.partial")
    with explained("write", out):
        file = open_memmap(partial, "w+", np.int64, (rows.shape[0],)) if room.grid.leads else None
        try:
            for first in range(0, rows.shape[0], ROWS):
                found = solution.assign(np.asarray(rows[first : first + ROWS]))
                if file is not None:
                    file[first : first + len(found)] = found
            if file is not None:
                file.flush()
                partial.rename(out)
        finally:
            if room.grid.leads:
                partial.unlink(missing_ok=True)
    return int(rows.shape[0])


def _samples(samples: Path | NDArray[Any]) -> Rows:
    """Samples that can be read by range. Raises InputError for what is no matrix of numbers."""
    if isinstance(samples, Path) and samples.suffix == ".npy":
        try:
            samples = np.load(samples, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{samples} cannot be read as an npy file: {error}") from error
    rows = open_latents(samples) if isinstance(samples, Path) else samples
    if len(rows.shape) != 2 or rows.dtype.kind not in "fiu":
        raise InputError(f"samples must be real and of shape (B, d), not {rows.dtype} {tuple(rows.shape)}")
    return rows


def as_rows(latents: object) -> Rows:
    """Latents as rows that can be read by range, in a floating dtype that a store can hold."""
    if isinstance(latents, str | Path):
        return open_latents(latents)
    if isinstance(latents, Tensor):
        latents = (latents.float() if latents.dtype == torch.bfloat16 else latents).detach().cpu().numpy()
    rows = np.asarray(latents)
    if rows.dtype.kind in "iu" or (rows.dtype.kind == "f" and rows.dtype.itemsize not in (2, 4, 8)):
        rows = rows.astype(np.float64)
    return rows.astype(rows.dtype.newbyteorder("="), copy=False)


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
                    run.save_json("config.json", run.config)
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
            )
            if why := problem.target.atoms.why:
                watch.tell("note", text=why)
            for note in problem.target.notes + remarks:
                watch.tell("note", text=note)
                warnings.warn(note, DistotWarning, stacklevel=room.level)
            if progress is None:
                progress = solver.begin(problem, assigner, options, watch, case.init)
            if progress.reason is None:
                progress = solver.iterate(problem, assigner, options, watch, progress)
            watch.save(progress.state.step, progress.part(problem), progress.scalars(), must=True)
            solution = _solution(case, progress, remarks, None)
            watch.tell("stop", reason=progress.reason, text=solution.explanation, samples=progress.state.samples)
            if watch.signal is not None:
                raise Interrupted(_farewell(run, watch.signal), solution, watch.signal)
            certificate = solver.conclude(problem, assigner, options, progress, watch)
            _keep_certificate(case, progress, certificate)
            watch.tell("certificate", **certificate.to_dict())
            if certificate.truncation > 0.01:
                watch.warn(
                    f"{certificate.truncation:.1%} of the entropic plan lies beyond the {options.top_k} best latents "
                    f"of a sample; give a larger top_k, or a smaller epsilon"
                )
            return _solution(case, progress, remarks, certificate)


def _solution(case: Case, progress: Progress, remarks: tuple[str, ...], certificate: Certificate | None) -> Solution:
    target = case.problem.target
    facts = Facts(
        case.options,
        (target.latents, target.dim),
        progress.state.samples,
        progress.history,
        progress.reason,
        target.notes + remarks,
        case.run,
    )
    return Solution(facts, certificate, lambda: Held(case.problem, case.assigner, progress, case.rows, case.mass))


def _farewell(run: Run | None, number: int) -> str:
    name = signal.Signals(number).name
    if run is None:
        return f"stopped by {name}; the solution so far is in this exception's .solution"
    return f"stopped by {name}; everything is saved, go on with: distot resume {run.path}"


def _keep_certificate(case: Case, progress: Progress, certificate: Certificate) -> None:
    if case.run is not None and case.problem.grid.leads:
        case.run.save_json("certificate.json", certificate.to_dict() | {"step": progress.state.step})


def _kept_certificate(case: Case, progress: Progress) -> Certificate | None:
    """The certificate in the run folder, if it is that of these heights."""
    stored = None if case.run is None else case.run.load_json("certificate.json")
    if stored is None or stored.pop("step") != progress.state.step:
        return None
    return Certificate(**stored)


@contextmanager
def _locked(run: Run, room: Room) -> Iterator[None]:
    """The first process holds the lock."""
    if not room.grid.leads:
        yield
        return
    with run.lock():
        yield


def _create(case: Case, path: Path, copies: bool) -> None:
    """A new run folder, with a copy of latents that are in memory, or of all if it ``copies``."""
    copies = copies or not isinstance(case.rows, Latents)
    latents = "latents.zarr" if copies else _reference(case.rows, path)
    config, arrays = describe(case.problem, case.options, latents, case.mass)
    config["init"] = case.init is not None
    arrays |= {} if case.init is None else {"init": case.init}
    n, d = case.rows.shape
    need_space(path, _checkpoint_bytes(case.problem) + copies * n * d * case.rows.dtype.itemsize)
    Run.create(path, config, arrays, (case.rows, None) if copies else None)


def _init(init: object, problem: Problem, options: Options, room: Room) -> NDArray[Any]:
    """Heights of own atoms in the frame for a warm start. Raises InputError for another shape, or not finite ones."""
    target = problem.target
    if isinstance(init, str | Path):
        init = load(Path(init), None, None, {"memory": options.memory}, replace(room, cache={}))
    if isinstance(init, Solution):
        held = init.held
        if held.problem.target.dim != target.dim:
            raise InputError(f"init was solved in dimension {held.problem.target.dim}, the latents have {target.dim}")
        return start.transfer(problem, held.problem, held.progress.state.average, options.assigner).cpu().numpy()
    heights = np.asarray(init, dtype=np.float64)
    if heights.shape != (target.latents,):
        raise InputError(
            f"init must hold one height for each of the {target.latents:,} latents, its shape is {heights.shape}; "
            "to start from a run with other latents give the run"
        )
    kept = heights[target.original]
    if wrong := int(target.split.axis.total(int((~np.isfinite(kept)).sum()))):
        raise InputError(f"init holds {wrong:,} heights that are NaN or infinite")
    return problem.frame.heights_in(kept, target.tilt)


def _checkpoint_bytes(problem: Problem) -> int:
    """Room for the checkpoints of a run: three, of the pairs of the graph and four vectors."""
    return 3 * (8 * int(optim.PAIRS_MOST) + 40) * problem.target.n


def _problem(rows: Rows, source: object, mass: Any, options: Options, room: Room) -> Problem:
    if mass is None and isinstance(rows, Latents):
        mass = rows.mass
    problem = build_problem(rows, source, mass, options.seed, options.device, room.grid, room.cache, options.memory)
    if isinstance(rows, Latents) and rows.fingerprint not in (None, problem.target.fingerprint):
        raise StoreError(f"{rows.path} has changed since it was written (its fingerprint differs); ingest it again")
    return problem


def _reference(rows: Rows, run: Path) -> str:
    """How config.json names the latents: relative to the run folder, so that both can move together."""
    assert isinstance(rows, Latents)
    return os.path.relpath(rows.path.resolve(), run.resolve())


def _open(
    run: Path, source: object, latents: object, changes: dict[str, Any], room: Room
) -> tuple[Case, tuple[str, ...], Progress | None]:
    """The case in a run folder with ``changes`` to its options, remarks on damage, and its newest good checkpoint.

    The problem is checked to be the same as when the run began.
    """
    folder = Run(run)
    config = folder.config
    options = Options(**(config["options"] | changes))
    if source is None:
        source = from_spec(config["source"], {k: folder.array(f"source-{k}") for k in config["source_arrays"]})
    elif not isinstance(source, Source) and not callable(source):
        raise InputError(f"source must be the callable or distot.Source that the run began with, not {source!r}")
    if latents is None:
        stored = Path(os.path.normpath(folder.path / config["latents"]))
        if not stored.exists():
            raise StoreError(f"the latents of {run} are not at {stored} any more; say where they are (--latents)")
        latents = stored
    rows = as_rows(latents)
    if list(rows.shape) != config["shape"]:
        raise InputError(f"{run} was solved for latents of shape {tuple(config['shape'])}, these are {rows.shape}")
    mass = folder.array("mass") if config["mass"] else None
    problem = _problem(rows, source, mass, options, room)
    if problem.target.fingerprint != config["fingerprint"]:
        raise InputError(f"{run} was solved for other latents (their fingerprint differs); give it its own (--latents)")
    split = problem.target.split
    init = split.own(torch.from_numpy(folder.array("init"))).numpy() if config["init"] else None
    search = assign.over(problem, options.assigner, options.recall)
    case = Case(problem, search, options, rows, mass, init, folder)
    while (checkpoint := folder.load_checkpoint(room.grid.world)) is not None:
        try:
            return case, checkpoint.remarks, solver.restore(checkpoint, problem)
        except Dropped:
            continue  # a writer has replaced it by newer ones while it was read
    return case, (), None
