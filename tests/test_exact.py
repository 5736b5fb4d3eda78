"""Exact cells in the plane against closed forms, differences, a grid and the certificate; Newton's method."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import norm

import distot
from distot import assign, exact, newton, start
from distot.certify import certify
from distot.cli import main
from distot.errors import DistotWarning, InputError
from distot.exact import ExactCells, Plane
from distot.planar import borders, cross, polygons
from distot.problem import Problem, build_problem
from distot.store import Run, copy_latents

Array = NDArray[np.float64]

SOURCES: dict[str, distot.Source] = {
    "gaussian": distot.Gaussian([1.0, -2.0], [[2.0, 0.6], [0.6, 0.5]]),
    "cube": distot.Cube(2, -1.0, 3.0),
    "ball": distot.Ball(2, 2.5, [1.0, 4.0]),
}
every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())


def cloud(kind: str, n: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    if kind == "clusters":
        return 5 * rng.standard_normal((25, 2))[rng.integers(0, 25, n)] + 0.05 * rng.standard_normal((n, 2))
    if kind == "cubed":
        return rng.standard_normal((n, 2)) ** 3
    if kind == "line":
        return np.outer(np.sort(rng.uniform(size=n)), [1.0, 2.0]) + 7
    if kind == "far":
        return np.concatenate([[[1e5, -1e5]], rng.standard_normal((n - 1, 2))])
    side = round(n**0.5)
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2) * 0.5


CLOUDS = ("clusters", "cubed", "line", "far", "grid")


def cells_of(latents: Array, source: distot.Source, heights: Array, mass: Array | None = None) -> ExactCells:
    """Cells of heights in user units."""
    problem = build_problem(latents, source, mass)
    return exact.exact_cells(problem, latents, problem.frame.heights_in(heights, problem.target.tilt))


def fitted(problem: Problem, noise: float, seed: int = 0) -> Array:
    """Heights in the frame about those of the Gaussian start, by so many of their standard deviations over n^1/2."""
    heights = start.normal(problem).heights(problem.target.atoms).numpy()
    return heights + noise * heights.std() / len(heights) ** 0.5 * np.random.default_rng(seed).standard_normal(
        len(heights)
    )


def spacing(latents: Array) -> Array:
    """Voronoi heights: the cell of a latent is what is nearest to it."""
    return -0.5 * (latents**2).sum(axis=1)


class TestClosedForms:
    def test_two_half_planes_of_a_gaussian(self) -> None:
        mean, cov = np.array([1.0, -2.0]), np.array([[2.0, 0.6], [0.6, 0.5]])
        y, h = np.array([[0.3, 1.0], [-0.4, 2.5]]), np.array([-0.3, 3.5])
        found = cells_of(y, SOURCES["gaussian"], h)
        apart = y[1] - y[0]
        sigma = float(np.sqrt(apart @ cov @ apart))
        t = float(apart @ mean + h[1] - h[0]) / sigma
        assert found.mass == pytest.approx([norm.sf(t), norm.cdf(t)], abs=1e-15)
        assert found.centre[1] == pytest.approx(mean + cov @ apart / sigma * norm.pdf(t) / norm.cdf(t), abs=1e-13)
        energy = y[0] @ mean + h[0] + sigma * (norm.pdf(t) + t * norm.cdf(t)) - h.mean()  # heights have mean 0
        assert found.energy == pytest.approx(energy, abs=1e-13)

    def test_latents_on_a_line_cut_strips(self) -> None:
        a, h = np.array([-2.0, 0.5, 1.0, 4.0]), np.array([0.3, 0.9, 0.7, -1.0])
        y = np.outer(a, [0.6, 0.8]) + 3
        cuts = np.concatenate([[-np.inf], -np.diff(h) / np.diff(a), [np.inf]])
        gaussian = cells_of(y, distot.Gaussian(dim=2), h)
        assert gaussian.mass == pytest.approx(np.diff(norm.cdf(cuts)), abs=1e-15)
        ball = cells_of(y, distot.Ball(2, 2.0), h)
        t = np.clip(cuts / 2, -1, 1)
        assert ball.mass == pytest.approx(np.diff(t * np.sqrt(1 - t**2) + np.arcsin(t)) / np.pi, abs=1e-15)
        cube = cells_of(a[:, None] * [1.0, 0.0] + 3, distot.Cube(2, -1, 1), h)
        assert cube.mass == pytest.approx(np.diff(np.clip(cuts, -1, 1)) / 2, abs=1e-15)

    def test_chequered_square(self) -> None:
        """k x k centres of equal squares: masses, centres, polygons, W2 and cost are known, and cells meet by fours."""
        k = 7
        one = (np.arange(k) + 0.5) / k
        y = np.stack(np.meshgrid(one, one), axis=-1).reshape(-1, 2)
        found = cells_of(y, distot.Cube(2), spacing(y))
        assert found.mass == pytest.approx(np.full(k * k, 1 / k**2), abs=1e-15)
        assert found.centre == pytest.approx(y, abs=1e-13)
        assert found.map_cost == pytest.approx(2 / (12 * k**2), abs=1e-14)
        assert found.w2_squared_bound == pytest.approx(found.map_cost, abs=1e-14)
        assert found.chi2 < 1e-26
        for middle, corners in zip(y, found.polygons, strict=True):
            assert np.abs(corners - middle).max() == pytest.approx(0.5 / k, abs=1e-13)
            assert area(corners) == pytest.approx(1 / k**2, abs=1e-14)

    def test_quarters_of_a_disc(self) -> None:
        y = np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
        found = cells_of(y, distot.Ball(2, 3.0), np.zeros(4))
        assert found.mass == pytest.approx([0.25] * 4, abs=1e-15)
        assert found.centre == pytest.approx(4 / np.pi * y, abs=1e-13)  # 4 r / (3 pi)

    @every_source
    def test_empty_cells(self, source: distot.Source) -> None:
        found = cells_of(np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]]), source, np.array([50.0, 0.0, 0.0]))
        assert found.mass == pytest.approx([1.0, 0.0, 0.0], abs=1e-14)
        assert found.mass[1:].tolist() == [0, 0]
        assert np.isnan(found.centre[1:]).all()
        assert [len(corners) for corners in found.polygons] == [4, 0, 0]

    def test_a_cell_beyond_the_disc_is_empty(self) -> None:
        """It shows in the square around the disc, in its corner alone."""
        found = cells_of(np.array([[0.0, 0.0], [1.0, 1.0]]), distot.Ball(2), np.array([1.6, 0.0]))
        assert found.mass.tolist() == [pytest.approx(1.0, abs=1e-15), 0.0]
        assert area(found.polygons[1]) > 0.05


def area(corners: Array) -> float:
    return 0.5 * float(cross(corners, np.roll(corners, -1, axis=0)).sum())


class TestCellsFill:
    @every_source
    @pytest.mark.parametrize("kind", CLOUDS)
    @pytest.mark.parametrize("noise", [0.0, 0.3, 30.0])
    def test_masses_sum_to_one(self, source: distot.Source, kind: str, noise: float) -> None:
        y = cloud(kind, 400)
        problem = build_problem(y, source)
        seen = exact.plane(problem, y)
        found = seen.measure(fitted(problem, noise))
        assert found.mass.sum() == pytest.approx(1, abs=1e-12)
        assert found.mass.min() > -1e-15
        assert np.abs(found.moment.sum(axis=0)).max() < 1e-12

    @pytest.mark.parametrize("n", [1, 2, 3, 50])
    def test_polygons_fill_the_square(self, n: int) -> None:
        rng = np.random.default_rng(n)
        p, g = rng.standard_normal((n, 2)), 0.2 * rng.standard_normal(n)
        edges = borders(p, g, 2.0)
        areas = np.array([area(corners) if len(corners) else 0.0 for corners in polygons(edges, n)])
        assert areas.sum() == pytest.approx(16, abs=1e-12)
        grid = (np.arange(400) + 0.5) / 100 - 2
        z = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
        count = np.bincount((z @ p.T + g).argmax(axis=1), minlength=n)
        assert areas == pytest.approx(count / 100**2, abs=5e-3)

    @every_source
    def test_polygons_hold_what_is_assigned_to_their_latents(self, source: distot.Source) -> None:
        y = cloud("cubed", 60)
        solution = solve(y, source, until_chi2=0.5, exact=False)
        x = source.draw(distot.source.Key(1, distot.source.Stream.MOMENTS, 0, 0), 1000).numpy()
        shapes = solution.exact_cells().polygons
        for sample, winner in zip(x, solution.assign(x), strict=True):
            corners = shapes[winner]
            sides = np.roll(corners, -1, axis=0) - corners
            assert (cross(sides, sample - corners) >= -1e-4 * np.hypot(*sides.T)).all()


class TestDerivatives:
    @every_source
    def test_of_the_energy_are_masses(self, source: distot.Source) -> None:
        rng = np.random.default_rng(1)
        y, nu = cloud("clusters", 80), rng.dirichlet(np.ones(80))
        problem = build_problem(y, source, nu)
        h, way, small = fitted(problem, 0.1), rng.standard_normal(80), 1e-5
        up, down = (exact.exact_cells(problem, y, h + sign * small * way) for sign in (1, -1))
        along = problem.frame.unit * float(way @ (exact.exact_cells(problem, y, h).mass - nu))
        assert (up.energy - down.energy) / (2 * small) == pytest.approx(along, rel=1e-5)

    @every_source
    @pytest.mark.parametrize("kind", ["clusters", "line", "grid"])
    def test_of_the_masses_are_the_hessian(self, source: distot.Source, kind: str) -> None:
        y = cloud(kind, 100)
        problem = build_problem(y, source)
        seen, h = exact.plane(problem, y), fitted(problem, 0.1)
        size = 1e-4 * h.std() / 100
        way = size * np.random.default_rng(2).standard_normal(100)
        hessian = seen.hessian(seen.measure(h))
        assert np.abs(hessian - hessian.T).max() < 1e-15
        assert np.abs(hessian.sum(axis=1)).max() < 1e-12 * hessian.max()
        change = (seen.measure(h + way).mass - seen.measure(h - way).mass) / 2
        assert np.abs(change - hessian @ way).max() < 1e-3 * np.abs(change).max()

    def test_density_along_a_border_of_a_gaussian(self) -> None:
        """phi(distance) (Phi(end) - Phi(start)), by quadrature."""
        rng = np.random.default_rng(3)
        first, last = 3 * rng.standard_normal((2, 500, 2))
        unit = (last - first) / np.hypot(*(last - first).T)[:, None]
        *_, density = exact.Normal().integrals(first, last)
        along = norm.cdf((last * unit).sum(axis=1)) - norm.cdf((first * unit).sum(axis=1))
        assert density == pytest.approx(norm.pdf(cross(first, unit)) * along, abs=1e-15)


class TestAgainstSampling:
    def test_a_fine_grid(self) -> None:
        """Masses and energy by the midpoint rule, 1,500 x 1,500 points."""
        y = cloud("cubed", 40)
        problem = build_problem(y, distot.Gaussian(dim=2))
        h = fitted(problem, 0.2)
        found = exact.exact_cells(problem, y, h)
        user = problem.frame.heights_out(h, problem.target.tilt, problem.target.mass)
        one = 14 * ((np.arange(1500) + 0.5) / 1500 - 0.5)
        weight = norm.pdf(one)
        mass, energy = np.zeros(40), 0.0
        for a, w in zip(one, weight, strict=True):
            scores = np.stack([np.full(1500, a), one], axis=1) @ y.T + user
            share = w * weight * (14 / 1500) ** 2
            mass += np.bincount(scores.argmax(axis=1), share, 40)
            energy += float(share @ scores.max(axis=1))
        assert found.energy == pytest.approx(energy, rel=1e-5)
        assert np.abs(found.mass - mass).max() < 5e-4
        assert found.mass.max() > 0.01

    def test_the_certificate_on_twenty_problems(self) -> None:
        """Certificates of perturbed heights are as far from the exact chi2 and bound as their error bars say."""
        masses, bounds, sizes = [], [], []
        for number in range(20):
            rng = np.random.default_rng(100 + number)
            n = int(np.geomspace(10, 300, 20)[number])
            y = cloud(("clusters", "cubed")[number % 2], n, number) if number % 4 else rng.standard_normal((n, 2))
            source = list(SOURCES.values())[number % 3]
            problem = build_problem(y, source, rng.dirichlet(np.full(n, 5.0)), seed=number)
            heights = newton.solve(exact.plane(problem, y), fitted(problem, 0.0)).heights
            heights = heights + 0.5 * heights.std() / n * rng.standard_normal(n)
            found = exact.exact_cells(problem, y, heights)
            search = assign.build("dense", problem.target.atoms[:])
            seen = certify(problem, search, torch.from_numpy(heights), 4_000)
            masses.append((seen.chi2 - found.chi2) / seen.chi2_error)
            bounds.append((seen.w2_squared_bound - found.w2_squared_bound) / seen.w2_squared_bound_error)
            sizes.append(found.chi2)
        assert 0.01 < np.median(sizes) < 3
        for scores in (np.array(masses), np.array(bounds)):
            assert np.abs(scores).max() < 4
            assert 0.5 < np.sqrt((scores**2).mean()) < 1.6


class TestNewton:
    @every_source
    @pytest.mark.parametrize("kind", CLOUDS)
    def test_reaches_unequal_masses_from_afar(self, source: distot.Source, kind: str) -> None:
        y = cloud(kind, 144)
        problem = build_problem(y, source, 0.05 + np.random.default_rng(4).gamma(0.5, size=144))
        seen, told = exact.plane(problem, y), list[dict[str, float]]()
        found = newton.solve(seen, fitted(problem, 0.0), told.append)
        assert found.why is None
        assert found.error <= newton.GOAL
        assert np.abs(seen.measure(found.heights).mass - seen.mass).max() <= 1e-9 * seen.mass.max()
        chi2 = np.array([news["chi2"] for news in told])
        assert (np.diff(chi2) < 0).all()
        assert chi2[0] > 1e-3

    @every_source
    def test_opens_empty_cells(self, source: distot.Source) -> None:
        """From heights where nearly all cells are empty, and from good ones of which a tenth were lowered too far."""
        y = cloud("clusters", 144)
        problem = build_problem(y, source)
        seen = exact.plane(problem, y)
        good = newton.solve(seen, np.zeros(144))
        assert good.error <= newton.GOAL
        assert (seen.measure(np.zeros(144)).mass == 0).mean() > 0.8
        lowered = good.heights - 3 * (np.arange(144) % 10 == 0)
        assert (seen.measure(lowered).mass == 0).sum() >= 14
        told = list[dict[str, float]]()
        again = newton.solve(seen, lowered, told.append)
        assert again.error <= newton.GOAL
        apart = again.heights - good.heights
        assert apart - apart.mean() == pytest.approx(np.zeros(144), abs=1e-8)
        assert told[0]["least"] > 0

    def test_squares_the_error(self) -> None:
        y = cloud("cubed", 300)
        problem = build_problem(y, SOURCES["ball"])
        told = list[dict[str, float]]()
        newton.solve(exact.plane(problem, y), fitted(problem, 0.0), told.append)
        error = np.array([news["error"] for news in told])
        assert error[-2] < 0.1
        assert error[-1] < max(10 * error[-2] ** 2, 1e-11)

    def test_masses_below_rounding_are_given_up(self) -> None:
        y = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        problem = build_problem(y, "gaussian", np.array([0.5, 0.5, 1e-16]))
        found = newton.solve(exact.plane(problem, y), np.zeros(3))
        assert found.why is not None
        with pytest.warns(DistotWarning, match="not exact"):
            solution = solve(y, mass=[0.5, 0.5, 1e-16], until_chi2=None, max_samples=2000)
        assert solution.reason == "sampled"


def solve(latents: Any, *args: Any, **options: Any) -> distot.Solution:
    fast = {"exact": True, "until_chi2": 0.2, "certificate_samples": 2000, "progress": False}
    return distot.solve(latents, *args, **(fast | options))


class Crash(Exception):
    """Ends a process in the middle of something, as far as its run folder can tell."""


def at_newton(iteration: int, do: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "newton" and event["iteration"] == iteration:
            do()

    return hear


def crash() -> None:
    raise Crash


class TestSolve:
    @every_source
    def test_heights_are_exact_in_user_units(self, source: distot.Source) -> None:
        y = cloud("clusters", 200).astype(np.float32) + 30
        solution = solve(y, source, np.random.default_rng(5).dirichlet(np.full(200, 5.0)))
        assert solution.reason == "exact"
        assert "exact" in solution.explanation
        mine = solution.exact_cells()
        assert mine.error <= 1e-9
        assert mine.chi2 < 1e-17
        again = cells_of(y.astype(np.float64), source, solution.heights, mine.wanted)
        assert again.error < 1e-7  # user heights are rounded at an offset
        assert again.w2_squared_bound == pytest.approx(mine.w2_squared_bound, rel=1e-9)
        assert mine.map_cost == pytest.approx(mine.w2_squared_bound, rel=1e-8)
        seen = solution.certificate
        assert abs(seen.chi2) < 4 * seen.chi2_error
        assert abs(seen.w2_squared_bound - mine.w2_squared_bound) < 4 * seen.w2_squared_bound_error

    def test_latents_of_cells(self) -> None:
        """Cells are those of distinct latents of positive mass, named by the first of equal ones."""
        y = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
        with pytest.warns(DistotWarning):
            solution = solve(y, "cube", [0.25, 0.25, 0.5, 0.0])
        found = solution.exact_cells()
        assert found.latent.tolist() == [0, 1]
        assert found.mass == pytest.approx([0.75, 0.25], abs=1e-9)
        assert found.centre == pytest.approx(np.array([[0.375, 0.5], [0.875, 0.5]]), abs=1e-9)

    def test_run_keeps_exact_heights(self, tmp_path: Path) -> None:
        told: list[dict[str, Any]] = []
        solution = solve(cloud("cubed", 100), run=tmp_path / "run.zarr", on_event=told.append)
        run = Run(tmp_path / "run.zarr")
        saved = run.load_checkpoint()
        assert saved is not None
        assert saved.scalars["reason"] == "exact"
        loaded = distot.load(tmp_path / "run.zarr")
        assert np.array_equal(loaded.heights, solution.heights)
        assert loaded.certificate == solution.certificate
        assert loaded.exact_cells().error <= 1e-9
        newtons = [event for event in told if event["event"] == "newton"]
        assert newtons[-1]["error"] <= 1e-9
        logged = [json.loads(line) for line in (tmp_path / "run.zarr" / "log.jsonl").read_text().splitlines()]
        assert [event["error"] for event in logged if event["event"] == "newton"] == [e["error"] for e in newtons]
        with pytest.raises(InputError, match="exact masses already"):
            distot.resume(tmp_path / "run.zarr", progress=False)

    @pytest.mark.parametrize("how", ["signal", "crash", "time"])
    def test_stopped_in_newton_and_resumed(self, tmp_path: Path, how: str) -> None:
        y, path = cloud("cubed", 100), tmp_path / "run.zarr"
        whole = solve(y)
        if how == "crash":
            with pytest.raises(Crash):
                solve(y, run=path, on_event=at_newton(2, crash))
        else:
            stop = at_newton(2, lambda: signal.raise_signal(signal.SIGINT))
            with pytest.raises(distot.Interrupted) as caught:
                solve(y, run=path, on_event=stop)
            assert caught.value.solution.reason == "sampled"
            assert caught.value.solution.exact_cells().error > 1e-9
        if how == "time":
            stopped = distot.resume(path, max_seconds=1e-3, progress=False)
            assert stopped.reason == "sampled"
            assert stopped.certificate.chi2 > 0.01
        resumed = distot.resume(path, max_seconds=np.inf, progress=False)
        assert resumed.reason == "exact"
        assert np.array_equal(resumed.heights, whole.heights)
        assert resumed.samples == whole.samples
        assert resumed.certificate == whole.certificate

    def test_any_budget_will_do_for_a_start(self) -> None:
        for budget in (1, 3000):
            solution = solve(cloud("clusters", 100), until_chi2=None, max_samples=budget)
            assert solution.samples <= budget
            assert solution.exact_cells().error <= 1e-9

    @pytest.mark.parametrize(
        ("source", "dim", "options", "words"),
        [
            ("gaussian", 3, {}, "dimension 2 for a gaussian, cube or ball"),
            ("sphere", 2, {}, "sphere in dimension 2"),
            (np.eye(90, 2), 2, {}, "samples in dimension 2"),
            ("gaussian", 2, {"epsilon": 0.1}, "epsilon"),
            ("gaussian", 2, {"workers": 2}, "workers=2"),
            (distot.Gaussian(0.0, [[1.0, 1.0], [1.0, 1.0]]), 2, {}, "singular"),
        ],
    )
    def test_refused_before_work(
        self, tmp_path: Path, source: Any, dim: int, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(InputError, match=words):
            solve(np.eye(4)[:, :dim], source, run=tmp_path / "run.zarr", **options)
        assert not (tmp_path / "run.zarr").exists()

    def test_cells_of_other_solutions(self) -> None:
        y = cloud("clusters", 30)
        rough = solve(y, until_chi2=0.5, exact=False)
        assert rough.exact_cells().error > 1e-6
        with pytest.raises(InputError, match="epsilon"):
            solve(y, epsilon=1.0, until_chi2=0.5, exact=False).exact_cells()
        with pytest.raises(InputError, match="dimension 2"):
            solve(np.eye(5), until_chi2=0.5, exact=False).exact_cells()

    def test_on_the_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        copy_latents(cloud("cubed", 80), None, tmp_path / "z.zarr", "drawn for a test")
        paths = [str(tmp_path / name) for name in ("z.zarr", "run.zarr")]
        with pytest.raises(SystemExit) as ended:
            main(["solve", *paths, "--source", "cube", "--exact", "--until-chi2", "0.3", "--json"])
        assert ended.value.code == 0
        printed = capsys.readouterr()
        said = json.loads(printed.out)
        assert said["reason"] == "exact"
        assert said["exact"]["error"] <= 1e-9
        assert "newton 0" in printed.err
        with pytest.raises(SystemExit):
            main(["certify", paths[1]])
        assert "from exact cells" in capsys.readouterr().out


def test_ten_thousand() -> None:
    """Cells of many latents at once: no step of it may be quadratic."""
    y = np.random.default_rng(6).standard_normal((10_000, 2))
    problem = build_problem(y, "gaussian")
    seen: Plane = exact.plane(problem, y)
    assert seen.measure(fitted(problem, 0.0)).mass.sum() == pytest.approx(1, abs=1e-12)
