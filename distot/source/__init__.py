"""Sources: what the mass is moved from. base.py has streams and keys, shapes.py and data.py the sources themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from distot.errors import InputError
from distot.source.base import BLOCK, Key, Source, Spec, Stream, uniforms
from distot.source.data import Product, Sampler, Samples
from distot.source.shapes import Ball, Cube, Gaussian, Sphere

__all__ = [
    "BLOCK",
    "Ball",
    "Cube",
    "Gaussian",
    "Key",
    "Product",
    "Sampler",
    "Samples",
    "Source",
    "Spec",
    "Sphere",
    "Stream",
    "as_source",
    "from_spec",
    "uniforms",
]


def as_source(source: object, dim: int) -> Source:
    """A Source of dimension ``dim`` from a name, a Source, an array (n, d) or a callable.

    Names: "gaussian" N(0, I), "cube" [0, 1]^d, "ball" and "sphere" of radius 1.

    Raises InputError for an unknown name or a dimension other than ``dim``.
    """
    named: dict[str, Callable[[], Source]] = {
        "gaussian": lambda: Gaussian(dim=dim),
        "cube": lambda: Cube(dim),
        "ball": lambda: Ball(dim),
        "sphere": lambda: Sphere(dim),
    }
    if isinstance(source, str):
        if source not in named:
            raise InputError(f"unknown source {source!r}; choose one of {', '.join(named)}, an array or a callable")
        return named[source]()
    if isinstance(source, Source):
        found = source
    elif callable(source):
        found = Sampler(source, dim)
    else:
        found = Samples(source)  # type: ignore[arg-type]
    if found.dim != dim:
        raise InputError(
            f"the source has dimension {found.dim} and the latents have dimension {dim}; "
            "they must live in the same space"
        )
    return found


def from_spec(spec: Spec, arrays: dict[str, NDArray[Any]]) -> Source:
    """The inverse of ``Source.spec``. Raises InputError for a user's sampler, which is code, not data."""
    kind, values = spec["kind"], {k: v for k, v in spec.items() if k != "kind"}
    if kind == "sampler":
        raise InputError(
            f"this run draws from the sampler {spec.get('name')!r}, which cannot be stored; "
            "go on from Python: distot.resume(run, source=your_sampler)"
        )
    if kind == "samples":
        return Samples(arrays["rows"])
    if kind == "product":
        parts = ("first", "second")
        its = [{k.removeprefix(f"{p}-"): v for k, v in arrays.items() if k.startswith(f"{p}-")} for p in parts]
        return Product(*(from_spec(spec[part], own) for part, own in zip(parts, its, strict=True)))
    kinds: dict[str, Callable[..., Source]] = {s.kind: s for s in (Gaussian, Cube, Ball, Sphere)}
    return kinds[kind](**values, **arrays)
