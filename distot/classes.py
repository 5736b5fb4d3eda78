"""One problem for each class: noise is paired with latents of its own label. Solved and stored together.

    FOLDER/labels.zarr         the class of every latent
    FOLDER/NAME.latents.zarr   the latents of a class, in their order
    FOLDER/NAME.run.zarr       its run

Legend: N latents, C classes, d dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distot.api import load, resume, solve
from distot.atoms import Rows
from distot.case import as_rows
from distot.errors import InputError
from distot.inspect import describe
from distot.solution import Solution
from distot.store import Latents, Place, RowFile, Run, as_place, copy_latents, new_rows
from distot.target import check_mass, check_rows

GOALS = ("until_chi2", "max_samples", "max_seconds", "memory")  # that a run may change when it goes on
HERE = ("device", "workers", "replicas", "ray", "progress", "on_event")  # that are not part of what is solved
PART = 65536  # labels written at a time

Label = Any
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

    Raises InputError, before anything is solved, for labels of another shape and classes of less than two latents, and
    for a folder that was begun with other labels; else as ``solve`` does, with the name of the class.
    """
    rows = as_rows(latents)
    check_rows(rows)
    count = rows.shape[0]
    given = mass if mass is not None or not isinstance(rows, Latents) else rows.mass
    weight = check_mass(None if given is None else np.asarray(given), count)[0]
    names, code = _coded(labels, weight)
    folder = None if run is None else as_place(run)
    if folder is not None:
        _begin(folder, names, code, {} if given is None else {"mass": weight})
    solutions: dict[Label, Solution] = {}
    for number, label in enumerate(names):
        own = np.flatnonzero(code == number)
        on_class(label, len(own))
        its_mass = None if given is None else weight[own]
        try:
            solutions[label] = _solved(_taken(rows, own), source, its_mass, folder, label, options)
        except InputError as error:
            raise InputError(f"class {label}: {error}") from error
    return _together(solutions, names, code, weight)


def load_classes(folder: str | Place, *, source: object = None) -> Classes:
    """The classes that ``solve_classes`` has solved in a folder. Raises StoreError as ``load`` does."""
    folder = as_place(folder)
    stored = RowFile(folder / "labels.zarr")
    names, code = stored.about["labels"], stored.read("code")
    solutions = {label: load(folder / f"{_file(label)}.run.zarr", source=source) for label in names}
    weight = stored.vector("mass") if "mass" in stored.arrays else np.full(len(code), 1 / len(code))
    return _together(solutions, names, code, weight)


def _together(
    solutions: dict[Label, Solution], names: list[Label], code: NDArray[np.int32], weight: NDArray[np.float64]
) -> Classes:
    rows = {label: np.flatnonzero(code == number) for number, label in enumerate(names)}
    return Classes(solutions, rows, np.bincount(code, weight, len(names)).astype(np.float64))


def _coded(labels: ArrayLike, weight: NDArray[np.float64]) -> tuple[list[Label], NDArray[np.int32]]:
    """The distinct labels as plain Python values, and the class of each latent (N,)."""
    given = np.asarray(labels)
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
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    with new_rows(folder / "labels.zarr", len(code), {"code": ("int32", None)}, {"labels": names}, vectors) as out:
        if not out.complete:
            for first in range(out.written, len(code), PART):
                out.write({"code": code[first : first + PART]})
    if not np.array_equal(RowFile(folder / "labels.zarr").read("code"), code):
        raise InputError(f"{folder} was begun with other labels; give those, or choose another folder")


def _solved(
    rows: NDArray[Any], source: object, mass: Any, folder: Place | None, label: Label, options: dict[str, Any]
) -> Solution:
    """The solution of one class: from its run if that is done, else solved, or gone on with."""
    if folder is None:
        return solve(rows, source, mass, **options)
    store, run = folder / f"{_file(label)}.latents.zarr", folder / f"{_file(label)}.run.zarr"
    if not run.exists():
        if not store.exists():
            copy_latents(rows, mass, store, f"class {label}")
        return solve(store, source, run=run, **options)
    kept = Run(run).config["options"]
    changed = [name for name, value in options.items() if name not in HERE and kept.get(name) != value]
    if wrong := [name for name in changed if name not in GOALS]:
        raise InputError(f"{run} was begun with {wrong[0]} = {kept.get(wrong[0])!r}; give that, or another folder")
    own = source if callable(source) else None
    if not changed and describe(run)["state"] in ("until_chi2", "max_samples"):
        return load(run, source=own, device=options.get("device"))
    return resume(run, source=own, **{name: its for name, its in options.items() if name in (*changed, *HERE)})


def _taken(rows: Rows, own: NDArray[np.int64]) -> NDArray[Any]:
    return rows.take(own) if isinstance(rows, Latents) else np.asarray(rows)[own]


def _file(label: Label) -> str:
    """The label as part of a file name."""
    return quote(str(label), safe="")
