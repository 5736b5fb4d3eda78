"""Cells and what is generated from them: against dense formulas, closed forms and modes of mixtures."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import distot
from distot.cells import by_latent, measure
from distot.cli import main as command
from distot.errors import InputError, StoreError
from distot.store import RowFile, Run, open_latents
from distot.store.rows import RowWriter

Array = NDArray[np.float64]


def quiet(latents: Any, *arguments: Any, **options: Any) -> distot.Solution:
    return distot.solve(latents, *arguments, progress=False, **options)


def ring(n: int, modes: int, radius: float = 2.0, spread: float = 0.05) -> tuple[Array, Array]:
    """A mixture of small Gaussians on a circle, and their means."""
    generator = np.random.default_rng(0)
    angle = 2 * np.pi * np.arange(modes) / modes
    means = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return means[np.arange(n) % modes] + spread * generator.standard_normal((n, 2)), means


@cache
def cloud() -> distot.Solution:
    generator = np.random.default_rng(2)
    y = 40 + 7 * generator.standard_normal((300, 5)) * np.linspace(2, 0.5, 5)
    mass = generator.gamma(2.0, size=300)
    y[200], mass[7] = y[3], 0.0
    with pytest.warns(distot.DistotWarning):
        return quiet(y, distot.Gaussian(np.full(5, -3.0), 4.0), mass, until_chi2=0.05)


class TestMaps:
    def test_potential_is_the_maximum(self) -> None:
        solution = cloud()
        x = distot.Gaussian(np.full(5, -3.0), 4.0)
        noise = np.random.default_rng(1).standard_normal((700, 5)) * 2 - 3
        y = solution._latents(np.arange(300))
        with np.errstate(invalid="ignore"):
            dense = (noise @ y.T + solution.heights).max(axis=1)
        assert np.allclose(solution.potential(noise), dense, rtol=1e-9)
        assert x.dim == 5
        assert solution.potential(np.empty((0, 5))).shape == (0,)

    def test_soft_potential_is_the_log_sum_exp(self) -> None:
        y = np.random.default_rng(3).standard_normal((60, 3)) * 2 + 5
        solution = quiet(y, distot.Cube(3, 1.0, 4.0), epsilon=0.3, until_chi2=None, max_samples=60 * 200)
        x = np.random.default_rng(1).random((50, 3)) * 3 + 1
        dense = 0.3 * np.log(np.exp((x @ y.T + solution.heights) / 0.3).sum(axis=1))
        assert np.allclose(solution.potential(x), dense, rtol=1e-5)

    def test_weights_say_the_same(self) -> None:
        solution = cloud()
        noise = np.random.default_rng(1).standard_normal((300, 5)) * 2 - 3
        y = solution._latents(np.arange(300))
        nearest = (((noise[:, None] - y) ** 2).sum(axis=2) - solution.weights).argmin(axis=1)
        assert np.array_equal(nearest, solution.assign(noise))

    def test_export_and_import(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        solution = cloud()
        run, latents = tmp_path / "run.zarr", tmp_path / "run.zarr/latents.zarr"
        solution.save(run)
        for convention, expected in (("heights", solution.heights), ("pot", solution.weights)):
            with pytest.raises(SystemExit, match="0"):
                command(["export", str(run), str(tmp_path / f"{convention}.npy"), "--as", convention])
            assert np.array_equal(np.load(tmp_path / f"{convention}.npy"), expected)
        back = distot.weights_to_heights(np.load(tmp_path / "pot.npy"), open_latents(latents)[:])
        finite = np.isfinite(back)
        assert np.allclose(back[finite] - back[0], solution.heights[finite] - solution.heights[0])
        back[~finite] = 0.0
        np.save(tmp_path / "init.npy", back)
        with pytest.raises(SystemExit, match="3"):
            command(
                [
                    "solve",
                    str(latents),
                    str(tmp_path / "b.zarr"),
                    "--max-samples",
                    "300",
                    "--init",
                    str(tmp_path / "init.npy"),
                ]
            )
        with pytest.raises(SystemExit, match="1"):
            command(["solve", str(latents), str(tmp_path / "c.zarr"), "--init", str(tmp_path / "none.npy")])
        assert "cannot be read as an npy file" in capsys.readouterr().err


class TestCells:
    def test_by_hand(self) -> None:
        """Two atoms divide a square: masses, centres, costs and margins of its halves are known."""
        y = np.array([[0.0, 0.5], [2.0, 0.5]])
        solution = quiet(y, "cube", until_chi2=None, max_samples=40_000)
        cells = solution.cells(400_000)
        edge = -np.diff(solution.heights)[0] / 2
        assert np.allclose(cells.mass, [edge, 1 - edge], atol=4 * cells.mass_error.max())
        assert np.allclose(cells.centre, [[edge / 2, 0.5], [(1 + edge) / 2, 0.5]], atol=0.003)
        first, second = edge**2 / 3 + 1 / 12, ((2 - edge) ** 3 - 1) / 3 / (1 - edge) + 1 / 12
        assert np.allclose(cells.cost, [first, second], rtol=0.01)
        assert np.allclose(cells.margin, [edge, 1 - edge], rtol=0.01)
        assert cells.samples >= 400_000

    @pytest.mark.parametrize("source", ["gaussian", "samples"])
    def test_errors_are_honest(self, source: str) -> None:
        """Means over independent statistics agree with a long one as their errors say; orbits count as one each."""
        y = np.random.default_rng(0).standard_normal((40, 6)) ** 3
        rows = np.random.default_rng(1).standard_normal((3000, 6))
        solution = quiet(y, source if source == "gaussian" else rows, until_chi2=None, max_samples=8000)
        held = solution.held

        def at(step: int, samples: int) -> distot.Cells:
            sums = measure(held.problem, held.assigner, held.progress.state.average, samples, step)
            return by_latent(held.problem, sums, None)

        exact = at(0, 400_000).mass
        scores = np.array(
            [(cells.mass - exact) / cells.mass_error for cells in (at(step, 4000) for step in range(1, 31))]
        )
        assert 0.85 < np.sqrt((scores**2).mean()) < 1.15
        assert abs(scores.mean()) < 0.15

    def test_merged_and_empty_latents(self) -> None:
        solution = cloud()
        cells = solution.cells()
        assert cells.mass.sum() == pytest.approx(1)
        assert cells.wanted.sum() == pytest.approx(1)
        assert cells.mass[7] == cells.wanted[7] == 0
        assert np.isnan(cells.centre[7]).all()
        assert cells.mass[200] / cells.mass[3] == pytest.approx(cells.wanted[200] / cells.wanted[3])
        assert np.array_equal(cells.centre[200], cells.centre[3])
        seen = np.isfinite(cells.cost)
        total = cells.mass[seen] @ cells.cost[seen]
        assert total == pytest.approx(solution.certificate.map_cost, rel=0.02)
        assert np.array_equal(solution.assign(cells.centre[seen]), np.where(seen, np.arange(300), -1)[seen]) or (
            (solution.assign(cells.centre[seen]) == np.flatnonzero(seen)).mean() > 0.97  # a copy has its leader's index
        )

    def test_too_few_samples(self) -> None:
        with pytest.raises(InputError, match="at least 2 samples, not 1"):
            cloud().cells(1)


def extended(solution: distot.Solution, noise: Array, k: int, angle: float) -> tuple[Array, NDArray[np.bool_]]:
    """Formula (15) written out, and which noise has no neighbour to mix with."""
    y, h, centre = solution._latents(np.arange(solution.facts.shape[0])), solution.heights, solution.cells().centre
    out, alone = np.empty(noise.shape), np.zeros(len(noise), dtype=bool)
    normal = np.concatenate([y, -np.ones((len(y), 1))], axis=1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    for row, x in enumerate(noise):
        best = np.argsort(-(y @ x + h), kind="stable")[:k]
        near = np.arccos(np.clip(normal[best] @ normal[best[0]], -1, 1)) <= angle
        near &= np.isfinite(centre[best, 0])
        weight = near / np.linalg.norm(x - centre[best], axis=1)
        weight = np.where(near, weight, 0)
        out[row], alone[row] = weight @ y[best] / weight.sum(), near.sum() < 2
    return out, alone


class TestGeneration:
    def test_formula(self) -> None:
        y = np.random.default_rng(0).standard_normal((200, 4)) * [3, 1, 1, 0.3] + [5, 0, 0, 0]
        solution = quiet(y, until_chi2=0.1)
        made = solution.generate(300, k=6, threshold=0.25)
        expected, alone = extended(solution, made.noise, 6, 0.25)
        assert not alone.any()
        assert np.abs(made.samples - expected).max() < 1e-4
        assert np.array_equal(made.index, solution.assign(made.noise))
        assert len(made.singular) > 30
        assert extended(solution, made.singular[:300], 6, 0.25)[1].all()

    def test_scale_and_shift_do_not_matter(self) -> None:
        """The threshold of the quantile is found in centred and scaled coordinates."""
        y = np.random.default_rng(0).standard_normal((100, 3)) * [3, 1, 1]
        first = quiet(y, until_chi2=None, max_samples=5_000).generate(500)
        second = quiet(64.0 * y + 1024, until_chi2=None, max_samples=5_000).generate(500)
        assert first.threshold == pytest.approx(second.threshold, rel=1e-4)
        assert (first.index == second.index).mean() > 0.99
        kept = first.index == second.index
        apart = np.abs(64 * first.samples + 1024 - second.samples).max(axis=1)[kept]
        assert np.quantile(apart, 0.98) < 0.05

    @pytest.mark.parametrize("modes", [8, 25])
    def test_every_mode_and_nothing_between(self, modes: int) -> None:
        """Shares of modes are right, and no sample lies between them, where plain interpolation puts many there."""
        n = 16 * modes
        y, means = ring(n, modes, radius=modes / 4)
        solution = quiet(y, until_chi2=0.005, certificate_samples=1000)
        count = 40_000

        def shares(made: distot.Generated) -> tuple[Array, float]:
            away = np.linalg.norm(made.samples[:, None] - means, axis=2)
            return np.bincount(away.argmin(axis=1), minlength=modes) / count, float((away.min(axis=1) > 0.3).mean())

        share, between = shares(solution.generate(count, balance=True))
        noise = np.sqrt(modes / count)
        assert np.abs(share * modes - 1).max() < 0.05 + 4 * noise
        assert between == 0.0
        refused, between = shares(solution.generate(count))
        assert between == 0.0
        assert (refused > 0.5 / modes).all()
        assert shares(solution.generate(count, quantile=1.0))[1] > 0.02

    def test_balance_brings_shares_closer(self) -> None:
        """Heights that are wrong on purpose: shares come closer to the wanted masses than the cells have them."""
        y = np.random.default_rng(0).standard_normal((50, 3))
        solution = quiet(y, until_chi2=None, max_samples=500)
        wrong = solution.certificate.chi2
        assert wrong > 0.02
        made = solution.generate(100_000, balance=True)
        share = np.bincount(made.index, minlength=50) / 1e5
        assert ((share * 50 - 1) ** 2).mean() < 0.25 * wrong
        assert made.drawn < 250_000

    def test_the_seed_decides(self) -> None:
        solution = cloud()
        first, again, other = solution.generate(6000), solution.generate(5000), solution.generate(100, seed=5)
        assert np.array_equal(first.samples[:5000], again.samples)
        assert not np.isin(other.noise[:, 0], first.noise[:, 0]).any()
        # noise of a stream of its own has the law of the source
        assert stats.kstest((first.noise[:, 0] + 3) / 2, "norm").pvalue > 1e-3 or len(first.singular) > 100

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"k": 1}, "k must be at least 2"),
            ({"k": 500}, "k is 500, and there are only 298 different latents"),
            ({"threshold": 4.0}, "between 0 and pi, not 4.0"),
            ({"threshold": float("nan")}, "between 0 and pi, not nan"),
            ({"quantile": 0.0}, "above 0 and at most 1, not 0.0"),
            ({"threshold": 0.0}, "raise the threshold"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            cloud().generate(10, **options)

    def test_none_at_all(self) -> None:
        with pytest.raises(InputError, match="at least 1, not 0"):
            cloud().generate(0)


class TestFiles:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        path = tmp_path / "run.zarr"
        cloud().save(path)
        return path

    def test_generate(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "new.zarr"
        with pytest.raises(SystemExit, match="0"):
            command(["generate", str(run), str(out), "-n", "9000", "--json"])
        said = json.loads(capsys.readouterr().out)
        found = RowFile(out)
        made = distot.load(run).generate(9000)
        assert found.complete
        assert np.array_equal(found.read("z"), made.samples)
        assert np.array_equal(found.read("index"), made.index)
        assert said["singular"] == len(made.singular)
        assert said["drawn"] == made.drawn
        assert open_latents(out, "z").shape == (9000, 5)
        saved = Run(run).cells.load()
        assert saved is not None, "statistics of cells are kept for the next time"
        assert np.array_equal(distot.load(run).cells().mass, cloud().cells().mass)

    def test_goes_on_behind_what_is_there(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cut off after some shards: what was written can be read, and the same command writes the rest."""
        whole, cut, n = tmp_path / "whole.zarr", tmp_path / "cut.zarr", 150_000
        distot.generate_file(run, whole, n)
        flush, left = RowWriter._flush, 2

        def full(self: RowWriter, state: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise StoreError("the disk is full")
            flush(self, state)

        monkeypatch.setattr(RowWriter, "_flush", full)
        with pytest.raises(StoreError, match="full"):
            distot.generate_file(run, cut, n)
        monkeypatch.undo()
        written = RowFile(cut).written
        assert 0 < written < n
        assert np.array_equal(RowFile(cut).read("z"), RowFile(whole).read("z", slice(0, written)))
        before = (cut / "z/c/0/0").stat().st_mtime_ns
        made = distot.generate_file(run, cut, n)
        assert (cut / "z/c/0/0").stat().st_mtime_ns == before
        assert np.array_equal(RowFile(cut).read("z"), RowFile(whole).read("z"))
        assert made == distot.generate_file(run, cut, n), "all there: nothing to do"
        with pytest.raises(InputError, match="was begun with"):
            distot.generate_file(run, cut, n, seed=9)

    def test_assign_to_a_store(self, run: Path, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).standard_normal((500, 5)) * 2 - 3
        np.save(tmp_path / "noise.npy", noise)
        out = tmp_path / "pairs.zarr"
        assert distot.assign_file(run, tmp_path / "noise.npy", out) == 500
        assert np.array_equal(RowFile(out).read("index"), cloud().assign(noise))
