"""Latents that lie close together: which are one atom, which are a group, and what a solve makes of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import distot
from distot import optim
from distot.errors import Diverged, InputError
from distot.problem import build_problem

NOISE = np.random.default_rng(0)


def cloud(n: int, d: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def with_twins(n: int, d: int, pairs: int, distance: float, copies: int = 1) -> NDArray[np.float32]:
    """n latents, of which the last ones lie at about this distance from the first ones."""
    y, noise = cloud(n, d), np.random.default_rng(1).standard_normal((copies * pairs, d))
    y[n - copies * pairs :] = np.tile(y[:pairs], (copies, 1)) + distance / d**0.5 * noise
    return y


def target(y: NDArray[Any], **options: Any) -> Any:
    return build_problem(y, device="cpu", **options).target


@pytest.mark.parametrize("d", [2, 16, 384])
class TestFound:
    def test_what_float32_does_not_tell_apart_is_one_atom(self, d: int) -> None:
        y = with_twins(1000, d, 200, 4e-6)
        mass = np.random.default_rng(2).random(1000) + 0.5
        found = target(y, mass=mass)
        assert found.n == 800
        assert np.array_equal(found.atom_of[800:], found.atom_of[:200])
        assert found.mass[found.atom_of[:200]] == pytest.approx((mass[:200] + mass[800:]) / mass.sum())
        assert any("200 latents lie closer to another one than float32 scores tell" in note for note in found.notes)

    def test_what_it_tells_apart_is_a_group(self, d: int) -> None:
        found = target(with_twins(1000, d, 200, 1e-3))
        assert found.n >= 990
        assert found.twins is not None
        assert found.twins.most <= 4  # in the plane a third one may be near
        group = found.twins.group[found.atom_of]
        assert (group[800:] == group[:200]).sum() >= 160  # some lie in a crowd

    def test_others_are_left_alone(self, d: int) -> None:
        found = target(cloud(1000, d))
        assert found.n == 1000
        assert found.twins is None or len(found.twins.width) > 980
        assert not found.notes


@pytest.mark.parametrize(("d", "distance"), [(8, 1e-3), (384, 1e-2)])
def test_groups_have_any_number_of_atoms_and_are_whole(d: int, distance: float) -> None:
    found = target(with_twins(1500, d, 200, distance, copies=4))
    assert found.twins is not None
    assert found.twins.most == 5
    assert (torch.bincount(found.twins.group) == 5).sum() == 200


def test_a_far_latent_does_not_make_the_others_one() -> None:
    y = cloud(500, 4).astype(np.float64)
    y[0] = 1e9
    assert target(y).n == 500


def test_latents_along_a_curve_do_not_run_together() -> None:
    """Neighbours may be joined, but a chain of them is no atom."""
    t = np.linspace(0, 1, 20_000)
    found = target(np.stack([np.cos(5 * t), np.sin(3 * t), t**2], axis=1))
    y = found.atoms.whole[torch.from_numpy(found.atom_of)]
    every = torch.from_numpy(np.stack([np.cos(5 * t), np.sin(3 * t), t**2], axis=1))
    scale = float((every - every.median(0).values).square().mean().sqrt())
    assert ((y * scale + every.median(0).values) - every).norm(dim=1).max() < 0.01


@pytest.mark.filterwarnings("ignore::distot.DistotWarning")
def test_exact_masses_are_those_of_all_latents() -> None:
    y = with_twins(60, 2, 20, 1e-5)
    assert distot.solve(y, exact=True, progress=False).certificate.atoms == 60
    assert distot.solve(y[:, :1], progress=False).certificate.atoms == 60


def test_exact_masses_that_no_search_sees_are_said_to_be() -> None:
    """On a line no two are joined; float32 scores of these leave some without samples."""
    y = cloud(600, 1).astype(np.float64)
    y[300:] = y[:300] + 1e-6
    with pytest.warns(distot.DistotWarning, match=r"all masses are exact, but searches.*see a chi2 of 0\.\d"):
        assert distot.solve(y, progress=False).reason == "exact"
    distot.solve(y[:300], progress=False)  # without a word


@cache
def without_twins(d: int) -> distot.Solution:
    return distot.solve(cloud(1000, d), max_samples=200_000, progress=False)


class TestSolved:
    @pytest.mark.filterwarnings("ignore::distot.DistotWarning")
    @pytest.mark.parametrize(("d", "distance"), [(2, 1e-7), (2, 1e-4), (2, 1e-3), (16, 1e-6), (16, 1e-4), (16, 1e-2)])
    def test_as_soon_as_a_cloud_without_twins(self, d: int, distance: float) -> None:
        plain, twins = (
            without_twins(d),
            distot.solve(with_twins(1000, d, 250, distance), max_samples=200_000, progress=False),
        )
        assert twins.reason == plain.reason == "until_chi2"
        assert twins.samples < 1.5 * plain.samples
        assert twins.certify(200_000).chi2 < 0.05

    @pytest.mark.filterwarnings("ignore::distot.DistotWarning")
    @pytest.mark.parametrize("assigner", ["native", "dense"])
    @pytest.mark.parametrize("factor", [1 + 1e-8, 1 + 1e-5, 1 + 1e-3])
    def test_a_data_set_that_is_there_twice(self, assigner: str, factor: float) -> None:
        y = np.random.default_rng(0).standard_normal((200, 16))
        y[100:] = y[:100] * factor
        solution = distot.solve(y, max_samples=100_000, assigner=assigner, progress=False)
        assert solution.reason == "until_chi2"
        assert np.isfinite(solution.heights).all()

    def test_pairs_are_drawn_among_joined_latents_by_mass(self) -> None:
        y = with_twins(300, 4, 100, 1e-7)
        mass = np.where(np.arange(300) < 200, 1.0, 3.0)
        with pytest.warns(distot.DistotWarning):
            solution = distot.solve(y, mass=mass, max_samples=60_000, progress=False)
        index = torch.cat([batch[-1] for batch in distot.Pairs(solution, samples=40_000)]).numpy()
        assert (index >= 200).sum() / (index < 100).sum() == pytest.approx(3, rel=0.1)
        assert solution.assign(y).max() < 200  # it gives the first one

    def test_warm_start_keeps_twins_together(self) -> None:
        """Heights that say nothing of twins leave none of them out."""
        y = with_twins(600, 8, 150, 1e-3)
        first = distot.solve(y, until_chi2=0.2, progress=False)
        wrong = first.heights.copy()
        wrong[450:] -= 5.0
        again = distot.solve(y, init=wrong, until_chi2=0.1, max_samples=120_000, progress=False)
        assert again.reason == "until_chi2"


class TestRefused:
    def test_heights_that_are_not_finite_end_a_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was found before stays: here a step of NaN, in the middle of a run."""
        update = optim.update

        def broken(state: optim.State, *rest: Any, **more: Any) -> optim.State:
            new = update(state, *rest, **more)
            return (
                optim.lifted(new, new.heights * float("nan"), 0)
                if state.step == 5 and len(state.heights) == 90
                else new
            )

        monkeypatch.setattr(optim, "update", broken)
        with pytest.raises(Diverged, match="not finite any more after step 6"):
            distot.solve(cloud(90, 3), run=tmp_path / "r.zarr", until_chi2=1e-9, max_samples=10**6, progress=False)
        assert np.isfinite(distot.load(tmp_path / "r.zarr").heights).all()

    @pytest.mark.parametrize("source", [np.ones((5, 3)), lambda generator, n: np.full((n, 3), 1e6)])
    def test_a_source_of_one_point(self, source: Any) -> None:
        with pytest.raises(InputError, match="the source is a single point"):
            distot.solve(cloud(50, 3), source, progress=False)

    @pytest.mark.filterwarnings("ignore::distot.DistotWarning")
    def test_a_mass_that_leaves_little_to_the_others(self) -> None:
        weights = np.ones(50)
        weights[7] = 1e300
        with pytest.raises(InputError, match="have less than 1e-18 of all mass"):
            distot.solve(cloud(50, 3), mass=weights, progress=False)
        weights[7] = 1e10
        assert np.isfinite(distot.solve(cloud(50, 3), mass=weights, max_samples=20_000, progress=False).heights).all()

    def test_a_goal_below_what_a_few_samples_allow(self) -> None:
        y = cloud(300, 3)
        with pytest.raises(InputError, match=r"the source is 50 samples for 300 latents.*chi2 stays above 5"):
            distot.solve(y, y[:50] + 1, progress=False)
        with pytest.warns(distot.DistotWarning, match="chi2 stays above 5"):
            found = distot.solve(y, y[:50] + 1, max_samples=20_000, progress=False)
        assert found.certificate.chi2 > 4.9
        with pytest.raises(InputError, match=r"the source is 7 samples"):
            distot.solve(y, lambda generator, n: y[generator.integers(7, size=n)], progress=False)
        with pytest.raises(InputError, match=r"450 samples.*chi2 stays above 0.111"):
            distot.solve(y, cloud(450, 3, seed=1), progress=False)
        with pytest.raises(InputError, match=r"2 samples for 60 latents.*chi2 stays above 29"):
            distot.solve(cloud(60, 1), "sphere", progress=False)  # two points, on a line
        assert distot.solve(y, cloud(3000, 3, seed=1), progress=False).reason == "until_chi2"
