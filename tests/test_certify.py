"""The estimators are what they claim: unbiased, with honest errors, and the bound is a bound."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from numpy.typing import NDArray

import distot
from distot import assign
from distot.certify import Running, certify, default_samples
from distot.problem import build_problem

Array = NDArray[np.float64]


class TestBound:
    """A discrete source makes the exact W2² known, whatever the heights."""

    def problem(self) -> tuple[distot.Samples, Array, float]:
        generator = np.random.default_rng(3)
        x, y = generator.standard_normal((300, 2)) + 5, 2 * generator.standard_normal((20, 2)) - 3
        exact = ot.emd2(np.full(300, 1 / 300), np.full(20, 1 / 20), ot.dist(x, y))
        return distot.Samples(x), y, float(exact)

    @pytest.mark.parametrize("quality", [0.0, 0.5, 1.0])
    def test_limit_is_above_the_truth_no_more_often_than_its_level(self, quality: float) -> None:
        source, y, exact = self.problem()
        problem = build_problem(y, source)
        best = distot.solve(y, source, until_chi2=None, max_samples=60_000, progress=False).held.progress.state.average
        noise = torch.from_numpy(np.random.default_rng(4).standard_normal(20))
        heights = best + (1 - quality) * noise
        search = assign.build("dense", problem.target.atoms[:])
        found = [certify(problem, search, heights, 500, step=step) for step in range(400)]
        above = np.mean([c.w2_squared_limit > exact for c in found])
        assert above <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
        if quality == 1.0:
            assert above > 0.005  # the bound is nearly the truth, so its limit must sometimes fail
            values = np.array([c.w2_squared_bound for c in found])
            assert values.mean() == pytest.approx(exact, rel=5e-3)
            assert np.mean([c.w2_squared_bound_error for c in found]) == pytest.approx(values.std(), rel=0.15)

    @pytest.mark.parametrize("offset", [0.0, 1e3])
    def test_identity(self, offset: float) -> None:
        """Bound = map cost + mismatch, math (10), for any heights; the three are computed from different numbers."""
        y = np.random.default_rng(5).standard_normal((50, 6)) * [1, 2, 3, 1, 1, 1] + offset
        problem = build_problem(y, distot.Gaussian(np.arange(6.0), 2.0))
        heights = torch.from_numpy(np.random.default_rng(6).standard_normal(50))
        c = certify(problem, assign.build("dense", problem.target.atoms[:]), heights, 5000)
        assert abs(c.mismatch) > 0.1
        assert c.map_cost + c.mismatch == pytest.approx(c.w2_squared_bound, rel=1e-6)

    def test_user_units(self) -> None:
        """The map cost is the mean of |x - T(x)|² as a user would compute it."""
        source = distot.Gaussian(np.array([10.0, -4.0, 0.0]), np.array([1.0, 4.0, 0.25]))
        y = 3 * np.random.default_rng(7).standard_normal((40, 3)) + 7
        solution = distot.solve(y, source, until_chi2=None, max_samples=4000, progress=False)
        x = np.random.default_rng(8).standard_normal((40_000, 3)) * [1, 2, 0.5] + [10, -4, 0]
        cost = ((x - solution.map(x)) ** 2).sum(axis=1)
        c = solution.certify(40_000)
        error = np.hypot(cost.std() / 200, c.map_cost_error)
        assert c.map_cost == pytest.approx(cost.mean(), abs=4 * error)


class TestCertificate:
    def test_samples_are_its_own_and_named(self) -> None:
        problem = build_problem(np.random.default_rng(0).standard_normal((30, 2)))
        search = assign.build("dense", problem.target.atoms[:])
        one, same, other = (certify(problem, search, torch.zeros(30), 1000, step=s) for s in (0, 0, 1))
        assert one == same
        assert one.chi2 != other.chi2

    def test_empty_cells(self) -> None:
        problem = build_problem(np.random.default_rng(0).standard_normal((30, 2)))
        heights = torch.zeros(30)
        heights[[3, 7]] = -1e6
        c = certify(problem, assign.build("dense", problem.target.atoms[:]), heights + 0.0, 1000)
        assert c.empty >= 2
        assert c.empty_by_chance == pytest.approx(30 * (29 / 30) ** 1000)

    def test_default_size(self) -> None:
        assert [default_samples(n) for n in (10, 20_000, 1_000_000)] == [10_000, 200_000, 2_000_000]


def test_orbits_are_one_observation() -> None:
    """Points of an orbit that are all the same carry no more than one."""
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(200))
    one, eight = Running(), Running(8)
    one.add(values)
    eight.add(values.repeat_interleave(8))
    assert eight.mean == pytest.approx(one.mean)
    assert eight.error == pytest.approx(one.error)


def test_running_mean_survives_a_large_offset() -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(10_001)) + 1e8
    running = Running()
    for part in values.split(777):
        running.add(part)
    assert running.mean == pytest.approx(float(values.mean()), rel=1e-15)
    assert running.error == pytest.approx(float(values.std()) / np.sqrt(10_001), rel=1e-4)
