"""Latents and masses: what is refused, what is mended, and what is said about it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import distot
from distot.atoms import ROWS
from distot.errors import DistotWarning, InputError
from distot.fingerprint import Fingerprint
from distot.grid import Grid
from distot.power import Frame
from distot.problem import build_problem
from distot.target import Target, build_target

UNIT = (np.zeros(2), np.eye(2))
GOOD = np.random.default_rng(0).standard_normal((10, 2))


def build(rows: Any, mass: Any, moments: tuple[Any, Any]) -> tuple[Target, Frame]:
    return build_target(rows, mass, moments, Grid(), {})


def with_bad(rows: list[int], value: float) -> NDArray[np.float64]:
    y = GOOD.copy()
    y[rows, 1] = value
    return y


@pytest.mark.parametrize(
    ("latents", "mass", "message"),
    [
        (with_bad([7, 3], np.nan), None, "2 of 10 latents contain NaN or Inf, the first is row 3"),
        (with_bad([9], -np.inf), None, "1 of 10 latents contain NaN or Inf, the first is row 9"),
        (np.zeros(5), None, r"must have shape \(N, d\), not \(5,\)"),
        (np.zeros((4, 2, 2)), None, "flatten each latent"),
        (np.zeros((0, 2)), None, r"shape \(0, 2\) are too few"),
        (np.zeros((1, 2)), None, r"shape \(1, 2\) are too few"),
        (np.zeros((3, 0)), None, r"shape \(3, 0\) are too few"),
        (GOOD.astype(complex), None, "dtype complex128"),
        (GOOD.astype(str), None, "dtype <U"),
        (GOOD > 0, None, "dtype bool"),
        (np.ones((5, 2)), None, "the same point"),
        (GOOD, np.ones(9), r"shape \(10,\), one value for each latent"),
        (GOOD, np.ones((10, 1)), r"shape \(10,\)"),
        (GOOD, np.r_[np.ones(8), -1.0, -2.0], r"2 of 10 values are wrong, the first is mass\[8\] = -1.0"),
        (GOOD, np.r_[np.ones(9), np.nan], r"mass\[9\] = nan"),
        (GOOD, np.zeros(10), "all masses are zero"),
        (GOOD, np.r_[1.0, np.zeros(9)], "the same point"),
    ],
)
def test_refused_in_one_sentence(latents: NDArray[Any], mass: NDArray[Any] | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        distot.solve(latents, mass=mass)
    assert "\n" not in str(caught.value)


def test_masses_are_normalised_with_a_note() -> None:
    target, _ = build(GOOD, np.arange(1.0, 11.0), UNIT)
    assert target.mass.sum() == pytest.approx(1)
    assert target.mass[9] == pytest.approx(10 / 55)
    assert target.notes == ("the masses sum to 55; they were divided by that sum",)


def test_tiny_and_huge_masses_do_not_overflow() -> None:
    for scale in (1e-300, 1e300):
        target, _ = build(GOOD, np.full(10, scale), UNIT)
        assert np.allclose(target.mass, 0.1)


def test_zero_mass_is_kept_out() -> None:
    mass = np.full(10, 1 / 8)
    mass[[0, 4]] = 0
    target, _ = build(GOOD, mass, UNIT)
    assert target.n == 8
    assert list(target.original) == [1, 2, 3, 5, 6, 7, 8, 9]
    assert target.notes == ("2 of 10 latents have zero mass and are left out; their height is -inf",)
    with pytest.warns(DistotWarning, match="zero mass"):
        solution = distot.solve(GOOD, mass=mass, max_samples=2000, progress=False)
    assert np.isneginf(solution.heights[[0, 4]]).all()
    assert np.isfinite(np.delete(solution.heights, [0, 4])).all()
    assert mass @ np.where(np.isfinite(solution.heights), solution.heights, 0) == pytest.approx(0, abs=1e-12)
    assert not {0, 4} & set(solution.assign(np.random.default_rng(1).standard_normal((5000, 2))))


def test_duplicates_are_merged_and_keep_their_original_indices() -> None:
    y = np.concatenate([GOOD[:6], GOOD[2:4], GOOD[6:], GOOD[2:3]])  # rows 6, 7, 12 repeat rows 2, 3, 2
    mass = np.full(13, 1 / 13)
    with pytest.warns(DistotWarning, match="3 latents repeat another one"):
        solution = distot.solve(y, until_chi2=None, max_samples=20_000, progress=False)
    assert solution.problem.target.n == 10
    assert solution.problem.target.mass[2] == pytest.approx(3 / 13)
    h = solution.heights
    assert h[2] == h[6] == h[12]
    assert h[3] == h[7]
    x = np.random.default_rng(1).standard_normal((20_000, 2))
    index = solution.assign(x)
    assert not {6, 7, 12} & set(index)
    assert np.array_equal(solution.map(x), y[index])
    assert (index == 2).mean() == pytest.approx(3 / 13, abs=0.03)
    assert mass @ h == pytest.approx(0, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 200), st.integers(1, 5), st.integers(0, 1000))
def test_merging_is_that_of_numpy(n: int, d: int, seed: int) -> None:
    y = np.random.default_rng(seed).integers(-1, 2, (n, d)).astype(np.float32) * np.float32(0.1)
    y[y == 0] *= np.random.default_rng(seed).choice([-1, 1])  # zeros of both signs are one point
    distinct, first, inverse = np.unique(y + 0.0, axis=0, return_index=True, return_inverse=True)
    if len(distinct) < 2:
        return
    target, _ = build(y, None, (np.zeros(d), np.eye(d)))
    assert list(target.original) == sorted(first)
    assert np.array_equal(target.original[target.atom_of], first[inverse.ravel()])


def test_near_duplicates_below_float32_are_merged() -> None:
    y = GOOD.copy()
    y[0] = 1.3, 2.7
    y[1] = y[0] * (1 + 1e-12)
    target, _ = build(y, None, UNIT)
    assert target.n == 9


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.uint16, np.int64, ">f4"])
def test_dtypes(dtype: Any) -> None:
    y = (GOOD * 20).astype(dtype)
    solution = distot.solve(y, max_samples=500, progress=False)
    assert solution.heights.shape == (10,)
    assert np.array_equal(solution.map(np.zeros((1, 2)))[0], y[solution.assign(np.zeros((1, 2)))[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tensors(dtype: torch.dtype) -> None:
    y = torch.from_numpy(GOOD).to(dtype).requires_grad_()
    assert distot.solve(y, max_samples=500, progress=False).heights.shape == (10,)


def test_the_callers_array_is_left_alone() -> None:
    y = GOOD.astype(np.float32)
    before = y.copy()
    distot.solve(y, max_samples=500, progress=False)
    assert np.array_equal(y, before)


def test_far_from_the_origin_keeps_the_digits() -> None:
    """A common offset of 1e8 spreads costs nothing: the subtraction is done in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DistotWarning)
        near = build_problem(GOOD).target
        far = build_problem(GOOD + 1e8).target
    assert torch.allclose(near.atoms[:], far.atoms[:], atol=1e-6)


def test_centre_is_not_moved_by_one_far_atom() -> None:
    y = np.concatenate([np.random.default_rng(2).standard_normal((1000, 2)), [[1e6, 0.0]]])
    _, frame = build(y, None, UNIT)
    assert np.abs(frame.target_centre).max() < 0.2


def test_fingerprint_does_not_depend_on_blocks() -> None:
    y = np.arange(3.0 * (ROWS + 10)).reshape(-1, 3)
    whole, pieces = Fingerprint(y.shape, y.dtype), Fingerprint(y.shape, y.dtype)
    whole.update(y)
    for a in range(0, len(y), 977):
        pieces.update(y[a : a + 977])
    assert whole.hexdigest() == pieces.hexdigest() == whole.hexdigest()
    y[-1, 0] += 1
    other = Fingerprint(y.shape, y.dtype)
    other.update(y)
    assert other.hexdigest() != whole.hexdigest()
