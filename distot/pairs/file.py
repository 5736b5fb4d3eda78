"""Pairs in a file: the latents of numbered samples, and all that is needed to draw the noise again elsewhere.

Legend: E samples, N latents, d dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from distot.api import load
from distot.atoms import blocks
from distot.case import as_rows
from distot.errors import InputError, StoreError
from distot.fingerprint import Fingerprint
from distot.pairs.balance import Balanced, balance, balanced_index
from distot.pairs.coupling import Coupling, Shelf
from distot.pairs.dataset import batch_of
from distot.pairs.loader import Batch, Loader, Plan
from distot.pairs.noise import NOISE, check_seed, from_noise
from distot.solution import Solution
from distot.source import as_source
from distot.store import Latents, Place, RowFile, new_rows

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
    about, arrays = coupling.noise.spec()
    about |= {
        "kind": KIND,
        "epoch": epoch,
        "balanced": balanced,
        "epsilon": found.options.epsilon,
        "shape": list(found.facts.shape),
        "fingerprint": coupling.problem.target.fingerprint,
        "heights": coupling.digest,
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
        self.file = RowFile(path)
        about = self.file.about
        if about.get("kind") != KIND:
            raise StoreError(f"{path} holds no pairs; distot pairs RUN.zarr {path} makes some")
        if not self.file.complete and not partial:
            raise InputError(
                f"{path} has {self.file.written:,} of {self.file.rows:,} pairs; give the command that wrote it again "
                "to go on, or partial=True to take those that are there"
            )
        own = None if source is None else as_source(source, about["shape"][1])
        self.noise = from_noise(
            about, {NOISE + name: self.file.vector(NOISE + name) for name in about["source_arrays"]}, own
        )
        self.shelf = None if latents is None else Shelf(_checked(latents, about, str(path)))
        plan = Plan(self.file.written, batch, about["seed"], endless=endless)
        super().__init__(plan, epoch, start, rank, world, drop_last)

    def make(self, epoch: int, first: int, last: int) -> Batch:
        x = self.noise.samples(self.file.about["epoch"], first, last)
        return batch_of(x, self.file.read("index", slice(first, last)), self.shelf)


def _checked(latents: object, about: dict[str, Any], name: str) -> Any:
    """Latents as rows. Raises InputError if they are others than those of the pairs."""
    rows = latents.held.latents if isinstance(latents, Solution) else as_rows(latents)
    known = rows.fingerprint if isinstance(rows, Latents) else None
    if known is None and list(rows.shape) == about["shape"]:
        found = Fingerprint(rows.shape, np.dtype(rows.dtype))
        for block in blocks(rows.shape[0], rows.shape[1]):
            found.update(np.asarray(rows[block]))
        known = found.hexdigest()
    if known != about["fingerprint"]:
        raise InputError(f"the pairs in {name} are of other latents, of shape {tuple(about['shape'])}; give these")
    return rows
