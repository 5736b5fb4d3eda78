"""A problem with everything that was chosen for it: made from what a user gives, or opened from a run folder.

Legend: N latents, d dimension, n atoms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distot import assign, exact, optim, solver, start
from distot.assign import Assigner
from distot.atoms import Rows
from distot.certify import Certificate
from distot.errors import InputError, StoreError
from distot.given import array
from distot.grid import Grid
from distot.identity import belongs, check_source, heights_of, masses_of
from distot.problem import Problem, build_problem, least_chi2
from distot.schedule import Options, options_of
from distot.solution import Facts, Held, Solution, describe, problem_mass, stored_certificate
from distot.solver import Progress
from distot.source import Source, as_source, from_spec
from distot.store import (
    LOST,
    Dropped,
    Latents,
    Place,
    Run,
    Url,
    as_place,
    need_space,
    open_latents,
    reference,
    referred,
)
from distot.target import Cache
from distot.watch import Event

Listen = Callable[[Event], None]
OWN_LATENTS = "latents.zarr"  # in a run that has a copy of them


@dataclass(frozen=True)
class Room:
    """Where a task is done: the place in a grid, and who hears of it."""

    grid: Grid = field(default_factory=Grid)
    cache: Cache = field(default_factory=dict)  # of latents that were read, for when the same share is built again
    show: bool | None = None  # progress on the terminal; None: if it is one
    on_event: Listen | None = None
    asked: Callable[[], int | None] = lambda: None  # the number of a signal that was sent to the whole grid
    group: str | None = None  # name of the grid, for the lock of the run folder
    spent: float = 0.0  # seconds of the time limit that were spent before, by processes that were lost
    level: int = 5  # of the caller's frame, for warnings


@dataclass(frozen=True)
class Case:
    """What a solve works on."""

    problem: Problem
    assigner: Assigner
    options: Options
    rows: Rows
    mass: NDArray[Any] | None  # as the user gave it
    init: NDArray[Any] | None = None  # heights of own atoms for a warm start, in the frame
    run: Run | None = None

    def solution(
        self, progress: Progress, remarks: tuple[str, ...] = (), certificate: Certificate | None = None
    ) -> Solution:
        target = self.problem.target
        facts = Facts(
            self.options,
            (target.latents, target.dim),
            progress.state.samples,
            progress.history,
            progress.reason,
            target.notes + remarks,
            None if self.run is None else self.run.anywhere(),
        )
        return Solution(facts, certificate, Kept(self, progress))

    def keep(self, certificate: Certificate, progress: Progress) -> None:
        """Writes the certificate of these heights to the run folder, if there is one."""
        if self.run is None:
            return
        of = {"step": progress.state.step, "heights": heights_of(self.problem, progress.state.average)}
        if self.problem.grid.leads:
            self.run.save_json("certificate.json", certificate.to_dict() | of)

    def kept(self, progress: Progress) -> Certificate | None:
        """The certificate in the run folder, if it is that of these heights."""
        heights = heights_of(self.problem, progress.state.average)
        if self.run is None or (stored := stored_certificate(self.run)) is None:
            return None
        certificate, of = stored
        return certificate if belongs(of, progress.state.step, heights) else None

    @property
    def checkpoint_bytes(self) -> int:
        """Room for the checkpoints of a run: three, of the pairs of the graph and four vectors."""
        return 3 * (8 * int(optim.PAIRS_MOST) + 40) * self.problem.target.n

    def create(self, path: Place, copies: bool) -> None:
        """A new run folder, with a copy of latents that are in memory, or of all if it ``copies``."""
        rows = self.rows
        copies = copies or not isinstance(rows, Latents)
        latents = reference(rows.path, path) if isinstance(rows, Latents) and not copies else OWN_LATENTS
        config, arrays = describe(self.problem, self.options, latents, self.mass, rows)
        config["init"] = self.init is not None
        arrays |= {} if self.init is None else {"init": self.init}
        n, d = rows.shape
        need_space(path, self.checkpoint_bytes + copies * n * d * rows.dtype.itemsize)
        Run.create(path, config, arrays, (rows, None) if copies else None)


def new_case(latents: object, source: object, mass: NDArray[Any] | None, options: Options, room: Room) -> Case:
    """The case of what a user gives. Raises InputError or StoreError for what cannot be used."""
    rows = as_rows(latents)
    problem = _problem(rows, read_source(source), mass, options, room, merge=not options.exact)
    problem = _within_reach(problem, options)
    search = assign.over(problem, options.assigner, options.recall)
    start.check_sight(problem, search)
    return Case(problem, search, options, rows, mass)


def open_case(
    folder: Run, source: object, latents: object, changes: dict[str, Any], room: Room
) -> tuple[Case, tuple[str, ...], Progress | None]:
    """The case in a run folder with ``changes`` to its options, remarks on damage, and its newest good checkpoint.

    The problem is checked to be the same as when the run began.
    """
    run, config = folder.path, folder.config
    options = replace(options_of(folder), **changes)
    arrays = {name: folder.array(f"source-{name}") for name in config["source_arrays"]}
    if source is None:
        source = _stored_source(folder, arrays)
    elif not isinstance(source, Source) and not callable(source):
        raise InputError(f"source must be the callable or distot.Source that the run began with, not {source!r}")
    else:
        check_source(as_source(source, config["shape"][1]), config["source"], arrays, str(run))
    rows = _stored_latents(folder) if latents is None else as_rows(latents)
    if list(rows.shape) != config["shape"]:
        raise InputError(f"{run} was solved for latents of shape {tuple(config['shape'])}, these are {rows.shape}")
    mass = folder.array("mass") if config["mass"] else None
    if "masses" in config and config["masses"] != masses_of(problem_mass(mass, rows), rows.shape[0]):
        raise InputError(f"{run} was solved for other masses of the latents; give it its own latents (--latents)")
    problem = _problem(rows, source, mass, options, room, merge=config.get("merged", False))
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


def _stored_source(run: Run, arrays: dict[str, NDArray[Any]]) -> Source:
    """The source of a run. Raises InputError if that is code, StoreError if it is damaged."""
    try:
        found = from_spec(run.config["source"], arrays)
    except (LookupError, TypeError, ValueError) as error:
        if run.config["source"]["kind"] == "sampler":
            raise
        raise StoreError(f"the source of {run.path} is damaged ({error}); {LOST}") from error
    if found.dim != run.config["shape"][1]:
        raise StoreError(f"the source of {run.path} is damaged (its dimension is {found.dim}); {LOST}")
    if lacking := ", ".join(found.spec()[1].keys() - arrays.keys()):
        raise StoreError(f"the source of {run.path} is damaged (it lacks its {lacking}); {LOST}")
    return found


def _stored_latents(run: Run) -> Latents:
    """The latents of a run, where it says that they are.

    A run from elsewhere may name any place. Opened are files of numbers, whose fingerprint must be the run's; of object
    stores those whose kind the run is in, or which were named when it was written in this very folder.
    """
    try:
        stored = referred(run.config["latents"], run.path)
    except InputError as error:
        raise StoreError(f"{run.path / 'config.json'} is damaged ({error}); {LOST}") from error
    near = isinstance(run.path, Url) and isinstance(stored, Url) and run.path.scheme == stored.scheme
    if isinstance(stored, Url) and not (near or run.settled):
        raise StoreError(
            f"{run.path} was not written in this folder, and says that its latents are at {stored}; if your "
            f"credentials may be used for that address, say so: --latents {stored}"
        )
    if not stored.exists():
        raise StoreError(f"the latents of {run.path} are not at {stored} any more; say where they are (--latents)")
    return open_latents(stored, links=run.config["latents"] != OWN_LATENTS)


@contextmanager
def locked(run: Run, room: Room) -> Iterator[None]:
    """The first process holds the lock of the run folder."""
    if not room.grid.leads:
        yield
        return
    with run.lock(room.group):
        yield


def as_rows(latents: object) -> Rows:
    """Latents as rows that can be read by range, in a floating dtype that a store can hold."""
    if isinstance(latents, str | Path | Url):
        return open_latents(latents)
    rows = array(latents, "the array of latents")
    if rows.dtype.kind in "iu" or (rows.dtype.kind == "f" and rows.dtype.itemsize not in (2, 4, 8)):
        rows = rows.astype(np.float64)
    return rows.astype(rows.dtype.newbyteorder("="), copy=False)


def read_source(source: object) -> object:
    """A source as ``as_source`` takes it: of the path of a store, its rows."""
    place = source_place(source)
    return source if place is None else open_latents(place)


def source_place(source: object) -> Place | None:
    """Where the rows of a source are, if it is given as a path."""
    named = isinstance(source, Path | Url) or (isinstance(source, str) and source.endswith(".zarr"))
    return as_place(source) if named else None  # type: ignore[arg-type]


def _problem(rows: Rows, source: object, mass: Any, options: Options, room: Room, merge: bool) -> Problem:
    if mass is None and isinstance(rows, Latents):
        mass = rows.mass
    given = options.seed, options.device, room.grid, room.cache, options.memory, options.cost, merge
    problem = build_problem(rows, source[:] if isinstance(source, Latents) else source, mass, *given)
    if options.exact:
        exact.check(problem.source, problem.grid.world.size)
    solver.entropic_part(problem, options)  # refuses what it cannot be computed for
    if isinstance(rows, Latents) and rows.fingerprint not in (None, problem.target.fingerprint):
        raise StoreError(f"{rows.path} has changed since it was written (its fingerprint differs); ingest it again")
    notes = tuple(note for its in (rows, source) if isinstance(its, Latents) for note in its.notes)
    return replace(problem, target=replace(problem.target, notes=notes + problem.target.notes)) if notes else problem


def _within_reach(problem: Problem, options: Options) -> Problem:
    """The problem with a note if its goal cannot be met. Raises InputError if nothing else would end the run."""
    points, floor = least_chi2(problem) if options.epsilon is None else (0, 0.0)
    goal, notes = options.until_chi2, problem.target.notes
    if points and (floor >= goal if goal is not None else points < problem.target.n):
        text = (
            f"the source is {points:,} samples for {problem.target.n:,} latents, and each goes to one of them: chi2 "
            f"stays above {floor:.3g} whatever the heights"
        )
        remedy = "give more samples, a callable that draws new ones, or a goal above that"
        if options.max_samples is None and options.max_seconds is None:
            raise InputError(f"{text}, and the goal of {goal} cannot be met; {remedy}, or a budget")
        notes += (f"{text}; {remedy}",)
    line = problem.target.dim == 1 and options.epsilon is None and not problem.cost.spherical
    if line and problem.source.quantiles(torch.tensor([0.5], dtype=torch.float64)) is None:
        notes += (
            "on a line sampling gets slower the more latents there are, and may not reach its goal; a source with a "
            "formula for its quantiles (gaussian, cube, ball) is solved at once",
        )
    return replace(problem, target=replace(problem.target, notes=notes))


class Kept:
    """What is in memory of a solution, for ``Solution.held``; a pickle of it is what makes it anew elsewhere.

    whole: the pickle has all of the progress, and not the heights alone.
    """

    def __init__(self, case: Case, progress: Progress, whole: bool = True) -> None:
        self.case, self.progress, self.whole = case, progress, whole

    def __call__(self) -> Held:
        case = self.case
        return Held(case.problem, case.assigner, self.progress, case.rows, case.mass)

    def slim(self) -> Kept:
        return Kept(self.case, self.progress, False)

    def __reduce__(self) -> tuple[type[Packed], tuple[Any, ...]]:
        case, problem = self.case, self.case.problem
        content = problem.source, case.mass, case.options, problem.target.fingerprint, problem.target.merge
        progress = _with(self.progress, lambda its: its.cpu().numpy())
        return Packed, (_place(case), *content, progress if self.whole else _slim(progress), self.whole)

    def __deepcopy__(self, memo: object) -> Kept:
        return self  # nothing of it ever changes


@dataclass(frozen=True)
class Packed:
    """A solution on its way to another process, which builds the problem when it is asked for."""

    latents: Place | NDArray[Any]
    source: Source
    mass: NDArray[Any] | None
    options: Options
    fingerprint: str
    merge: bool
    progress: Progress  # with arrays instead of tensors
    whole: bool = True

    def __call__(self) -> Held:
        rows = as_rows(self.latents)
        problem = _problem(rows, self.source, self.mass, self.options, Room(), self.merge)
        if problem.target.fingerprint != self.fingerprint:
            raise StoreError(
                f"the latents at {self.latents} are others than those that were solved for (their fingerprint "
                "differs); put those back, or solve for these"
            )
        device = problem.target.atoms.device
        progress = _with(self.progress, lambda its: torch.as_tensor(its, device=device))
        search = assign.over(problem, self.options.assigner, self.options.recall)
        return Held(problem, search, progress, rows, self.mass, self.whole)

    def slim(self) -> Packed:
        return replace(self, progress=_slim(self.progress), whole=False)

    def __deepcopy__(self, memo: object) -> Packed:
        return self


def _with(progress: Progress, by: Callable[[Any], Any]) -> Progress:
    """The same progress, its tensors changed into something else."""
    state = progress.state
    vectors = {name: by(its) for name, its in state.vectors.items()}
    return replace(progress, state=replace(state, pairs=tuple(map(by, state.pairs)), **vectors))


def _slim(progress: Progress) -> Progress:
    """The heights alone."""
    state, none = progress.state, progress.state.average[:0]
    few = replace(state, heights=state.average, margin_sum=none, margin_count=none, pairs=(), drawn=())
    few = replace(few, twin_sum=None, twin_count=None)
    return replace(progress, state=few)


def _place(case: Case) -> Place | NDArray[Any]:
    """Where another process finds the latents of a case; those in memory themselves, if no file has them."""
    if isinstance(case.rows, Latents):
        return case.rows.place
    copied = None if case.run is None else case.run.anywhere().path / OWN_LATENTS
    if case.run is not None and copied is not None and case.run.config["latents"] == copied.name and copied.exists():
        return copied
    return np.asarray(case.rows)
