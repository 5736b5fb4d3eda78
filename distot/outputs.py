"""Tasks that write what a map gives to files: latents of samples, and new latents.

A zarr store is written in a stream: what is there stays readable whatever happens, and the same task goes on behind it.
Legend: B samples, d dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from distot.atoms import ROWS, Rows
from distot.case import Room, locked
from distot.errors import InputError
from distot.generate import Generated, Mixing
from distot.solution import stored_sums
from distot.store import Place, RowWriter, Run, Url, new_file, new_rows, open_latents, read_npy
from distot.work import Load, Opened, Task


def _samples(samples: Place | NDArray[Any]) -> Rows:
    """Samples that can be read by range. Raises InputError for what is no matrix of numbers."""
    if isinstance(samples, Path) and samples.suffix == ".npy":
        samples = read_npy(samples)
    rows = open_latents(samples) if isinstance(samples, Path | Url) else samples
    if len(rows.shape) != 2 or rows.dtype.kind not in "fiu":
        raise InputError(f"samples must be real and of shape (B, d), not {rows.dtype} {tuple(rows.shape)}")
    return rows


@dataclass(frozen=True)
class AssignFile(Opened):
    """The latents of samples (B, d), written by the first process to ``out`` (B,), an npy file or a zarr store; B.

    Raises as ``api.assign_file`` does.
    """

    samples: Place | NDArray[Any] = field(kw_only=True)
    out: Place = field(kw_only=True)

    def __call__(self, room: Room) -> int:
        rows, out = _samples(self.samples), self.out
        solution = Load(self.run, self.source, self.latents, self.changes)(room)
        about = {"rows of": "latents", "run": str(self.run), "latents": solution.problem.target.fingerprint}
        about["samples"] = str(self.samples) if isinstance(self.samples, Path | Url) else "from memory"
        with _index_file(out, rows.shape[0], about, room) as (begin, write):
            for first in range(begin, rows.shape[0], ROWS):
                write(solution.assign(np.array(rows[first : first + ROWS])))
        return int(rows.shape[0])

    def again(self) -> Task:
        return self


@contextmanager
def _index_file(
    out: Place, rows: int, about: dict[str, Any], room: Room
) -> Iterator[tuple[int, Callable[[NDArray[np.int64]], None]]]:
    """Where to go on, and what takes the numbers of the next rows; the first process writes them."""
    if out.suffix != ".npy":
        with new_rows(out, rows, {"index": ("int64", None)}, about) if room.grid.leads else nullcontext() as writer:
            begin = room.grid.world.objects(writer.written if writer is not None else 0)[0]
            yield begin, lambda found: None if writer is None else writer.write({"index": found})
        return
    with new_file(out) if room.grid.leads else nullcontext() as partial:
        file = None if partial is None else open_memmap(partial, "w+", np.int64, (rows,))
        done = 0

        def write(found: NDArray[np.int64]) -> None:
            nonlocal done
            if file is not None:
                file[done : done + len(found)] = found
            done += len(found)

        yield 0, write
        if file is not None:
            file.flush()


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

    def __call__(self, room: Room) -> Made:
        folder = Run(self.run)
        case, remarks, found = self.begun(folder, room)
        solution, problem, world = case.solution(found, remarks), case.problem, room.grid.world
        solution.quadratic_only("generation")
        if stored_sums(folder, problem, found.state.step) is None:
            sums = solution.sums()
            with locked(folder, room):
                kept = {"step": found.state.step, "samples": sums.samples, "orbits": sums.orbits}
                folder.save_cells(found.state.step, sums.part(problem), kept, world)
        generator = solution.generator(self.mixing, self.seed)
        about = {"rows of": "generated latents", "latents": problem.target.fingerprint, "step": found.state.step}
        about |= {"seed": generator.seed, "mixing": asdict(self.mixing), "threshold": generator.threshold}
        columns = {"z": ("float32", problem.target.dim), "index": ("int64", None)}
        with new_rows(self.out, self.n, columns, about) if room.grid.leads else nullcontext() as writer:
            state = {"block": 0, "skip": 0, "drawn": 0, "singular": 0}
            state, done = world.objects((state | writer.state, writer.written) if writer is not None else None)[0]
            blocks = generator.blocks(state["block"])
            while done < self.n:
                block = next(blocks)
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


def _write(writer: RowWriter, block: Generated, state: dict[str, Any], end: int) -> None:
    """Appends samples of a block up to number ``end``, shard by shard, each with the state to go on from."""
    begin = state["skip"]
    while begin < end:
        stop = min(end, begin + writer.left)
        rows: dict[str, NDArray[Any]] = {"z": block.samples[begin:stop], "index": block.index[begin:stop]}
        writer.write(rows, state | {"skip": stop})
        begin = stop
