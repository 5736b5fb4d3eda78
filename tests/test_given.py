"""Arrays that users give: the whole of it, of whatever library and layout, or one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

import distot
from distot.errors import InputError
from distot.given import array, numbers

Y = np.random.default_rng(3).standard_normal((40, 3))
SAMPLES = np.random.default_rng(4).standard_normal((20, 3))
MASKED = np.ma.masked_array(Y, mask=np.arange(120).reshape(40, 3) == 7)
FROZEN = Y.copy()
FROZEN.flags.writeable = False
WIDE = np.zeros((80, 6))
WIDE[::2, ::2] = Y

SAME = {
    "read-only": FROZEN,
    "strided": WIDE[::2, ::2],
    "backwards": np.ascontiguousarray(Y[::-1])[::-1],
    "column by column": np.asfortranarray(Y),
    "big-endian": Y.astype(">f8"),
    "masked nowhere": np.ma.masked_array(Y, mask=False),
    "lists": Y.tolist(),
    "list of rows": list(Y),
    "tensor that requires grad": torch.tensor(Y, requires_grad=True),
    "tensor, transposed": torch.tensor(Y.T.copy()).T,
    "long double": Y.astype(np.longdouble),
}
WRONG: dict[str, tuple[Any, str]] = {
    "masked": (MASKED, "1 masked values"),
    "list of masked rows": (list(MASKED), "1 masked values"),
    "sparse tensor": (torch.tensor(Y).to_sparse(), "sparse"),
    "tensor without values": (torch.empty(40, 3, device="meta"), "without values"),
    "sparse matrix": (scipy.sparse.csr_array(Y), "sparse"),
    "ragged lists": ([[1.0, 2.0], [3.0]], "rows of one length"),
}
NO_NUMBERS: dict[str, Any] = {
    "complex": Y + 1j,
    "complex tensor": torch.tensor(Y + 1j).conj(),
    "text": Y.astype(str),
    "dates": Y.astype("M8[s]"),
    "booleans": Y > 0,
    "objects": Y.astype(object),
    "records": np.zeros((40, 3), dtype=[("a", "f4")]),
}
TAKEN: dict[str, Callable[[Any], object]] = {
    "latents": lambda values: distot.solve(values, max_samples=100, progress=False),
    "source": lambda values: distot.solve(Y, values, max_samples=100, progress=False),
    "mass": lambda values: distot.solve(Y, mass=values, max_samples=100, progress=False),
    "init": lambda values: distot.solve(Y, init=values, max_samples=100, progress=False),
    "labels": lambda values: distot.solve_classes(Y, values),
    "mean": lambda values: distot.Gaussian(mean=values),
    "centre": lambda values: distot.Ball(3, centre=values),
    "sampler": lambda values: distot.solve(Y, lambda generator, n: values, max_samples=100, progress=False),
    "heights": lambda values: distot.heights_to_weights(values, Y),
    "conditions": lambda values: distot.conditional(Y, values, 1.0),
}


@pytest.fixture(scope="module")
def solution() -> distot.Solution:
    return distot.solve(Y, until_chi2=0.5, progress=False)


@pytest.mark.parametrize("values", SAME.values(), ids=SAME)
def test_any_layout_means_the_same(solution: distot.Solution, values: Any) -> None:
    np.testing.assert_array_equal(numbers(values, "it"), Y)
    again = distot.solve(values, until_chi2=0.5, progress=False)
    np.testing.assert_array_equal(again.heights, solution.heights)
    np.testing.assert_array_equal(solution.assign(values), solution.assign(Y))


def test_types_that_numpy_lacks_become_float32() -> None:
    for kind in (torch.bfloat16, torch.float8_e4m3fn):
        found = array(torch.tensor(Y).to(kind), "it")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, torch.tensor(Y).to(kind).float().numpy())


@pytest.mark.parametrize(("values", "words"), WRONG.values(), ids=WRONG)
def test_what_would_lose_a_part_is_refused(solution: distot.Solution, values: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        array(values, "it")
    with pytest.raises(InputError, match=words):
        solution.assign(values)


@pytest.mark.parametrize("values", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_what_are_no_real_numbers_is_refused(solution: distot.Solution, values: Any) -> None:
    with pytest.raises(InputError, match="real numbers"):
        numbers(values, "it")
    with pytest.raises(InputError):
        solution.assign(values)
    with pytest.raises(InputError):
        distot.solve(values, max_samples=100, progress=False)


@pytest.mark.parametrize("take", TAKEN.values(), ids=TAKEN)
def test_masks_are_seen_wherever_arrays_are_taken(take: Callable[[Any], object]) -> None:
    with pytest.raises(InputError, match="masked values"):
        take(MASKED if take in (TAKEN["latents"], TAKEN["source"], TAKEN["sampler"]) else MASKED[:, 1])


def test_masked_samples_for_a_file_are_refused(tmp_path: Path) -> None:
    distot.solve(Y, run=tmp_path / "run.zarr", until_chi2=0.5, progress=False)
    with pytest.raises(InputError, match="masked values"):
        distot.assign_file(tmp_path / "run.zarr", MASKED, tmp_path / "index.npy")
