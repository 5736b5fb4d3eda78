"""Pairs in a file: the latents of numbered samples, and all that is needed to draw the noise again elsewhere.

Legend: E samples, N latents, d dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from distot.api import load
from distot.case import as_rows
from distot.errors import DistotWarning, InputError, StoreError
from distot.fingerprint import fingerprint_of
from distot.identity import check_source
from distot.pairs.balance import Balanced, balance, balanced_index
from distot.pairs.coupling import Coupling, Shelf
from distot.pairs.dataset import batch_of
from distot.pairs.loader import Batch, Loader, Plan
from distot.pairs.noise import NOISE, check_seed, from_noise
from distot.solution import Solution
from distot.source import as_source
from distot.store import Latents, Place, RowFile, Url, as_place, check_out, new_rows, typed

KIND = "distot-pairs"
PART = 8192  # samples that are searched and written at a time


def write_pairs(
    solution: Solution | str | Place,
    out: str | Place,
    samples: int | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    orbits: bool = True,
    balanced: bool = False,
    source: object = None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Balanced | None:
    """Searches the pairs of an epoch and writes them to a store, which ``PairFile`` hands out without a search.

    They are those of ``Pairs(solution, seed=seed, samples=samples, epoch=epoch, ...)``. What was written stays,
    whatever happens; the same call goes on behind it. With ``balanced`` the search of the whole epoch comes first, each
    time; what it changed is returned. on_rows is told how many of how many are written.

    Raises InputError for arguments that make no sense, or differ from those of pairs that are begun; StoreError if the
    disk is full, or as ``load`` does.
    """
    found = solution if isinstance(solution, Solution) else load(solution, source=source)
    coupling = Coupling(found, seed, orbits)
    check_seed(seed, epoch)
    count = coupling.latents if samples is None else samples
    if count < 1:
        raise InputError(f"samples must be at least 1, it is {count}")
    check_out(as_place(out), found.run and found.run.path, getattr(found.held.latents, "path", None), goes_on=True)
    about, arrays = coupling.noise.spec()
    decided = {name: value for name, value in found.decided().items() if name not in ("latents", *about)}
    about |= decided | {
        "kind": KIND,
        "epoch": epoch,
        "balanced": balanced,
        "top_k": None if coupling.soft is None else coupling.soft.top_k,
        "shape": list(found.facts.shape),
        "fingerprint": coupling.problem.target.fingerprint,
    }
    with new_rows(out, count, {"index": ("int64", None)}, about, arrays, PART) as rows:
        if rows.complete:
            return None
        done = balance(coupling, epoch, count) if balanced else None
        index = None if done is None else balanced_index(coupling, done, epoch)
        for first in range(rows.written, count, PART):
            last = min(first + PART, count)
            its = coupling.pairs(epoch, first, last)[1] if index is None else index[first:last]
            rows.write({"index": its})
            on_rows(last, count)
    return done


class PairFile(Loader):
    """Batches of pairs that ``write_pairs`` or ``distot pairs`` has searched: as of ``Pairs``, without a search.

    Every iteration has the same pairs; ``set_epoch`` changes their order alone. latents: the array or store that the
    run was solved for, None for (noise, index) alone. source: of pairs whose noise is drawn by your callable. partial:
    take the pairs that are there of a file that is not complete.

    Raises InputError for other latents (their fingerprint differs), or a file that is not complete; StoreError if there
    is none.
    """

    def __init__(
        self,
        path: str | Place,
        latents: object = None,
        batch: int = 256,
        *,
        epoch: int = 0,
        start: int = 0,
        endless: bool = False,
        drop_last: bool | None = None,
        partial: bool = False,
        rank: int | None = None,
        world: int | None = None,
        source: object = None,
    ) -> None:
        self.file = file = RowFile(path)
        self.about, self._place, about = file.about, file.opened.place, file.about
        if about.get("kind") != KIND:
            raise StoreError(f"{path} holds no pairs; distot pairs RUN.zarr {typed(path)} makes some")
        if not file.complete and not partial:
            raise InputError(
                f"{path} has {file.written:,} of {file.rows:,} pairs; give the command that wrote it again to go on, "
                "or partial=True to take those that are there"
            )
        own = None if source is None else as_source(source, about["shape"][1])
        arrays = {name: file.vector(NOISE + name) for name in about["source_arrays"]}
        if own is not None:
            check_source(own, about["source"], arrays, str(path))
        self.noise = from_noise(about, {NOISE + name: its for name, its in arrays.items()}, own)
        self._rows = None if latents is None else _checked(latents, about, str(path))
        plan = Plan(file.written, batch, about["seed"], endless=endless)
        super().__init__(plan, epoch, start, rank, world, drop_last)
        if not file.complete and self.plan.world > 1:
            warnings.warn(
                f"{path} has {file.written:,} of {file.rows:,} pairs: while it is being written ranks may find "
                "different numbers of them, and would then not have equally many batches; wait until it is complete",
                DistotWarning,
                stacklevel=2,
            )
        self.shelf = None if self._rows is None else Shelf(self._rows)  # read once, before workers are forked

    @cached_property
    def file(self) -> RowFile:
        """The pairs, in another process. Raises StoreError if others lie there now."""
        found = RowFile(self._place)
        if found.about != self.about or found.written < self.plan.samples:
            raise StoreError(f"{self._place} holds other pairs than when this loader was made; make it again")
        return found

    @cached_property
    def shelf(self) -> Shelf | None:
        """Latents, in another process."""
        rows = self._rows
        if isinstance(rows, Path | Url):
            rows = _checked(rows, self.about, str(self._place))
        return None if rows is None else Shelf(rows)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked: where pairs and latents are, which are opened and compared again there."""
        rows = self._rows.place if isinstance(self._rows, Latents) else self._rows
        state = super().__getstate__() | {"_rows": rows}
        return {name: value for name, value in state.items() if name not in ("file", "shelf")}

    def make(self, epoch: int, first: int, last: int) -> Batch:
        x = self.noise.samples(self.about["epoch"], first, last)
        return batch_of(x, self.file.read("index", slice(first, last)), self.shelf)


def _checked(latents: object, about: dict[str, Any], name: str) -> Any:
    """Latents as rows. Raises InputError if they are others than those of the pairs."""
    rows = latents.held.latents if isinstance(latents, Solution) else as_rows(latents)
    if list(rows.shape) != about["shape"] or fingerprint_of(rows) != about["fingerprint"]:
        raise InputError(f"the pairs in {name} are of other latents, of shape {tuple(about['shape'])}; give these")
    return rows
