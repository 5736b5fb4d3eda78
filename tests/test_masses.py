"""chi2 and its error: unbiased and honest, for plain samples and for orbits, for hard winners and soft ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import distot
from distot import assign
from distot.certify import cell_masses
from distot.entropic import Soft
from distot.grid import Split
from distot.masses import Estimate, Masses, upper
from distot.orbit import Orbit, Orbits
from distot.problem import Problem, build_problem
from distot.source import Stream

Array = NDArray[np.float64]


def true_chi2(p: Array, mass: Array) -> float:
    return float(((p - mass) ** 2 / mass).sum())


def of_counts(counts: NDArray[np.int64]) -> Masses:
    """Independent samples with these counts, in random order."""
    masses = Masses(Split((len(counts),)), 1, int(counts.sum()))
    winners = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)))
    masses.add(0, winners[:, None], torch.ones(len(winners), 1))
    return masses


class TestPlain:
    @pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("samples", [60, 2000])
    def test_unbiased_with_an_honest_error(self, spread: float, samples: int) -> None:
        """Over 2,000 repeats the mean is right to 4 standard errors, and the errors match the scatter."""
        generator = np.random.default_rng(0)
        mass = generator.dirichlet(np.full(50, 3.0))
        p = mass * np.exp(spread * generator.standard_normal(50))
        p /= p.sum()
        found = [of_counts(c).chi2(mass) for c in generator.multinomial(samples, p, size=1000)]
        values = np.array([f.value for f in found])
        scatter = values.std(ddof=1)
        assert abs(values.mean() - true_chi2(p, mass)) < 4 * scatter / np.sqrt(len(values))
        stated = np.sqrt(np.mean([f.error**2 for f in found]))
        assert 0.9 < stated / scatter < 1.5  # never far too small; a little large where pairs are few

    def test_error_near_the_solution(self) -> None:
        """About sqrt(2 N) / M for uniform masses, math (8)."""
        n, m = 1000, 50_000
        counts = np.random.default_rng(1).multinomial(m, np.full(n, 1 / n))
        assert of_counts(counts).chi2(np.full(n, 1 / n)).error == pytest.approx(np.sqrt(2 * n) / m, rel=0.1)

    @pytest.mark.parametrize(("n", "samples", "spread"), [(200, 5000, 0.3), (2000, 20_000, 0.2), (50, 1000, 1.0)])
    def test_upper_limit_covers(self, n: int, samples: int, spread: float) -> None:
        generator = np.random.default_rng(2)
        mass = np.full(n, 1 / n)
        p = mass * np.exp(spread * generator.standard_normal(n))
        p /= p.sum()
        limits = [upper(of_counts(c).chi2(mass), 0.95) for c in generator.multinomial(samples, p, size=1000)]
        covered = np.mean([limit >= true_chi2(p, mass) for limit in limits])
        assert 0.935 < covered < 0.975

    def test_one_sample_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at least two samples"):
            of_counts(np.array([1, 0])).chi2(np.array([0.5, 0.5]))


CASES = {
    "plane": (200, 2, "gaussian", 0.1),
    "space": (300, 3, "gaussian", 0.0),
    "patches": (500, 32, "gaussian", 0.3),
    "high": (300, 192, "gaussian", 0.2),
    "few atoms": (12, 5, "gaussian", 0.5),
    "ball": (300, 8, "ball", 0.2),
    "sphere": (300, 16, "sphere", 0.2),
    "cube": (300, 8, "cube", 0.2),
    "masses": (300, 10, "gaussian", 0.1),
    "curve": (300, 20, "gaussian", 0.2),
}


class TestOrbits:
    """Masses by orbits against masses by as many plain samples, for heights that are roughly right."""

    @pytest.fixture(params=CASES)
    def case(self, request: pytest.FixtureRequest) -> tuple[Problem, torch.Tensor]:
        n, d, source, spread = CASES[request.param]
        generator = np.random.default_rng(d)
        y = generator.standard_normal((n, d)) * np.linspace(2, 0.2, d)
        if request.param == "curve":
            y = np.sin(np.linspace(0, 3, n)[:, None] * np.arange(1, d + 1))
        mass = np.full(n, 1 / n)
        if request.param == "masses":
            mass = generator.dirichlet(np.full(n, 0.5)) + 1e-5
            mass /= mass.sum()
        solution = distot.solve(y, source, mass=mass, until_chi2=None, max_samples=20 * n, progress=False)
        state = solution.held.progress.state
        noise = torch.from_numpy(generator.standard_normal(solution.problem.target.n))
        return solution.problem, state.average + spread * state.margin * noise

    def masses(self, problem: Problem, heights: torch.Tensor, samples: int, step: int = 0) -> Masses:
        search = assign.build("auto", problem.target.atoms[:])
        return cell_masses(problem, search, heights, None, samples, Stream.CHECK, step, lambda: None)

    def test_agree_with_plain_samples(self, case: tuple[Problem, torch.Tensor]) -> None:
        """Cell by cell they differ by what their variances say, and a point of an orbit is worth a plain sample."""
        problem, heights = case
        alone = replace(problem, orbit=Orbit(problem.source.dim, "none", 0), basis=None)
        orbits, plain = (self.masses(p, heights, 200_000, step=1) for p in (problem, alone))
        assert (orbits.size, plain.size) == (problem.orbit.size, 1)

        def mean_and_variance(masses: Masses) -> tuple[Array, Array]:
            m, s = masses.total.sum(), masses.total.sum() / masses.size
            return masses.total / m, (masses.squares / s - (masses.total / s) ** 2) / masses.size**2 / s

        (p, p_var), (q, q_var) = mean_and_variance(orbits), mean_and_variance(plain)
        often = plain.total > 20
        z = (p - q)[often] / np.sqrt(p_var + q_var)[often]
        assert np.mean(z**2) == pytest.approx(1, abs=5 * np.sqrt(2 / len(z)))
        mass = problem.target.mass
        design_effect = float((p_var / mass).sum() / (q_var / mass).sum())
        assert design_effect < (1.2 if len(mass) >= 100 else 1.5)
        one, other = orbits.chi2(mass), plain.chi2(mass)
        assert abs(one.value - other.value) < 4.5 * np.hypot(one.error, other.error)

    def test_unbiased_with_an_honest_error(self, case: tuple[Problem, torch.Tensor]) -> None:
        """Over 150 looks the mean is that of a large look, and the errors match the scatter."""
        problem, heights = case
        mass = problem.target.mass
        truth = self.masses(problem, heights, 1_000_000, step=10_000).chi2(mass)
        found = [self.masses(problem, heights, 4096, step=step).chi2(mass) for step in range(150)]
        values = np.array([f.value for f in found])
        scatter = values.std(ddof=1)
        assert abs(values.mean() - truth.value) < 4 * np.hypot(scatter / np.sqrt(len(values)), truth.error)
        stated = np.sqrt(np.mean([f.error**2 for f in found]))
        assert 0.8 < stated / scatter < 1.5
        assert np.mean([upper(f, 0.95) >= truth.value for f in found]) > 0.88


def test_looks_change_axes_and_steps_do_not() -> None:
    """Draws that are compared in pairs come in parts with axes of their own, if there are enough of them."""
    problem = build_problem(np.random.default_rng(0).standard_normal((50, 4)))

    def axes(stream: Stream, samples: int) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for _, x in problem.batch(stream, 0, samples):
            assert isinstance(x, Orbits)
            if not found or x.basis is not found[-1]:
                found.append(x.basis)
        return found

    assert [len(axes(Stream.CHECK, samples)) for samples in (64, 1000, 100_000)] == [1, 3, 8]
    assert len(axes(Stream.STEP, 100_000)) == 1
    several = axes(Stream.CERTIFY, 100_000)
    for basis in several:
        rows = basis.flatten(0, 1)
        assert torch.allclose(rows @ rows.T, rows[0].square().sum() * torch.eye(4), atol=1e-5)
    assert all(not torch.allclose(a, b, atol=0.1) for a, b in pairwise(several))


def test_soft_masses_are_unbiased_too() -> None:
    """Shares of a sample are masses as hits are; softer cells scatter less, and the error says so."""
    y = np.random.default_rng(0).standard_normal((100, 6))
    solution = distot.solve(y, epsilon=0.2, top_k=100, until_chi2=None, max_samples=3000, progress=False)
    problem, heights = solution.problem, solution.held.progress.state.average
    search = assign.build("auto", problem.target.atoms[:])
    soft = Soft(0.2 / problem.frame.unit, 100)

    def look(samples: int, step: int) -> Estimate:
        masses = cell_masses(problem, search, heights, soft, samples, Stream.CHECK, step, lambda: None)
        assert masses.total.sum() == pytest.approx(samples, rel=0.01)
        return masses.chi2(problem.target.mass)

    truth, found = look(300_000, 10_000), [look(2048, step) for step in range(120)]
    values = np.array([f.value for f in found])
    assert abs(values.mean() - truth.value) < 4 * np.hypot(values.std() / np.sqrt(120), truth.error)
    assert 0.8 < np.sqrt(np.mean([f.error**2 for f in found])) / values.std() < 3


def test_limit_of_an_estimate() -> None:
    assert Estimate(1.0, 2.0).lower(0.95) == pytest.approx(1 - 1.644854 * 2)
