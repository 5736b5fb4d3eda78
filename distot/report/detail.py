"""What a page says of single latents: statistics of the cells, a picture of the transport, decoded images.

All of this needs the latents themselves. Legend: N latents, S of them shown, B samples of noise, d dimension.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distot.cells import Cells, Sums, by_latent
from distot.certify import default_samples
from distot.errors import InputError
from distot.exact import ExactCells
from distot.planar import Uneven
from distot.power import Array
from distot.solution import Solution, stored_sums
from distot.source import Key, Stream

SHOWN, FLOWS = 3000, 260  # latents and samples of noise in a picture, at most
MOST_NUMBERS = 1 << 28  # of latents that are read for a page without being asked to
MOST_FLOPS = 2e12  # of a search that is made for a page without being asked to: half a minute or so on two cores
PICTURE = 1 << 20  # step of the stream of samples that are drawn for a picture
IMAGES = 24  # decoded latents, and as many generated ones

Decoder = Callable[[NDArray[Any]], Any]


@dataclass(frozen=True)
class Flow:
    """Latents and noise in two coordinates; ``polygons`` of the cells shown, where the coordinates are those of the
    plane and the cells are known exactly."""

    latents: Array  # (S, 2)
    index: NDArray[np.int64]  # (S,)
    noise: Array  # (B, 2)
    to: Array  # (B, 2) the latents of the noise
    to_index: NDArray[np.int64]  # (B,)
    kind: str  # "line", "plane" or "projection"
    explained: float  # share of the variance of the latents that the two coordinates hold
    polygons: list[Array] | None = None
    ratio: Array | None = None  # (S,) exact mass over wanted mass, where the cells are known exactly


def worth_reading(shape: tuple[int, int]) -> bool:
    """Whether latents of this shape are read without being asked to."""
    return shape[0] * shape[1] <= MOST_NUMBERS


def measured(solution: Solution, samples: int | None, always: bool) -> tuple[Cells, Sums] | None:
    """Statistics of the cells: of so many samples, or as the run folder has them, or of the usual number of samples if
    that is no great work, or asked for ``always``; None otherwise."""
    n, d = solution.problem.target.n, solution.problem.target.dim
    run = solution.run
    known = run is not None and stored_sums(run, solution.held) is not None
    work = 2.0 * n * d * default_samples(n)
    if samples is None and not (known or always or work <= MOST_FLOPS):
        return None
    sums = solution.sums(samples)
    return by_latent(solution.problem, sums, solution.held.mass), sums


def flow(solution: Solution) -> Flow:
    """Some latents, and noise on its way to them: as they lie, or on the two principal axes of the latents."""
    problem, (n, d) = solution.problem, solution.facts.shape
    rng = np.random.default_rng(0)
    shown = np.arange(n) if n <= SHOWN else np.sort(rng.choice(n, SHOWN, replace=False))
    latents = np.asarray(_rows(solution, shown), dtype=np.float64)
    noise = problem.source.draw(Key(problem.seed, Stream.CELLS, PICTURE, 0), FLOWS).numpy()
    index = solution.assign(noise)
    to = np.asarray(_rows(solution, index), dtype=np.float64)
    if d == 1:
        ends = [np.column_stack([x[:, 0], np.full(len(x), at)]) for x, at in ((latents, 1.0), (noise, 0.0), (to, 1.0))]
        return Flow(ends[0], shown, ends[1], ends[2], index, "line", 1.0)
    if d == 2:
        exact = exact_cells(solution)
        if exact is None or n > SHOWN:
            return Flow(latents, shown, noise, to, index, "plane", 1.0)
        ratio = exact.mass / exact.wanted
        return Flow(latents[exact.latent], exact.latent, noise, to, index, "plane", 1.0, exact.polygons, ratio)
    centre = latents.mean(axis=0)
    _, spread, axes = np.linalg.svd(latents - centre, full_matrices=False)
    total = float((spread**2).sum())
    explained = float((spread[:2] ** 2).sum()) / total if total > 0 else 1.0
    axes = np.vstack([axes, np.zeros((2, d))])[:2].T
    return Flow(
        (latents - centre) @ axes, shown, (noise - centre) @ axes, (to - centre) @ axes, index, "projection", explained
    )


def exact_cells(solution: Solution) -> ExactCells | None:
    """The exact cells of a solution in the plane; None where they cannot be computed."""
    try:
        return solution.exact_cells()
    except (InputError, Uneven):  # another source, a fixed epsilon; too uneven for float64
        return None


def load_decoder(spec: str) -> Decoder:
    """The function named FILE.py:FUNCTION. Raises InputError if there is none."""
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name:
        raise InputError(f"--decoder {spec}: name a function in a file, as in decode.py:images")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"--decoder {spec}: there is no file {file}")
    found = importlib.util.spec_from_file_location(f"distot_decoder_{path.stem}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # it is the user's file
        raise InputError(f"--decoder {spec}: {file} cannot be run: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--decoder {spec}: {file} has no function {name}")
    decoder: Decoder = function
    return decoder


def decoded(decoder: Decoder, latents: NDArray[Any]) -> NDArray[Any]:
    """Images (n, h, w) or (n, h, w, c) of latents (n, d). Raises InputError if that is not what the decoder gives."""
    try:
        given = decoder(latents)
        images = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    except Exception as error:  # it is the user's function
        raise InputError(f"the decoder failed on {len(latents)} latents: {type(error).__name__}: {error}") from error
    if (
        images.ndim not in (3, 4)
        or len(images) != len(latents)
        or (images.ndim == 4 and images.shape[3] not in (1, 3, 4))
    ):
        raise InputError(
            f"the decoder must turn ({len(latents)}, {latents.shape[1]}) latents into images ({len(latents)}, h, w) or "
            f"({len(latents)}, h, w, 1, 3 or 4), not {images.shape}"
        )
    if images.dtype.kind not in "fiub" or not np.isfinite(images).all():
        raise InputError(f"the decoder must give finite numbers, not {images.dtype} with NaN, Inf or text")
    return images


def some_latents(solution: Solution) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Latents, evenly spread over their numbers, to be decoded."""
    n = solution.facts.shape[0]
    index = np.unique(np.linspace(0, n - 1, min(IMAGES, n)).round().astype(np.int64))
    return index, _rows(solution, index)


def _rows(solution: Solution, index: NDArray[np.int64]) -> NDArray[Any]:
    """Latents (len(index), d) as they were given."""
    held = solution.held.latents
    return held.take(index) if hasattr(held, "take") and not isinstance(held, np.ndarray) else np.asarray(held)[index]
