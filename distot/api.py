"""The verbs: solve, resume, load, certify. The command line calls these and nothing below them.

Legend: N latents, d dimension.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distot import assign, solver
from distot.certify import Certificate
from distot.errors import DistotWarning, InputError, StoreError
from distot.problem import Problem, build_problem
from distot.progress import listener
from distot.schedule import Options, StopRule, batch
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
    checkpoint_seconds: float = 60.0,
    certificate_samples: int | None = None,
    progress: bool | None = None,
    on_event: Listen | None = None,
) -> Solution:
    """Solves semi-discrete optimal transport from ``source`` to the latents, cost ½|x - y|².

    latents: array or tensor (N, d), or the path of a zarr store (``distot ingest`` makes one).
    source: "gaussian" N(0, I), "cube" [0, 1]^d, "ball", "sphere" (radius 1), a ``distot.Source``, an array of samples
        (n, d), or a callable (numpy Generator, n) -> (n, d).
    mass: (N,) wanted masses; None is the store's own, or uniform.
    until_chi2: stop when the squared relative error of the cell masses, math (8), is below this with 95 % confidence.
    max_samples, max_seconds: budgets; the answer so far is returned when one is spent.
    seed: the answer is a function of it, whatever the interruptions.
    run: a new run folder for checkpoints and the log, from which ``resume`` and ``load`` go on.
    progress: show it on the terminal; None means if stderr is one. on_event: gets every event as a dict.

    Raises InputError or StoreError before work starts for what can be known by then; Interrupted on Ctrl-C or SIGTERM,
    which carries the solution so far.
    """
    options = Options(
        until_chi2, max_samples, max_seconds, seed, device, assigner, checkpoint_seconds, certificate_samples
    )
    if run is not None and Path(run).exists():
        raise StoreError(f"{run} exists already; continue it with `distot resume {run}`, or choose another name")
    rows = _rows(latents)
    given = None if mass is None else np.asarray(mass)
    problem = _problem(rows, source, given, options)
    folder = None
    if run is not None:
        config, arrays = describe(problem, options, _reference(rows, Path(run)), given)
        copy = None if isinstance(rows, Latents) else (rows, None)
        need_space(Path(run), 3 * 80 * problem.target.n + (0 if copy is None else np.asarray(rows).nbytes))
        folder = Run.create(run, config, arrays, copy)
    return _drive(problem, options, rows, given, folder, None, (), progress, on_event)


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

    until_chi2, max_samples, max_seconds, device replace the run's own values if given, for good (max_seconds counts anew
    in every process). source is needed if the run draws from a user's callable; latents if they have moved.

    Raises InputError if the latents are not those of the run or nothing is left to do; StoreError if the run is
    missing, locked or damaged.
    """
    folder, problem, options, rows, mass = _open_run(run, source, latents, device)
    changes = {"until_chi2": until_chi2, "max_samples": max_samples, "max_seconds": max_seconds}
    changed = Options(**(options.to_dict() | {k: v for k, v in changes.items() if v is not None}))
    checkpoint = folder.load_checkpoint()
    if checkpoint is None:
        return _drive(problem, changed, rows, mass, folder, None, (), progress, on_event)
    found = solver.restore(checkpoint.arrays, checkpoint.scalars, problem.target.atoms.device)
    if changed.until_chi2 != options.until_chi2 and found.history:
        found = replace(found, next_check=StopRule(problem.target.n, changed.until_chi2).next(found.history))
    if found.reason == "until_chi2" and (changed.until_chi2 or 0.0) >= (options.until_chi2 or 0.0):
        raise InputError(
            f"{run} has reached its goal of chi2 <= {options.until_chi2:g}; give a smaller --until-chi2 to go on"
        )
    spent = found.state.samples + batch(problem.target.n, found.state.time)
    if found.started and changed.max_samples is not None and changed.max_samples < spent:
        raise InputError(f"{run} has spent its {changed.max_samples:,} samples; give a larger --max-samples to go on")
    return _drive(problem, changed, rows, mass, folder, found, checkpoint.remarks, progress, on_event)


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
    folder, problem, options, rows, mass = _open_run(run, source, latents, device)
    checkpoint = folder.load_checkpoint()
    if checkpoint is None:
        raise StoreError(f"{run} has no checkpoint yet; go on with: distot resume {run}")
    found = solver.restore(checkpoint.arrays, checkpoint.scalars, problem.target.atoms.device)
    stored = folder.load_json("certificate.json")
    certificate = None
    if stored is not None and stored.pop("step") == found.state.step:
        certificate = Certificate(**stored)
    assigner = assign.build(options.assigner, problem.target.atoms)
    return Solution(problem, assigner, found, options, rows, mass, folder, certificate, checkpoint.remarks)


def certify(
    run: str | Path,
    samples: int | None = None,
    seed_step: int = 0,
    *,
    source: object = None,
    latents: ArrayLike | Tensor | str | Path | None = None,
    device: str | None = None,
) -> Solution:
    """Certifies a run anew and keeps the certificate in it; ``seed_step`` > 0 draws other, independent samples."""
    found = load(run, source=source, latents=latents, device=device)
    replaced = found.certify(samples, seed_step)
    assert found.run is not None
    with found.run.lock():
        _keep_certificate(found.run, replaced, found._progress)
    found._certificate = replaced
    return found


def _drive(
    problem: Problem,
    options: Options,
    rows: Rows,
    mass: NDArray[Any] | None,
    run: Run | None,
    progress: Progress | None,
    remarks: tuple[str, ...],
    show: bool | None,
    on_event: Listen | None,
) -> Solution:
    """Runs a problem from the start or from ``progress`` to its end, under the lock of the run folder."""
    with listener(show, on_event) as listen:
        watch = Watch(run, listen, options.max_seconds, options.checkpoint_seconds)
        with run.lock() if run is not None else watch.signals(), watch.signals():
            if run is not None and run.config["options"] != options.to_dict():
                run.config["options"] = options.to_dict()
                run.save_json("config.json", run.config)
            assigner = assign.build(options.assigner, problem.target.atoms)
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
            if progress is None or not progress.started:
                progress = solver.begin(problem, assigner, options, watch)
            if progress.started:
                progress = solver.iterate(problem, assigner, options, watch, progress)
            watch.save(progress.state.step, progress.arrays(), progress.scalars(), must=True)
            solution = Solution(problem, assigner, progress, options, rows, mass, run, None, remarks)
            watch.tell("stop", reason=progress.reason, text=solution.explanation, samples=progress.state.samples)
            if watch.signal is not None:
                raise Interrupted(_farewell(run, watch.signal), solution, watch.signal)
            certificate = solver.conclude(problem, assigner, options, progress, watch)
            if run is not None:
                _keep_certificate(run, certificate, progress)
            watch.tell("certificate", **certificate.to_dict())
            return Solution(problem, assigner, progress, options, rows, mass, run, certificate, remarks)


def _farewell(run: Run | None, number: int) -> str:
    name = signal.Signals(number).name
    if run is None:
        return f"stopped by {name}; the solution so far is in this exception's .solution"
    return f"stopped by {name}; everything is saved, go on with: distot resume {run.path}"


def _keep_certificate(run: Run, certificate: Certificate, progress: Progress) -> None:
    run.save_json("certificate.json", certificate.to_dict() | {"step": progress.state.step})


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


def _open_run(
    run: str | Path, source: object, latents: object, device: str | None
) -> tuple[Run, Problem, Options, Rows, NDArray[Any] | None]:
    """The problem that a run folder describes, checked to be the same as when the run began."""
    folder = Run(run)
    config = folder.config
    options = Options(**(config["options"] | ({} if device is None else {"device": device})))
    if source is None:
        source = from_spec(config["source"], {k: folder.array(f"source-{k}") for k in config["source_arrays"]})
    elif not isinstance(source, Source) and not callable(source):
        raise InputError(f"source must be the callable or distot.Source that the run began with, not {source!r}")
    if latents is None:
        stored = folder.path / config["latents"]
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
    return folder, problem, options, rows, mass
