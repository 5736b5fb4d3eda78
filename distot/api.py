"""The verbs: solve, resume, load, certify. The command line calls these and nothing below them.

Legend: N latents, d dimension.
"""

from __future__ import annotations

import math
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distot import assign, descent, optim, solver, start
from distot.assign import Assigner
from distot.certify import Certificate
from distot.errors import DistotWarning, InputError, StoreError
from distot.problem import Problem, build_problem
from distot.progress import listener
from distot.schedule import Options, StopRule
from distot.solution import Interrupted, Solution, describe
from distot.solver import Progress
from distot.source import Source, from_spec
from distot.store import Latents, Run, need_space, open_latents
from distot.target import Rows
from distot.watch import Event, Watch

Listen = Callable[[Event], None]


def solve(
    latents: ArrayLike | Tensor | str | Path,
    source: object = "gaussian",
    mass: ArrayLike | None = None,
    until_chi2: float | None = 0.05,
    max_samples: int | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
    device: str = "auto",
    assigner: str = "auto",
    run: str | Path | None = None,
    *,
    init: Solution | ArrayLike | str | Path | None = None,
    epsilon: float | None = None,
    top_k: int = 32,
    recall: float | None = None,
    checkpoint_seconds: float = 60.0,
    certificate_samples: int | None = None,
    progress: bool | None = None,
    on_event: Listen | None = None,
) -> Solution:
    """Solves semi-discrete optimal transport from ``source`` to the latents, cost ½|x - y|².

    latents: array or tensor (N, d), or the path of a zarr store (``distot ingest`` makes one).
    source: "gaussian" N(0, I), "cube" [0, 1]^d, "ball", "sphere" (radius 1), a ``distot.Source``, samples (n, d) as an
        array or the path of a zarr store, or a callable (numpy Generator, n) -> (n, d).
    mass: (N,) wanted masses; None is the store's own, or uniform.
    until_chi2: stop when the squared relative error of the cell masses, math (8), is below this with 95 % confidence.
    max_samples, max_seconds: budgets; the answer so far is returned when one is spent.
    seed: the answer is a function of it, whatever the interruptions.
    init: a warm start: heights (N,) for these latents, or a Solution or run folder, whose latents may be others: new
        ones and moved ones get their height from the nearest old one.
    epsilon: solves the entropic problem at this temperature, in units of cost, instead of the plain one; a sample is
        shared by its ``top_k`` best latents, and ``certificate.truncation`` says what share that leaves out.
    assigner, recall: how winners are found, see ``distot.assign.build``; with a recall, say 0.97, "auto" or "lists" may
        miss some where that is faster, until late in the run. Certificates are exact always.
    run: a new run folder for checkpoints and the log, from which ``resume`` and ``load`` go on.
    progress: show it on the terminal; None means if stderr is one. on_event: gets every event as a dict.

    Raises InputError or StoreError before work starts for what can be known by then; Interrupted on Ctrl-C or SIGTERM,
    which carries the solution so far.
    """
    options = Options(
        until_chi2,
        max_samples,
        max_seconds,
        seed,
        device,
        assigner,
        recall,
        checkpoint_seconds,
        certificate_samples,
        epsilon,
        top_k,
    )
    if run is not None and Path(run).exists():
        raise StoreError(f"{run} exists already; continue it with `distot resume {run}`, or choose another name")
    rows = _rows(latents)
    given = None if mass is None else np.asarray(mass)
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith(".zarr")):
        source = open_latents(source)[:]
    problem = _problem(rows, source, given, options)
    warm = None if init is None else _init(init, problem, assigner)
    case = Case(problem, assign.build(assigner, problem.target.atoms, recall), options, rows, given, warm)
    if run is None:
        return _drive(case, None, (), progress, on_event)
    config, arrays = describe(problem, options, _reference(rows, Path(run)), given)
    config["init"] = warm is not None
    arrays |= {} if warm is None else {"init": warm}
    copy = None if isinstance(rows, Latents) else (rows, None)
    need_space(Path(run), _checkpoint_bytes(problem) + (0 if copy is None else np.asarray(rows).nbytes))
    case = replace(case, run=(folder := Run.create(run, config, arrays, copy)))
    with folder.lock():
        return _drive(case, None, (), progress, on_event)


def resume(
    run: str | Path,
    *,
    source: object = None,
    latents: ArrayLike | Tensor | str | Path | None = None,
    until_chi2: float | None = None,
    max_samples: int | None = None,
    max_seconds: float | None = None,
    device: str | None = None,
    progress: bool | None = None,
    on_event: Listen | None = None,
) -> Solution:
    """Goes on with a run from its newest good checkpoint: the same heights, bit for bit, as if never interrupted.

    until_chi2, max_samples, max_seconds, device replace the run's own values if given, for good (max_seconds counts
    anew in every process); infinity takes a limit away. source is needed if the run draws from a user's callable;
    latents if they have moved.

    Raises InputError if the latents are not those of the run or nothing is left to do; StoreError if the run is
    missing, locked or damaged.
    """
    changes = {"until_chi2": until_chi2, "max_samples": max_samples, "max_seconds": max_seconds, "device": device}
    given = {name: None if value == math.inf else value for name, value in changes.items() if value is not None}
    with Run(run).lock():
        case, remarks, found = _open(run, source, latents, given)
        problem, options = case.problem, case.options
        need_space(Path(run), _checkpoint_bytes(problem))
        if found is None or not found.started:
            return _drive(case, None, remarks, progress, on_event)
        work = problem.orbit.work
        rule = StopRule(problem.target.n, options.until_chi2, work)
        if until_chi2 is not None and found.history:
            found = replace(found, next_check=rule.next(found.history))
        spent = found.state.samples + descent.most_work(problem, found.state)
        if options.max_samples is not None and options.max_samples < spent:
            done = f"has spent its {options.max_samples:,} samples; give a larger --max-samples to go on"
        elif found.reason == "until_chi2" and until_chi2 is None:
            done = f"has reached its goal of chi2 <= {options.until_chi2:g}; give a smaller --until-chi2 to go on"
        else:
            return _drive(case, replace(found, reason=None), remarks, progress, on_event)
        if _kept_certificate(case, found) is None:  # killed just before its end
            return _drive(case, replace(found, reason=found.reason or "max_samples"), remarks, progress, on_event)
        raise InputError(f"{run} {done}")


def load(
    run: str | Path,
    *,
    source: object = None,
    latents: ArrayLike | Tensor | str | Path | None = None,
    device: str | None = None,
) -> Solution:
    """The solution in a run folder, as of its newest good checkpoint, finished or not. Takes no lock.

    Raises StoreError if there is no run, or no checkpoint in it yet.
    """
    case, remarks, found = _open(run, source, latents, {} if device is None else {"device": device})
    if found is None:
        raise StoreError(f"{run} has no checkpoint yet; go on with: distot resume {run}")
    return _solution(case, found, remarks, _kept_certificate(case, found))


def certify(
    run: str | Path,
    samples: int | None = None,
    seed_step: int = 0,
    *,
    source: object = None,
    latents: ArrayLike | Tensor | str | Path | None = None,
    device: str | None = None,
) -> Solution:
    """Certifies a run anew and keeps the certificate in it; ``seed_step`` > 0 draws other, independent samples.

    Raises as ``load`` does, and StoreError if another process is writing to the run.
    """
    with Run(run).lock():
        case, remarks, found = _open(run, source, latents, {} if device is None else {"device": device})
        if found is None:
            raise StoreError(f"{run} has no checkpoint yet; go on with: distot resume {run}")
        certificate = _solution(case, found, remarks, None).certify(samples, seed_step)
        _keep_certificate(case, found, certificate)
        return _solution(case, found, remarks, certificate)


@dataclass(frozen=True)
class Case:
    """A problem with everything that was chosen for it."""

    problem: Problem
    assigner: Assigner
    options: Options
    rows: Rows
    mass: NDArray[Any] | None  # as the user gave it
    init: NDArray[Any] | None = None  # heights (n,) of a warm start, in the frame
    run: Run | None = None


def _drive(
    case: Case, progress: Progress | None, remarks: tuple[str, ...], show: bool | None, on_event: Listen | None
) -> Solution:
    """Runs a case from the start, or from ``progress``, to its end; the caller holds the lock of the run folder.

    A progress that has a reason to stop gets its certificate only.
    """
    problem, assigner, options, run = case.problem, case.assigner, case.options, case.run
    with listener(show, on_event) as listen:
        watch = Watch(run, listen, options.max_seconds, options.checkpoint_seconds)
        with watch.signals():
            if run is not None and run.config["options"] != options.to_dict():
                run.config["options"] = options.to_dict()
                run.save_json("config.json", run.config)
            watch.tell(
                "begin" if progress is None else "resume",
                latents=len(problem.target.atom_of),
                atoms=problem.target.n,
                dim=problem.target.dim,
                source=problem.source.kind,
                assigner=assigner.name,
                device=str(problem.target.atoms.device),
                step=0 if progress is None else progress.state.step,
                samples=0 if progress is None else progress.state.samples,
                goal=options.until_chi2,
            )
            for note in problem.target.notes + remarks:
                watch.tell("note", text=note)
                warnings.warn(note, DistotWarning, stacklevel=3)
            if progress is None:
                progress = solver.begin(problem, assigner, options, watch, case.init)
            if progress.reason is None:
                progress = solver.iterate(problem, assigner, options, watch, progress)
            watch.save(progress.state.step, progress.arrays(), progress.scalars(), must=True)
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
    return Solution(
        case.problem, case.assigner, progress, case.options, case.rows, case.mass, case.run, certificate, remarks
    )


def _farewell(run: Run | None, number: int) -> str:
    name = signal.Signals(number).name
    if run is None:
        return f"stopped by {name}; the solution so far is in this exception's .solution"
    return f"stopped by {name}; everything is saved, go on with: distot resume {run.path}"


def _keep_certificate(case: Case, progress: Progress, certificate: Certificate) -> None:
    if case.run is not None:
        case.run.save_json("certificate.json", certificate.to_dict() | {"step": progress.state.step})


def _kept_certificate(case: Case, progress: Progress) -> Certificate | None:
    """The certificate in the run folder, if it is that of these heights."""
    stored = None if case.run is None else case.run.load_json("certificate.json")
    if stored is None or stored.pop("step") != progress.state.step:
        return None
    return Certificate(**stored)


def _init(init: object, problem: Problem, assigner: str) -> NDArray[Any]:
    """Heights (n,) in the frame for a warm start. Raises InputError for heights of another shape, or not finite."""
    target = problem.target
    if isinstance(init, str | Path):
        init = load(init)
    if isinstance(init, Solution):
        if init.problem.target.dim != target.dim:
            raise InputError(f"init was solved in dimension {init.problem.target.dim}, the latents have {target.dim}")
        old = init.problem.target.atoms.device
        return start.transfer(problem, init.problem, init._progress.state.average.to(old), assigner).cpu().numpy()
    heights = np.asarray(init, dtype=np.float64)
    if heights.shape != target.atom_of.shape:
        raise InputError(
            f"init must hold one height for each of the {len(target.atom_of):,} latents, its shape is {heights.shape}; "
            "to start from a run with other latents give the run"
        )
    kept = heights[target.original]
    if not np.isfinite(kept).all():
        raise InputError(f"init holds {int((~np.isfinite(kept)).sum()):,} heights that are NaN or infinite")
    return problem.frame.heights_in(kept, target.tilt)


def _checkpoint_bytes(problem: Problem) -> int:
    """Room for the checkpoints of a run: three, of the pairs of the graph and four vectors."""
    return 3 * (8 * int(optim.PAIRS_MOST) + 40) * problem.target.n


def _rows(latents: object) -> Rows:
    """Latents as rows that can be read by range, in a floating dtype that a store can hold."""
    if isinstance(latents, str | Path):
        return open_latents(latents)
    if isinstance(latents, Tensor):
        latents = (latents.float() if latents.dtype == torch.bfloat16 else latents).detach().cpu().numpy()
    rows = np.asarray(latents)
    if rows.dtype.kind in "iu" or (rows.dtype.kind == "f" and rows.dtype.itemsize not in (2, 4, 8)):
        rows = rows.astype(np.float64)
    return rows.astype(rows.dtype.newbyteorder("="), copy=False)


def _problem(rows: Rows, source: object, mass: NDArray[Any] | None, options: Options) -> Problem:
    if mass is None and isinstance(rows, Latents):
        mass = rows.mass
    problem = build_problem(rows, source, mass, options.seed, options.device)
    if isinstance(rows, Latents) and rows.fingerprint not in (None, problem.target.fingerprint):
        raise StoreError(f"{rows.path} has changed since it was written (its fingerprint differs); ingest it again")
    return problem


def _reference(rows: Rows, run: Path) -> str:
    """How config.json names the latents: relative to the run folder, so that both can move together."""
    return os.path.relpath(rows.path.resolve(), run.resolve()) if isinstance(rows, Latents) else "latents.zarr"


def _open(
    run: str | Path, source: object, latents: object, changes: dict[str, Any]
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
    rows = _rows(latents)
    if list(rows.shape) != config["shape"]:
        raise InputError(f"{run} was solved for latents of shape {tuple(config['shape'])}, these are {rows.shape}")
    mass = folder.array("mass") if config["mass"] else None
    problem = _problem(rows, source, mass, options)
    if problem.target.fingerprint != config["fingerprint"]:
        raise InputError(f"{run} was solved for other latents (their fingerprint differs); give it its own (--latents)")
    init = folder.array("init") if config["init"] else None
    case = Case(
        problem, assign.build(options.assigner, problem.target.atoms, options.recall), options, rows, mass, init, folder
    )
    checkpoint = folder.load_checkpoint()
    if checkpoint is None:
        return case, (), None
    found = solver.restore(checkpoint.arrays, checkpoint.scalars, problem.target.atoms.device)
    return case, checkpoint.remarks, found
