"""What decides a result, in values and short hashes: whoever goes on with something that is there compares them all.

Legend: N latents, n atoms, d dimension.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distot.errors import InputError
from distot.fingerprint import hashed, hashed_heights
from distot.problem import Problem
from distot.source import Source
from distot.target import check_mass

CLOSE = 1e-5  # relative to their size, by which what a callable draws may differ from one machine to another


def heights_of(problem: Problem, average: Tensor) -> str:
    """A hash of the heights of all atoms, the same on any grid; average: those of own atoms."""
    return hashed_heights(problem.target.split.gather(average).cpu().numpy())


def masses_of(mass: ArrayLike | None, count: int) -> str | None:
    """A hash of the masses of all latents, divided by their sum; None for equal ones."""
    return None if mass is None else hashed(check_mass(np.asarray(mass), count)[0])


def source_of(source: Source) -> dict[str, Any]:
    """A source in plain values, with a hash of its arrays: the rows of samples, a mean, what a callable draws."""
    spec, arrays = source.spec()
    return {"source": spec, "source_arrays": {name: hashed(np.asarray(values)) for name, values in arrays.items()}}


def map_of(problem: Problem, mass: ArrayLike | None, average: Tensor, epsilon: float | None) -> dict[str, Any]:
    """All that decides which latent a sample goes to. mass: (N,) as it was given."""
    target = problem.target
    return source_of(problem.source) | {
        "latents": target.fingerprint,
        "heights": heights_of(problem, average),
        "masses": masses_of(mass, target.latents),
        "cost": problem.cost.name,
        "epsilon": epsilon,
    }


def belongs(stored: dict[str, Any], step: int, heights: str) -> bool:
    """Whether a certificate, or what is known of the cells, is of these heights."""
    return bool(stored.get("step") == step and stored.get("heights", heights) == heights)


def check_source(given: Source, spec: dict[str, Any], arrays: dict[str, NDArray[Any]], where: str) -> None:
    """Raises InputError if a source is not the one that was stored as ``spec`` with these arrays.

    Of a callable its name is compared, and what it draws if that was stored.
    """
    described, values = given.spec()
    found, spec = _plain(json.loads(json.dumps(described))), _plain(spec)
    for name in sorted(found.keys() | spec.keys()):
        if found.get(name) != spec.get(name):
            raise InputError(
                f"{where} draws from another source: its {name} is {spec.get(name)!r}, and not {found.get(name)!r}; "
                "give that source, or begin anew under another name"
            )
    for name, stored in arrays.items():
        mine = np.asarray(values[name]) if name in values else np.empty(0)
        if not _same(mine, stored, exact=not name.endswith("drawn")):
            part = "what it draws" if name.endswith("drawn") else f"its {name}"
            raise InputError(
                f"{where} draws from another source of the kind {spec['kind']!r}: {part} is not the same; give that "
                "one, or begin anew under another name"
            )


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
    """A description in which callables have their own names alone, wherever they were defined."""
    parts = {name: _plain(value) if isinstance(value, dict) else value for name, value in spec.items()}
    return parts | {"name": str(parts["name"]).rpartition(".")[2]} if spec.get("kind") == "sampler" else parts


def _same(mine: NDArray[Any], stored: NDArray[Any], exact: bool) -> bool:
    if exact or mine.shape != stored.shape:
        return np.array_equal(mine, stored)
    return bool(np.allclose(mine, stored, rtol=CLOSE, atol=CLOSE * float(np.abs(stored).max(initial=0.0))))
