"""A task on workers: done as often as some are lost, each time from the last checkpoint of the run."""

from __future__ import annotations

import tempfile
import time
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.group import Group, Shape, WorkersLost
from cluster.member import Answer
from distot.case import Kept, Listen, Room, as_rows
from distot.errors import InputError, StoreError
from distot.progress import listener
from distot.solution import Facts, Held, Interrupted, Solution
from distot.source import Source
from distot.store import Place, Url, copy_latents, typed
from distot.watch import signals
from distot.work import Load, Solve, Task

FAILURES = 5  # in a row without a new checkpoint, after which the run stops

__all__ = ["Shape", "WorkersLost", "on_workers"]


def on_workers(task: Task, shape: Shape, show: bool | None = None, on_event: Listen | None = None) -> Any:
    """Does a task on all members of a new group, as often as members are lost, and gives what it gives.

    What is in memory goes to a temporary folder, from where the members read it. A solution reads its latents and
    heights from the run folder when they are asked for.
    Raises as the task does; InputError if there is no such cluster, or other nodes could not see what it needs;
    WorkersLost after FAILURES losses in a row without a new checkpoint.
    """
    scratch = tempfile.TemporaryDirectory(prefix="distot-")
    passing = task.run is None
    if isinstance(task, Solve):
        task = _outside(task, shape, Path(scratch.name))
    task = _absolute(task)
    assert task.run is not None
    try:
        answer = _finished(task, task.run, shape, show, on_event, passing)
    except Interrupted as interrupted:
        interrupted.solution.scratch = scratch
        raise
    if answer.facts is None:
        return answer.result
    found = _solution(answer, task, passing)
    found.scratch = scratch
    return found


def _finished(
    task: Task, run: Place, shape: Shape, show: bool | None, on_event: Listen | None, passing: bool
) -> Answer:
    """The answer of a group that has done the task."""
    began, failures, newest = time.monotonic(), 0, _newest(run)
    with listener(show, on_event) as listen, Group(shape, listen) as group, signals(group):
        while True:
            answer = group.run(task, time.monotonic() - began)
            if answer.kind == "done":
                return answer
            if answer.kind == "refused":
                assert answer.error is not None
                raise answer.error
            leaving = group.leaving()
            if answer.kind == "interrupted" and (group.signal is not None or not leaving):
                raise Interrupted(str(answer.error), _solution(answer, task, passing), answer.signal)
            for rank in leaving:
                group.move(rank)
            text = f"{answer.error}" if answer.kind == "broken" else f"workers {leaving} are on nodes that will go"
            failures = 1 if _newest(run) != newest else failures + 1
            newest = _newest(run)
            if failures > FAILURES:
                more = f"go on with: distot resume {typed(run)}" if run.exists() else "nothing was kept"
                raise WorkersLost(f"{failures} losses in a row without progress, the last one: {text}; {more}")
            note = f"lost {text}; going on from the last checkpoint"
            group.tell({"event": "warning", "time": time.time(), "seconds": time.monotonic() - began, "text": note})
            group.mend()
            task = task.again()


def _newest(run: Place) -> str:
    """The newest checkpoint of a run."""
    latest = run / "LATEST"
    return latest.read_text() if latest.is_file() else ""


class Found:
    """What workers have left in a run folder, for ``Solution.held``: read when it is asked for.

    Raises StoreError if the run has gone on since.
    """

    def __init__(self, task: Load, facts: Facts, passing: bool) -> None:
        self.task, self.facts, self.passing = task, facts, passing

    @cached_property
    def kept(self) -> Kept:
        solution = self.task(Room())
        if (solution.samples, solution.history) != (self.facts.samples, self.facts.history):
            raise StoreError(
                f"{self.task.run} has gone on since this solution was found; distot.load has its newest heights"
            )
        assert isinstance(solution.hold, Kept)
        return solution.hold

    def __call__(self) -> Held:
        return self.kept()

    def slim(self) -> Kept:
        return self._lasting().slim()

    def __reduce__(self) -> tuple[Any, ...]:
        return self._lasting().__reduce__()

    def __deepcopy__(self, memo: object) -> Found:
        return self

    def _lasting(self) -> Kept:
        """With the latents in memory, if the run goes with the solution."""
        case = self.kept.case
        if not self.passing:
            return self.kept
        return Kept(replace(case, rows=case.rows[0 : case.rows.shape[0]], run=None), self.kept.progress)


def _solution(answer: Answer, task: Any, passing: bool) -> Solution:
    """passing: the run is in a temporary folder."""
    assert answer.facts is not None
    source = task.source if callable(task.source) or isinstance(task.source, Source) else None
    opened = Load(task.run, source, None if isinstance(task, Solve) else task.latents)
    return Solution(answer.facts, answer.certificate, Found(opened, answer.facts, passing))


def _outside(task: Solve, shape: Shape, folder: Path) -> Solve:
    """The same task with all that it needs in files."""
    inside = not isinstance(task.latents, Path | Url)
    if shape.ray is not None and (inside or task.run is None):
        raise InputError(
            "other nodes do not see what is in memory here: give latents and run as paths that all nodes can reach"
        )
    if inside:
        copy_latents(as_rows(task.latents), task.mass, folder / "latents.zarr", "from memory")
        task = replace(task, latents=folder / "latents.zarr", mass=None, copies=True)
    if isinstance(task.init, Solution):
        run = task.init.run
        task = replace(task, init=run.path if run is not None else task.init.save(folder / "init.zarr"))
    return replace(task, run=task.run or folder / "run.zarr")


def _absolute(task: Any) -> Any:
    """A task whose paths are found from any folder."""
    paths = {field.name: getattr(task, field.name) for field in fields(task)}
    return replace(task, **{name: path.resolve() for name, path in paths.items() if isinstance(path, Path)})
