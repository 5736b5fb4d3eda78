"""Transport on the unit sphere at the cost -log<x, y>: closed forms, exact solvers, and all that a run can do."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
from grids import on_grid
from numpy.typing import NDArray
from scipy import integrate, optimize

import distot
from distot import assign, cli, descent, optim, start, tree
from distot.assign import Assigner
from distot.case import Room
from distot.cells import VECTORS, measure
from distot.certify import certify
from distot.errors import InputError
from distot.grid import Grid
from distot.orbit import points
from distot.power import Logarithmic, factors
from distot.problem import Problem, build_problem
from distot.schedule import Options
from distot.solution import Interrupted, Solution
from distot.source import Stream
from distot.store import copy_latents
from distot.work import Solve

Array = NDArray[np.float64]
TINY = 1e-6  # GiB: nothing fits


def unit(y: Array) -> Array:
    found: Array = y / np.linalg.norm(y, axis=1, keepdims=True)
    return found


def cloud(n: int, d: int, seed: int = 0) -> Array:
    return unit(np.random.default_rng(seed).standard_normal((n, d)) * np.linspace(1.5, 0.7, d))


def cross(d: int) -> Array:
    return np.concatenate([np.eye(d), -np.eye(d)])


def on_circle(angle: Array) -> Array:
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def solve(y: Array, **options: Any) -> Solution:
    return distot.solve(y, "sphere", cost="log", progress=False, **options)


def spherical(y: Array, **options: Any) -> Problem:
    return build_problem(y, "sphere", device="cpu", cost="log", **options)


def near(found: float, expected: float, error: float) -> None:
    """Within 4 standard errors, and these are small."""
    assert error < 0.02 * abs(expected)
    assert abs(found - expected) < 4 * error


class TestClosedForms:
    @pytest.mark.parametrize(("d", "cost"), [(2, np.log(2)), (3, 1.0)])
    def test_two_opposite_atoms_cost_what_half_spheres_do(self, d: int, cost: float) -> None:
        """E[-log|x_1|]: log 2 on the circle, and 1 in space, where x_1 is uniform. Heights say nothing here."""
        y = np.eye(d)[[0, 0]] * [[1.0], [-1.0]]
        found = solve(y, until_chi2=None, max_samples=1000, certificate_samples=100_000).certificate
        near(found.map_cost, cost, found.map_cost_error)
        assert abs(found.chi2) < 4 * found.chi2_error
        assert found.unseen == 0

    @pytest.mark.parametrize("d", [2, 3])
    def test_cross(self, d: int) -> None:
        """By symmetry heights are equal, and the cost is E[-log max|x_i|], over a face of the cube in quadrature."""
        if d == 2:
            exact = 4 / np.pi * integrate.quad(lambda t: -np.log(np.cos(t)), 0, np.pi / 4)[0]
        else:

            def rate(u: float, v: float) -> float:  # cost times density of directions (u, v, 1)
                square = 1 + u * u + v * v
                return 0.5 * float(np.log(square)) * square**-1.5

            exact = 24 / (4 * np.pi) * integrate.dblquad(rate, 0, 1, 0, 1)[0]
        solution = solve(cross(d), until_chi2=None, max_samples=8000, certificate_samples=100_000)
        c = solution.certificate
        assert np.abs(solution.heights).max() < 0.02
        near(c.bound, exact, c.bound_error)
        near(c.map_cost, exact, c.map_cost_error)
        assert c.limit < c.bound < c.limit + 2 * c.bound_error

    def test_arcs_of_a_circle(self) -> None:
        """Cells are arcs between angles where e^{h_i} cos(t - a_i) = e^{h_j} cos(t - a_j); the dual is an integral."""
        angle = np.array([0.0, 1.1, 2.0, 3.3, 4.6, 5.5])
        mass = np.array([0.14, 0.2, 0.1, 0.23, 0.12, 0.21])
        t = (np.arange(40_000) + 0.5) * 2 * np.pi / 40_000
        cosines = np.log(np.maximum(np.cos(t[:, None] - angle), 1e-12))

        def energy(h: Array) -> tuple[float, Array]:
            score = cosines + h
            share = np.bincount(score.argmax(axis=1), minlength=len(h)) / len(t)
            return float(score.max(axis=1).mean() - mass @ h), share - mass

        def arcs(h: Array) -> Array:
            v = np.exp(h)[:, None] * on_circle(angle)
            v -= np.roll(v, -1, axis=0)
            edge = np.arctan2(v[:, 1], v[:, 0]) + np.pi / 2  # from atom i to the next
            return ((edge - np.roll(edge, 1)) % (2 * np.pi)) / (2 * np.pi)

        best = optimize.minimize(energy, np.zeros(6), jac=True, method="BFGS", options={"gtol": 1e-4})
        exact = best.x - mass @ best.x
        assert np.abs(arcs(exact) - mass).max() < 1e-3
        solution = solve(on_circle(angle), mass=mass, until_chi2=None, max_samples=15_000, certificate_samples=100_000)
        assert np.abs(arcs(solution.heights) - mass).max() < 0.01
        assert np.abs(solution.heights - exact).max() < 0.04
        near(solution.certificate.bound, -float(best.fun), solution.certificate.bound_error)
        assert mass @ solution.heights == pytest.approx(0, abs=1e-12)


class TestAgainstOtherTools:
    @pytest.mark.parametrize("d", [2, 4])
    def test_bound_on_samples_nearly_is_the_exact_discrete_cost(self, d: int) -> None:
        """For any samples POT's network simplex finds more than the dual value of our heights, and little more."""
        y = cross(d) if d == 2 else cloud(20, d)
        mass = np.random.default_rng(2).dirichlet(np.full(len(y), 8.0))
        solution = solve(y, mass=mass, until_chi2=None, max_samples=20_000)
        x = unit(np.random.default_rng(1).standard_normal((3000, d)))
        product = x @ y.T
        cost = np.where(product > 0, -np.log(np.maximum(product, 1e-9)), 1e3)  # dear, for there is no plan through it
        exact = ot.emd2(np.full(len(x), 1 / len(x)), mass, cost)
        dual = mass @ solution.heights - solution.potential(x).mean()
        assert -1e-6 < exact - dual < 0.01 * exact
        c = solution.certificate
        assert abs(exact - c.bound) < 4 * c.bound_error * np.sqrt(1 + c.samples / len(x))


class TestClouds:
    @pytest.mark.parametrize(("n", "d"), [(300, 3), (500, 8), (200, 24)])
    def test_goal_bound_and_identity(self, n: int, d: int) -> None:
        mass = np.random.default_rng(3).dirichlet(np.full(n, 4.0))
        solution = solve(cloud(n, d), mass=mass)
        c = solution.certificate
        assert solution.reason == "until_chi2"
        assert c.chi2 < 0.05 + 3 * c.chi2_error
        assert c.map_cost + c.mismatch == pytest.approx(c.bound, abs=1e-6)  # from different numbers
        assert c.bound - c.map_cost < 4 * c.mismatch_error + 0.05 * c.map_cost
        assert (c.cost, c.unseen) == ("log", 0)
        assert c.empty < 0.02 * n
        spent = solve(cloud(n, d), mass=mass, until_chi2=None, max_samples=100 * n)
        assert spent.efficiency > 0.5  # of the steps, wherever the stop rule would have ended them

    def test_tight_clusters_begin_at_their_nodes(self) -> None:
        """The multilevel start (29) has found masses of clusters and cells that equal heights have not."""
        generator = np.random.default_rng(4)
        y = unit(cross(3)[generator.integers(0, 6, 1500)] + 0.05 * generator.standard_normal((1500, 3)))
        problem = spherical(y)
        search = assign.over(problem, "native")
        begun, work = start.multilevel(problem, "native", lambda: None)
        assert work < 10 * len(y)
        chi2 = [start.probe(problem, search, h, None, lambda: None)[0] for h in (begun, torch.zeros(len(y)).double())]
        assert chi2[0] < 2.5 < 0.1 * chi2[1]

    def test_turned_latents_have_the_same_heights(self) -> None:
        y = cloud(40, 3)
        turn = np.linalg.qr(np.random.default_rng(5).standard_normal((3, 3)))[0]
        heights = [solve(its, until_chi2=None, max_samples=8000).heights for its in (y, y @ turn.T)]
        assert np.abs(heights[0] - heights[1]).max() < 0.08
        assert np.ptp(heights[0]) > 0.3

    def test_warm_start_of_moved_latents(self) -> None:
        y = cloud(200, 4)
        first = solve(y, until_chi2=None, max_samples=8000)
        moved = unit(y[5:] + 0.002 * np.random.default_rng(6).standard_normal((195, 4)))
        again = solve(moved, init=first, until_chi2=None, max_samples=4000)
        assert first.certificate.chi2 < 0.03
        assert again.certificate.chi2 < 0.04
        with pytest.raises(InputError, match="init was solved for the cost 'log', this problem has 'quadratic'"):
            distot.solve(y, "sphere", init=first, until_chi2=0.1)


class TestMap:
    def test_assign_map_potential_and_cells_say_what_formulas_say(self) -> None:
        y, generator = cloud(60, 5), np.random.default_rng(7)
        solution = solve(y, until_chi2=None, max_samples=5000, mass=generator.dirichlet(np.full(60, 3.0)))
        x = unit(generator.standard_normal((5000, 5)))
        score = np.log(np.maximum(x @ y.T, 1e-9)) + solution.heights
        assert (solution.assign(x) == score.argmax(axis=1)).mean() > 0.999
        assert np.array_equal(solution.assign(3 * x), solution.assign(x))
        assert np.allclose(solution.potential(x), score.max(axis=1), atol=1e-6)
        cost = -np.log((x * solution.map(x)).sum(axis=1))
        c = solution.certificate
        assert abs(c.map_cost - cost.mean()) < 4 * np.hypot(c.map_cost_error, cost.std() / np.sqrt(len(x)))
        cells = solution.cells(100_000)
        assert (cells.mass * cells.cost).sum() == pytest.approx(c.map_cost, abs=5 * c.map_cost_error)

    def test_what_is_for_the_quadratic_cost_says_so(self) -> None:
        solution = solve(cross(3), until_chi2=None, max_samples=500)
        with pytest.raises(
            InputError, match="weights is for the cost 'quadratic' alone; this was solved for the cost 'log'"
        ):
            _ = solution.weights
        with pytest.raises(InputError, match="generation is for the cost 'quadratic' alone"):
            solution.generate(10)


class TestSearch:
    @pytest.mark.parametrize("name", ["native", "dense", "faiss", "auto", "tiled", "tiled dense"])
    def test_every_search_finds_the_largest_score(self, name: str) -> None:
        """Of plain samples and of orbits, for heights that float32 products hold easily and barely."""
        y = cloud(700, 6).astype(np.float16).astype(np.float64)
        for spread in (0.3, 15.0):
            problem = spherical(y, memory=TINY if "tiled" in name else None)
            search = assign.over(problem, name.removeprefix("tiled").strip() or "auto")
            heights = torch.from_numpy(np.random.default_rng(8).uniform(-1, 1, 700)) * spread
            for x in (next(problem.batch(Stream.STEP, 0, 512))[1], points(next(problem.batch(Stream.STEP, 0, 512))[1])):
                self.check(search, x, torch.from_numpy(y).double(), heights)

    def check(self, search: Assigner, x: Any, y: torch.Tensor, heights: torch.Tensor) -> None:
        found = search(x, heights, 3)
        product = points(x).double() @ y.T
        truth = torch.where(product > 0, product, 1e-300).log() + heights
        own = truth.gather(1, found.index)
        clear = product.gather(1, found.index) > 1e-3
        assert (clear[:, 0]).double().mean() > 0.95
        assert ((own - found.score).abs()[clear] < 2e-3).all()
        assert ((own - found.score).abs()[clear].mean()) < 1e-5
        assert (own[:, 0] >= truth.amax(1) - 2e-3)[clear[:, 0]].all()

    def test_not_in_memory_is_the_same_bit_for_bit(self) -> None:
        y = cloud(600, 7)
        kept, read = (
            solve(y, memory=memory, assigner="native", until_chi2=None, max_samples=8000) for memory in (None, TINY)
        )
        assert read.problem.target.atoms.whole is None
        assert np.array_equal(kept.heights, read.heights)
        assert kept.certificate == read.certificate

    def test_scores_of_what_is_not_seen(self) -> None:
        """Without a positive product scores are ``unseen``; else they are within FLOOR of the best."""
        cost = Logarithmic()
        found = cost.scores(torch.tensor([[2.0, 1.0], [0.5, -0.1], [-0.1, -0.2], [0.0, -1.0]]))
        assert found[0].tolist() == pytest.approx([np.log(2), 0], abs=1e-6)
        assert found[1].tolist() == pytest.approx([np.log(0.5), np.log(0.5 * cost.FLOOR)], rel=1e-6)
        assert (found[2:] == cost.unseen).all()
        assert torch.isfinite(factors(torch.tensor([-1e9, 1e9]))).all()

    def test_heights_stay_where_float32_holds_their_exponentials(self) -> None:
        """However far off they begin, they end up where they should, and nothing overflows."""
        y = cloud(20, 3)
        wild = solve(y, init=np.linspace(-400, 400, 20), until_chi2=None, max_samples=8000)
        state = wild.held.progress.state
        assert float(state.heights.abs().max()) < 2
        assert wild.certificate.chi2 < 0.05
        assert np.abs(wild.heights - solve(y, until_chi2=None, max_samples=4000).heights).max() < 0.2


class TestUnseen:
    CONE = unit(np.array([0.0, 0.0, 1.0]) + 0.2 * np.random.default_rng(9).standard_normal((50, 3)))

    def test_latents_in_a_half_space_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"of 4,09\d samples of the sphere see no latent within a right angle"):
            solve(self.CONE)

    def test_a_certificate_counts_samples_at_infinite_cost(self) -> None:
        """There it takes -log FLOOR for the cost, and (10) holds all the same."""
        problem = spherical(self.CONE)
        heights = torch.from_numpy(np.random.default_rng(0).standard_normal(50))
        c = certify(problem, assign.over(problem, "native"), heights, 20_000)
        x = unit(np.random.default_rng(1).standard_normal((100_000, 3)))
        share = ((x @ self.CONE.T).max(axis=1) <= 0).mean()
        assert c.unseen / c.samples == pytest.approx(share, abs=0.02)
        assert c.map_cost > share * -np.log(Logarithmic.FLOOR) * 0.9
        assert c.map_cost + c.mismatch == pytest.approx(c.bound, rel=1e-6)


HEAVY = np.array([0.7, 0.1, 0.1, 0.1])
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "lengths": (
        lambda: solve(cross(3) * np.array([1, 1, 2, 1, 3, 1.0])[:, None]),
        r"2 of 6 latents are not unit vectors.*row 2, of length 2; normalise them",
    ),
    "zero": (lambda: solve(np.concatenate([cross(2), [[0.0, 0.0]]])), "row 4, of length 0; normalise"),
    "gaussian": (lambda: distot.solve(cross(3), cost="log"), "not for the source 'gaussian'; take source 'sphere'"),
    "radius": (lambda: distot.solve(cross(3), distot.Sphere(3, 2.0), cost="log"), "not for a sphere of radius 2"),
    "centre": (
        lambda: distot.solve(cross(3), distot.Sphere(3, 1.0, [1.0, 0, 0]), cost="log"),
        r"about \[1.0, 0.0, 0.0\]; take source 'sphere'",
    ),
    "name": (
        lambda: distot.solve(cross(3), "sphere", cost="cubic"),
        "unknown cost 'cubic'; choose one of quadratic, log",
    ),
    "epsilon": (lambda: solve(cross(3), epsilon=0.1), "leave epsilon out"),
    "recall": (lambda: solve(cross(3), recall=0.9), "leave recall out"),
    "lists": (lambda: solve(cross(3), assigner="lists"), "take auto, native, dense, faiss or triton"),
    "mass": (lambda: solve(cross(2), mass=HEAVY), "latent 0 has the mass 0.7"),
    "sum": (
        lambda: solve(cross(2)[[0, 1, 0, 2, 3]], mass=np.array([0.3, 0.1, 0.3, 0.2, 0.1])),
        "latent 0 has the mass 0.6",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_work_starts(name: str) -> None:
    attempt, words = BAD[name]
    with pytest.raises(InputError, match=words):
        attempt()


N, D = 1500, 4


def everything(grid: Grid, talk: bool = False) -> dict[str, Any]:
    """The numbers of every phase of a solve. talk: as if the problem were too large for anything to be done by all."""
    if talk:
        optim.SMALL, tree.WHOLE = 100, 50
    mass = np.random.default_rng(6).gamma(2.0, size=N)
    problem = spherical(cloud(N, D), mass=mass, grid=grid)
    search, target, split = assign.over(problem, "native"), problem.target, problem.target.split
    start.check_sight(problem, search)
    heights, work = start.multilevel(start.of_groups(problem), "native", lambda: None)
    heights = start.to_groups(problem, heights, start.guess_of(problem))
    state = optim.begin(heights, work, split, target.twins)
    low = torch.arange(0 if grid.target.rank else 9)  # the same atoms starve on every grid
    state = optim.lifted(state, state.heights.index_fill(0, low, -30.0), 0)
    for _ in range(6):
        state = descent.advance(
            problem, search, state, torch.from_numpy(target.mass), Stream.STEP, state.step, lambda: None
        )
    sums = measure(problem, search, state.average, 10_000)
    found = certify(problem, search, state.average, 10_000).to_dict()
    return {
        "begun": split.gather(heights).numpy(),
        "average": split.gather(state.average).numpy(),
        "certificate": np.array([value for value in found.values() if isinstance(value, float)]),
        "cells": np.concatenate(
            [split.gather(torch.from_numpy(getattr(sums, its))).numpy().ravel() for its in VECTORS]
        ),
    }


@cache
def alone() -> dict[str, Any]:
    return everything(Grid())


def test_a_grid_gives_what_one_process_gives() -> None:
    for answer in on_grid((2, 2), everything, True):
        for name, expected in alone().items():
            assert np.abs(answer[name] - expected).max() <= (1e-6 if name == "cells" else 1e-9) * np.abs(expected).max()


class TestRuns:
    def test_stopped_and_resumed_it_is_the_unbroken_run(self, tmp_path: Path) -> None:
        y = cloud(300, 4)
        calls = 0

        def asked() -> int | None:
            nonlocal calls
            calls += 1
            return signal.SIGTERM if calls > 60 else None

        options = Options(until_chi2=0.05, cost="log")
        with pytest.raises(Interrupted):
            Solve(y, "sphere", None, options, tmp_path / "run.zarr")(Room(asked=asked, show=False))
        broken = distot.load(tmp_path / "run.zarr")
        assert broken.held.progress.state.step > 5
        resumed, unbroken = distot.resume(tmp_path / "run.zarr"), solve(y, until_chi2=0.05)
        assert unbroken.held.progress.state.step > broken.held.progress.state.step
        assert np.array_equal(resumed.heights, unbroken.heights)
        assert resumed.certificate == unbroken.certificate == distot.load(tmp_path / "run.zarr").certificate

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        solution = solve(cloud(40, 3), until_chi2=None, max_samples=2000)
        solution.save(tmp_path / "run.zarr")
        loaded = distot.load(tmp_path / "run.zarr")
        x = unit(np.random.default_rng(0).standard_normal((100, 3)))
        assert loaded.options.cost == "log"
        assert np.array_equal(loaded.potential(x), solution.potential(x))

    def test_commands(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        copy_latents(cloud(100, 3), None, tmp_path / "z.zarr", "drawn for a test")

        def call(*words: object) -> tuple[int, str]:
            with pytest.raises(SystemExit) as done:
                cli.main([str(word) for word in words])
            assert isinstance(done.value.code, int)
            printed = capfd.readouterr()
            return done.value.code, printed.out + printed.err

        run = tmp_path / "run.zarr"
        code, text = call(
            "solve", tmp_path / "z.zarr", run, "--cost", "log", "--source", "sphere", "--until-chi2", "0.1"
        )
        assert code == 0
        assert "mean of -log<x, T(x)>" in text
        assert "W2" not in text
        code, text = call("certify", run, "--samples", 20_000, "--seed-step", 1)
        assert (code, "cost bound - map cost" in text) == (0, True)
        code, text = call("inspect", run)
        assert "cost bound" in text
        for refused in (
            ("export", run, tmp_path / "g.npy", "--as", "pot"),
            ("generate", run, tmp_path / "g.zarr", "-n", 9),
        ):
            code, text = call(*refused)
            assert (code, "for the cost 'quadratic' alone" in text) == (1, True)
        code, text = call("solve", tmp_path / "z.zarr", tmp_path / "no.zarr", "--cost", "log")
        assert (code, "take source 'sphere'" in text) == (1, True)
        assert not (tmp_path / "no.zarr").exists()
