"""One problem for each class: noise is paired with latents of its own label. Solved and stored together.

    FOLDER/labels.zarr         the class of every latent
    FOLDER/NAME.latents.zarr   the latents of a class, in their order
    FOLDER/NAME.run.zarr       its run

Legend: N latents, C classes, d dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distot import schedule
from distot.again import GOALS, check_same, go_on
from distot.api import check_workers, load, solve
from distot.atoms import Rows
from distot.case import as_rows, source_place
from distot.errors import InputError, StoreError
from distot.fingerprint import fingerprint_of
from distot.given import array
from distot.solution import Solution
from distot.store import (
    Latents,
    Place,
    RowFile,
    Run,
    as_place,
    check_holder,
    check_out,
    copy_latents,
    new_rows,
    open_latents,
)
from distot.target import check_mass, check_rows

PART = 65536  # labels written at a time
# options of a class that are not given, but for goals: those may have been changed
STANDARD = {name: value for name, value in schedule.Options().to_dict().items() if name not in GOALS}

Label = Any
Options = dict[str, Any]
Arrays = dict[str, NDArray[Any]]


class Classes(Mapping[Label, Solution]):
    """Solutions by label, in the order of the labels.

    rows: the latents of each class among all N, by label. share: the mass of each class (C,), sum 1.
    """

    def __init__(
        self, solutions: dict[Label, Solution], rows: dict[Label, NDArray[np.int64]], share: NDArray[np.float64]
    ) -> None:
        self.solutions, self.rows, self.share = solutions, rows, share

    @property
    def labels(self) -> list[Label]:
        return list(self.solutions)

    def __getitem__(self, label: Label) -> Solution:
        return self.solutions[label]

    def __iter__(self) -> Iterator[Label]:
        return iter(self.solutions)

    def __len__(self) -> int:
        return len(self.solutions)

    def __repr__(self) -> str:
        return f"Classes({self.solutions!r})"


def solve_classes(
    latents: Any,
    labels: ArrayLike,
    source: object = "gaussian",
    mass: ArrayLike | None = None,
    run: str | Place | None = None,
    on_class: Callable[[Label, int], None] = lambda label, count: None,
    **options: Any,
) -> Classes:
    """Solves one transport problem for each class, all from the same source.

    latents: (N, d) or the path of a store, as for ``solve``; labels: (N,), whole numbers or text; mass: (N,). run: a
    folder for all, in which the next call goes on: classes that are done are not solved again. on_class hears of each
    class and its size before it is solved. options: those of ``solve``.

    Goals and budgets may be others the next time, and those left out are as before; all else must be the same.

    Raises InputError, before anything is solved, for labels of another shape and classes of less than two latents, and
    for a folder that was begun with other latents, labels, masses, source or options; else as ``solve`` does, with the
    name of the class.
    """
    check_workers(options.get("workers"), options.get("replicas", 1), options.get("ray"))
    rows = as_rows(latents)
    check_rows(rows)
    count = rows.shape[0]
    given = mass if mass is not None or not isinstance(rows, Latents) else rows.mass
    weight = check_mass(None if given is None else array(given, "mass"), count)[0]
    names, code = _coded(labels, weight)
    folder = None if run is None else as_place(run)
    works = [_Work(label, np.flatnonzero(code == number), folder) for number, label in enumerate(names)]
    if folder is not None:
        check_out(folder, rows.path if isinstance(rows, Latents) else None, source_place(source), goes_on=True)
        _begin(folder, names, code, {} if given is None else {"mass": weight})
        for work in works:
            with _named(work.label):
                work.check(rows, source, given is not None, weight, options)
    solutions: dict[Label, Solution] = {}
    for work in works:
        on_class(work.label, len(work.own))
        with _named(work.label):
            solutions[work.label] = work(rows, source, None if given is None else weight[work.own], options)
    return _together(solutions, names, code, weight)


def load_classes(folder: str | Place, *, source: object = None) -> Classes:
    """The classes that ``solve_classes`` has solved in a folder. Raises StoreError as ``load`` does."""
    folder = as_place(folder)
    stored = RowFile(folder / "labels.zarr")
    names, code = stored.about["labels"], stored.read("code")
    solutions = {label: load(folder / f"{_file(label)}.run.zarr", source=source) for label in names}
    for number, label in enumerate(names):
        if solutions[label].facts.shape[0] != np.count_nonzero(code == number):
            raise StoreError(f"{folder / 'labels.zarr'} is not of the runs beside it: class {label} has other latents")
    weight = stored.vector("mass") if "mass" in stored.arrays else np.full(len(code), 1 / len(code))
    return _together(solutions, names, code, weight)


def _together(
    solutions: dict[Label, Solution], names: list[Label], code: NDArray[np.int32], weight: NDArray[np.float64]
) -> Classes:
    rows = {label: np.flatnonzero(code == number) for number, label in enumerate(names)}
    return Classes(solutions, rows, np.bincount(code, weight, len(names)).astype(np.float64))


def _coded(labels: ArrayLike, weight: NDArray[np.float64]) -> tuple[list[Label], NDArray[np.int32]]:
    """The distinct labels as plain Python values, and the class of each latent (N,)."""
    given = array(labels, "the array of labels")
    if given.shape != weight.shape or given.dtype.kind not in "iubU":
        raise InputError(
            f"labels must be whole numbers or text of shape ({len(weight)},), one for each latent, not {given.dtype} "
            f"{given.shape}"
        )
    names, code = np.unique(given, return_inverse=True)
    members = np.bincount(code[weight > 0], minlength=len(names))
    if (members < 2).any():
        few = ", ".join(f"{names[i]} ({members[i]})" for i in np.flatnonzero(members < 2)[:5])
        raise InputError(
            f"a class needs two latents of positive mass at least, these have fewer: {few}; leave their latents out, "
            "or give them the label of another class"
        )
    return names.tolist(), code.astype(np.int32)


def _begin(folder: Place, names: list[Label], code: NDArray[np.int32], vectors: Arrays) -> None:
    """Stores labels and masses, or checks that they are those of the folder."""
    check_holder(folder)
    with new_rows(folder / "labels.zarr", len(code), {"code": ("int32", None)}, {"labels": names}, vectors) as out:
        if not np.array_equal(RowFile(folder / "labels.zarr").read("code"), code[: out.written]):
            raise InputError(f"{folder} was begun with other labels; give those, or choose another folder")
        for first in range(out.written, len(code), PART):
            out.write({"code": code[first : first + PART]})


@dataclass(frozen=True)
class _Work:
    """One class: its latents among all, and the folder of all."""

    label: Label
    own: NDArray[np.int64]
    folder: Place | None

    @property
    def store(self) -> Place:
        assert self.folder is not None
        return self.folder / f"{_file(self.label)}.latents.zarr"

    @property
    def run(self) -> Place:
        assert self.folder is not None
        return self.folder / f"{_file(self.label)}.run.zarr"

    def check(self, rows: Rows, source: object, massive: bool, weight: NDArray[np.float64], options: Options) -> None:
        """Raises InputError if the latents or the run that are there are of something else."""
        if not (self.store.exists() or self.run.exists()):
            return
        its, mass = _taken(rows, self.own), weight[self.own] if massive else None
        if self.store.exists():
            there = open_latents(self.store)
            weights = [np.empty(0) if values is None else values for values in (mass, there.mass)]
            if fingerprint_of(there) != fingerprint_of(its) or not np.array_equal(weights[0], weights[1]):
                raise InputError(f"{self.store} holds other latents, or other masses; give those, or another folder")
        if self.run.exists():
            check_same(Run(self.run), its, source, mass, STANDARD | options, "init" in options)

    def __call__(self, rows: Rows, source: object, mass: Any, options: Options) -> Solution:
        """The solution: from its run if that is done, else solved, or gone on with."""
        if self.folder is None:
            return solve(_taken(rows, self.own), source, mass, **options)
        if self.run.exists():
            return go_on(self.run, self.store, source, None, options)
        if not self.store.exists():
            copy_latents(_taken(rows, self.own), mass, self.store, f"class {self.label}")
        return solve(self.store, source, run=self.run, **options)


@contextmanager
def _named(label: Label) -> Iterator[None]:
    """Errors say which class they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"class {label}: {error}") from error


def _taken(rows: Rows, own: NDArray[np.int64]) -> NDArray[Any]:
    return rows.take(own) if isinstance(rows, Latents) else np.asarray(rows)[own]


def _file(label: Label) -> str:
    """The label as part of a file name."""
    return quote(str(label), safe="")
