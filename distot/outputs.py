"""Tasks that write what a map gives to files: latents of samples, and new latents.

A zarr store is written in a stream: what is there stays readable whatever happens, and the same task goes on behind it.
Legend: B samples, d dimension.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distot.atoms import ROWS, Rows
from distot.case import Room, locked
from distot.cells import Sums
from distot.errors import InputError, StoreError
from distot.fingerprint import hashed
from distot.generate import Generated, Mixing
from distot.problem import Problem
from distot.schedule import MOST
from distot.solution import stored_sums
from distot.store import (
    Place,
    RowWriter,
    Run,
    Url,
    check_out,
    new_npy,
    new_rows,
    open_latents,
    read_npy,
)
from distot.work import Load, Opened, Task

Write = Callable[[NDArray[Any], NDArray[np.int64]], None]
"""Takes the next samples (B, d) and their latents (B,)."""


def _samples(samples: Place | NDArray[Any]) -> Rows:
    """Samples that can be read by range. Raises InputError for what is no matrix of numbers."""
    if isinstance(samples, Path) and samples.suffix == ".npy":
        samples = read_npy(samples)
    rows = open_latents(samples) if isinstance(samples, Path | Url) else samples
    if len(rows.shape) != 2 or rows.dtype.kind not in "fiu":
        raise InputError(f"samples must be real and of shape (B, d), not {rows.dtype} {tuple(rows.shape)}")
    return rows


def notes_on(samples: object) -> tuple[str, ...]:
    """What the user should know of samples that another program has stored."""
    if not isinstance(samples, Path | Url) or samples.suffix == ".npy":
        return ()
    return open_latents(samples).notes


@dataclass(frozen=True)
class AssignFile(Opened):
    """The latents of samples (B, d), written by the first process to ``out`` (B,), an npy file or a zarr store; B.

    Raises as ``api.assign_file`` does.
    """

    samples: Place | NDArray[Any] = field(kw_only=True)
    out: Place = field(kw_only=True)

    def check(self) -> None:
        """Raises InputError or StoreError if nothing may be written there."""
        check_out(self.out, *self.reads(), self.samples, goes_on=self.out.suffix != ".npy")

    def __call__(self, room: Room) -> int:
        self.check()
        rows = _samples(self.samples)
        solution = Load(self.run, self.source, self.latents, self.changes)(room)
        if rows.shape[0] < 1 or rows.shape[1] != solution.facts.shape[1]:
            raise InputError(f"samples must have shape (B, {solution.facts.shape[1]}), B >= 1, not {tuple(rows.shape)}")
        with _index_file(self.out, rows, solution.decided(), room) as (begin, write):
            for first in range(begin, rows.shape[0], ROWS):
                x = np.array(rows[first : first + ROWS])
                write(x, solution.assign(x))
        return int(rows.shape[0])

    def again(self) -> Task:
        return self


@contextmanager
def _index_file(out: Place, rows: Rows, about: dict[str, Any], room: Room) -> Iterator[tuple[int, Write]]:
    """Where to go on, and what takes the next samples and their latents; the first process writes them."""
    count, leads = rows.shape[0], room.grid.leads
    if out.suffix == ".npy":
        with new_npy(out, (count,), np.int64) if leads else nullcontext() as put:
            yield 0, lambda x, found: None if put is None else put(found)
        return
    about = {"rows of": "latents"} | about
    with new_rows(out, count, {"index": ("int64", None)}, about) if leads else nullcontext() as writer:
        seen = None if writer is None else _seen(rows, writer)
        begin = room.grid.world.objects(0 if writer is None else writer.written)[0]

        def write(x: NDArray[Any], found: NDArray[np.int64]) -> None:
            while writer is not None and seen is not None and len(found):
                part = slice(0, writer.left)
                seen.update(np.ascontiguousarray(x[part]).tobytes())
                writer.write({"index": found[part]}, {"samples": seen.hexdigest()})
                x, found = x[part.stop :], found[part.stop :]

        yield begin, write


def _seen(rows: Rows, writer: RowWriter) -> Any:
    """The hash of the samples whose latents are written. Raises InputError if these are others."""
    seen = hashlib.sha256(f"{rows.dtype.newbyteorder('<').str} {tuple(rows.shape)}".encode())
    for first in range(0, writer.written, ROWS):
        seen.update(np.ascontiguousarray(rows[first : min(first + ROWS, writer.written)]).tobytes())
    if writer.written and writer.state.get("samples") != seen.hexdigest():
        raise InputError(
            f"{writer.path} holds the latents of {writer.written:,} samples, and these samples are others; give those, "
            f"choose another name, or delete {writer.path}"
        )
    return seen


@dataclass(frozen=True)
class Made:
    """What ``Generate`` has done. samples: in the store; drawn: of noise; singular: of these, without a neighbour to
    mix with; threshold: the largest angle of cells that were mixed."""

    samples: int
    drawn: int
    singular: int
    threshold: float


@dataclass(frozen=True)
class Generate(Opened):
    """New latents, written by the first process to a store of rows; statistics of cells are kept in the run.

    Raises as ``api.generate_file`` does.
    """

    out: Place = field(kw_only=True)
    n: int = field(kw_only=True)
    mixing: Mixing = field(kw_only=True)
    seed: int | None = field(kw_only=True)

    def check(self) -> None:
        """Raises InputError if nothing may be written there."""
        check_out(self.out, *self.reads(), goes_on=True)

    def __call__(self, room: Room) -> Made:
        self.check()
        folder = Run(self.run)
        case, remarks, found = self.begun(folder, room)
        solution, problem, world = case.solution(found, remarks), case.problem, room.grid.world
        solution.quadratic_only("generation")
        decided, sums = solution.decided(), stored_sums(folder, solution.held)
        if sums is None:
            sums = solution.sums()
            with locked(folder, room):
                kept = {"step": found.state.step, "samples": sums.samples, "orbits": sums.orbits}
                kept |= {"heights": decided["heights"]}
                folder.save_cells(found.state.step, sums.part(problem), kept, world)
        generator = solution.generator(self.mixing, self.seed)
        about = {"rows of": "generated latents"} | decided | {"cells": _cells(problem, sums)}
        about |= {"seed": generator.seed, "mixing": asdict(self.mixing), "threshold": generator.threshold}
        columns = {"z": ("float32", problem.target.dim), "index": ("int64", None)}
        with new_rows(self.out, self.n, columns, about) if room.grid.leads else nullcontext() as writer:
            state = {"block": 0, "skip": 0, "drawn": 0, "singular": 0}
            state, done = world.objects((state | writer.state, writer.written) if writer is not None else None)[0]
            damaged = StoreError(f"{self.out} is damaged: it goes on at {state}; delete it, and begin anew")
            if not all(isinstance(its, int) and 0 <= its < MOST for its in state.values()):
                raise damaged
            blocks = generator.blocks(state["block"])
            while done < self.n:
                block = next(blocks)
                if state["skip"] > len(block.index):
                    raise damaged
                if state["skip"] == 0:  # else it was counted already
                    state["drawn"] += block.drawn
                    state["singular"] += len(block.singular)
                end = min(len(block.index), state["skip"] + self.n - done)
                if writer is not None:
                    _write(writer, block, state, end)
                done += end - state["skip"]
                state |= {"block": state["block"] + 1, "skip": 0}
        return Made(self.n, state["drawn"], state["singular"], generator.threshold)

    def again(self) -> Task:
        return self


def _cells(problem: Problem, sums: Sums) -> str:
    """A hash of what was measured of the cells of all atoms."""
    own = torch.from_numpy(np.stack([sums.total, sums.cost], axis=1))
    return f"{sums.samples} {hashed(problem.target.split.gather(own).numpy())}"


def _write(writer: RowWriter, block: Generated, state: dict[str, Any], end: int) -> None:
    """Appends samples of a block up to number ``end``, shard by shard, each with the state to go on from."""
    begin = state["skip"]
    while begin < end:
        stop = min(end, begin + writer.left)
        rows: dict[str, NDArray[Any]] = {"z": block.samples[begin:stop], "index": block.index[begin:stop]}
        writer.write(rows, state | {"skip": stop})
        begin = stop
