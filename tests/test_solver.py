"""The loop as a whole: budgets, goals, determinism, events; and that all of it beats chance on every kind of data."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import numpy as np
import ot
import pytest
import torch
from numpy.typing import NDArray
from processes import Clock
from scipy.special import logsumexp, xlogy

import distot
from distot import assign, descent, entropic, graph, optim, solver, start, tree
from distot.certify import cell_masses
from distot.errors import InputError, StoreError
from distot.grid import Axis, Grid, Split
from distot.masses import Estimate
from distot.problem import Problem, build_problem
from distot.schedule import Check, StopRule, batch, first_batch
from distot.source import Stream
from distot.store import copy_latents
from distot.watch import Stop, Watch, signals

RNG = np.random.default_rng(0)
CLOUD = RNG.standard_normal((300, 5)) * [3, 2, 1, 0.5, 0.1]


def quiet(latents: Any, *args: Any, **options: Any) -> distot.Solution:
    return distot.solve(latents, *args, **({"progress": False} | options))


def error(problem: Problem, search: assign.Assigner, heights: torch.Tensor) -> float:
    """chi2 of heights in the frame."""
    masses = cell_masses(problem, search, heights, None, 100_000, Stream.CHECK, 0, lambda: None)
    return masses.chi2(problem.target.mass).value


class TestGoalAndBudgets:
    def test_goal(self) -> None:
        solution = quiet(CLOUD, until_chi2=0.1)
        assert solution.reason == "until_chi2"
        assert solution.certify(400_000).chi2 < 0.1
        assert solution.history[-1].upper <= 0.1
        assert solution.history[-1].samples <= solution.samples

    def test_samples_are_a_budget(self) -> None:
        solution = quiet(CLOUD, until_chi2=None, max_samples=20_000)
        assert solution.reason == "max_samples"
        assert 20_000 - batch(300, 1.0, 0) - solution.history[-1].looked < solution.samples <= 20_000

    @pytest.mark.parametrize("budget", [1, 50, 700, 3000])
    def test_small_budgets_still_give_an_answer(self, budget: int) -> None:
        solution = quiet(CLOUD, until_chi2=None, max_samples=budget)
        assert solution.samples <= budget
        assert np.isfinite(solution.heights).all()
        assert solution.certificate.chi2 < 3

    def test_seconds_are_a_budget_with_the_certificate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ticks: list[float] = []
        clock = Clock()
        for module in ("distot.watch", "distot.solver"):
            monkeypatch.setattr(f"{module}.time", clock)
        solution = quiet(CLOUD, until_chi2=None, max_seconds=1.0, on_event=lambda e: ticks.append(e["seconds"]))
        assert solution.reason == "max_seconds"
        assert ticks[-1] < 1.5
        assert solution.certificate.samples >= 4096

    def test_seconds_that_are_over_in_the_start(self) -> None:
        """No rate is known then, and the certificate is small."""
        solution = quiet(np.random.default_rng(0).standard_normal((3000, 8)), max_seconds=1e-3)
        assert solution.reason == "max_seconds"
        assert solution.certificate.samples <= 512

    def test_a_signal_in_the_certificate_is_heard(self, tmp_path: Any) -> None:
        def stop(event: dict[str, Any]) -> None:
            if event["event"] == "certify":
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(distot.Interrupted, match="stopped by SIGTERM; everything is saved") as stopped:
            quiet(CLOUD, until_chi2=0.3, run=tmp_path / "run.zarr", on_event=stop)
        assert stopped.value.solution.kept is None
        found = distot.resume(tmp_path / "run.zarr", progress=False)
        assert found.reason == "until_chi2"
        assert found.certificate == quiet(CLOUD, until_chi2=0.3).certificate

    def test_goal_holds_in_repeated_runs(self) -> None:
        """The stop rule is honest: at least 18 of 20 runs are below their goal in truth."""
        y = RNG.standard_normal((100, 4))
        runs = [quiet(y, until_chi2=0.05, seed=seed, certificate_samples=100_000) for seed in range(20)]
        assert all(run.reason == "until_chi2" for run in runs)
        assert sum(run.certificate.chi2 < 0.05 for run in runs) >= 18

    @pytest.mark.parametrize("n", [20, 300])
    @pytest.mark.parametrize("goal", [0.05, 0.3])
    def test_ends_soon_after_the_goal_is_met(self, n: int, goal: float) -> None:
        """Looks cost something and need room below the goal, but not many times the samples of the limit."""
        y = RNG.standard_normal((n, 5))
        for seed in range(5):
            solution = quiet(y, until_chi2=goal, seed=seed)
            assert solution.samples < 3 * n + 8 * n / goal + 8 * np.sqrt(2 * n) / (goal / 8)
            assert sum(check.close for check in solution.history) <= 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"until_chi2": -1}, "until_chi2 must be positive, or None; it is -1"),
            ({"until_chi2": float("nan")}, "until_chi2 must be positive"),
            ({"max_samples": 0}, "max_samples must be positive"),
            ({"max_seconds": -3}, "max_seconds must be positive"),
            ({"until_chi2": None}, "nothing would ever stop this run"),
            ({"seed": -1}, "seed must be between 0"),
            ({"device": "tpu"}, "unknown device 'tpu'; choose auto, cpu or cuda"),
            ({"device": "mps"}, "device 'mps' is not supported"),
            ({"assigner": "nope"}, "unknown assigner 'nope'"),
            ({"certificate_samples": 1}, "at least 2"),
            ({"source": RNG.standard_normal((10, 4))}, "dimension 4 and the latents have dimension 5"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            quiet(CLOUD, **options)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self) -> None:
        with pytest.raises(InputError, match="finds no CUDA GPU; use cpu"):
            quiet(CLOUD, device="cuda")

    def test_no_such_latents(self, tmp_path: Any) -> None:
        with pytest.raises(StoreError, match="does not exist; make one with: distot ingest"):
            quiet(str(tmp_path / "none.zarr"))


class TestDeterminism:
    def test_same_seed_same_bits(self) -> None:
        one, same = (quiet(CLOUD, until_chi2=None, max_samples=15_000, seed=3) for _ in range(2))
        assert np.array_equal(one.heights, same.heights)
        assert one.history == same.history
        assert one.certificate == same.certificate

    def test_other_seed_other_bits(self) -> None:
        one, other = (quiet(CLOUD, until_chi2=None, max_samples=15_000, seed=s) for s in (3, 4))
        assert not np.array_equal(one.heights, other.heights)
        assert np.corrcoef(one.heights, other.heights)[0, 1] > 0.99

    def test_assigners_agree_to_rounding(self) -> None:
        dense, faiss = (quiet(CLOUD, until_chi2=None, max_samples=15_000, assigner=a) for a in ("dense", "faiss"))
        assert np.allclose(dense.heights, faiss.heights, atol=1e-3)

    def test_samples_from_a_store(self, tmp_path: Any) -> None:
        x = RNG.laplace(size=(5000, 5))
        copy_latents(x, None, tmp_path / "x.zarr", "a test")
        stored, given = (quiet(CLOUD, s, until_chi2=None, max_samples=9000) for s in (str(tmp_path / "x.zarr"), x))
        assert np.array_equal(stored.heights, given.heights)

    def test_callable_source(self) -> None:
        def source(generator: np.random.Generator, n: int) -> NDArray[np.float64]:
            return generator.laplace(size=(n, 5))

        solution = quiet(CLOUD, source, until_chi2=0.2)
        x = np.random.default_rng(1).laplace(size=(30_000, 5))
        counts = np.bincount(solution.assign(x), minlength=300)
        assert ((counts / 100 - 1) ** 2).mean() < 0.2 + 0.01 + 0.05


def clusters(n: int) -> NDArray[np.float64]:
    centres, sizes = 3 * RNG.standard_normal((12, 20)), np.exp(RNG.normal(-1, 0.7, 12))
    label = RNG.choice(12, n, p=RNG.dirichlet(np.full(12, 0.5)))
    return centres[label] + sizes[label, None] * RNG.standard_normal((n, 20))


def far_atom(n: int, distance: float) -> NDArray[np.float64]:
    return np.concatenate([RNG.standard_normal((n - 1, 6)), np.full((1, 6), distance)])


CLOUDS = {
    "normal": RNG.standard_normal((1000, 10)),
    "heavy tails": RNG.standard_t(2.5, (1000, 10)),
    "clusters": clusters(1000),
    "far atom": far_atom(1000, 300.0),
    "very far atom": far_atom(500, 1e6),
    "plane in space": RNG.standard_normal((1000, 2)) @ RNG.standard_normal((2, 30)),
    "whole numbers": RNG.integers(0, 17, (1000, 12)).astype(np.float64),
    "more dimensions than latents": RNG.standard_normal((200, 300)),
}


class TestAnyData:
    @pytest.mark.parametrize("kind", CLOUDS)
    @pytest.mark.parametrize("source", ["gaussian", "cube", "ball", "sphere"])
    def test_ends_far_below_where_it_began(self, kind: str, source: str) -> None:
        """At 50 samples per atom chi2 is small for every kind of data and source, with the defaults."""
        y = CLOUDS[kind]
        solution = quiet(y, source, until_chi2=None, max_samples=50 * len(y))
        assert solution.certificate.chi2 < (0.25 if kind == "plane in space" else 0.1)

    def test_very_uneven_latents_in_the_plane(self) -> None:
        """Cubed normals: margins of six orders of magnitude."""
        latents = np.random.default_rng(0).standard_normal((300, 2)) ** 3
        found = quiet(latents, until_chi2=None, max_samples=300 * 300, certificate_samples=100_000)
        assert found.certificate.chi2 < 0.03

    @pytest.mark.parametrize("dim", [2, 16])
    def test_light_latents_are_not_left_too_heavy(self, dim: int) -> None:
        """Masses over four orders of magnitude are matched about as well as any that many samples could tell."""
        generator = np.random.default_rng(dim)
        latents, mass = generator.standard_normal((600, dim)), generator.gamma(1, size=600) + 1e-4
        mass /= mass.sum()
        found = quiet(latents, mass=mass, until_chi2=None, max_samples=30_000, certificate_samples=500_000)
        assert found.efficiency > 0.5

    def test_uneven_masses(self) -> None:
        mass = np.arange(1, 501) ** -1.0
        y = RNG.standard_normal((500, 8))
        with pytest.warns(distot.DistotWarning, match="masses sum to"):
            solution = quiet(y, mass=mass, until_chi2=None, max_samples=100_000)
        assert solution.certificate.chi2 < 0.05
        counts = np.bincount(solution.assign(np.random.default_rng(2).standard_normal((200_000, 8))), minlength=500)
        heavy = mass / mass.sum() > 0.01
        assert np.allclose(counts[heavy] / 200_000, mass[heavy] / mass.sum(), rtol=0.1)


class TestEntropic:
    @pytest.mark.parametrize("epsilon", [0.1, 1.0])
    def test_agrees_with_sinkhorn(self, epsilon: float) -> None:
        """Heights, transport cost and dual value of POT's Sinkhorn between an array source and weighted latents."""
        rng = np.random.default_rng(1)
        x, y, nu = rng.standard_normal((400, 3)), rng.standard_normal((30, 3)) * [1, 2, 0.5] + 1, rng.random(30) + 0.2
        nu /= nu.sum()
        cost = 0.5 * ((x[:, None] - y) ** 2).sum(2)
        plan, log = ot.bregman.sinkhorn_log(np.full(400, 1 / 400), nu, cost, epsilon, 100_000, 1e-11, log=True)
        h = epsilon * log["log_v"] - 0.5 * (y**2).sum(1)
        value = 2 * float((plan * cost).sum() + epsilon * xlogy(plan, plan * 400 / nu).sum())
        solution = quiet(y, x, nu, None, 40_000, epsilon=epsilon, top_k=30, certificate_samples=50_000)
        found = solution.certificate
        assert np.allclose(solution.heights, h - nu @ h, atol=0.1)
        assert abs(found.map_cost - 2 * (plan * cost).sum()) < 5 * found.map_cost_error
        assert abs(found.w2_squared_bound - value) < 5 * found.w2_squared_bound_error
        assert found.map_cost + found.mismatch + found.regularisation == pytest.approx(found.w2_squared_bound, rel=1e-6)
        assert found.truncation < 1e-6
        score = (x @ y.T + solution.heights) / epsilon
        share = np.exp(score - logsumexp(score, axis=1, keepdims=True)).mean(0)
        true = float(((share - nu) ** 2 / nu).sum())
        assert true < 0.002
        assert abs(found.chi2 - true) < 4 * found.chi2_error

    def test_goal_and_resume(self, tmp_path: Any) -> None:
        straight = quiet(CLOUD, until_chi2=0.02, epsilon=0.1)
        assert straight.reason == "until_chi2"
        assert straight.certify(200_000, 1).chi2 < 0.02
        first = quiet(CLOUD, until_chi2=None, max_samples=3000, epsilon=0.1, run=tmp_path / "run.zarr")
        assert first.certificate.epsilon == pytest.approx(0.1)
        again = distot.resume(tmp_path / "run.zarr", max_samples=6000, progress=False)
        whole = quiet(CLOUD, until_chi2=None, max_samples=6000, epsilon=0.1)
        assert np.allclose(again.heights, whole.heights, atol=0.2)
        assert distot.load(tmp_path / "run.zarr").certificate == again.certificate

    @pytest.mark.parametrize("epsilon", [1e-300, 1e-40, 1e300])
    def test_no_epsilon_that_scores_cannot_be_divided_by(self, epsilon: float, tmp_path: Any) -> None:
        with pytest.raises(InputError, match=r"epsilon must be between .* and .* for distances like these, it is"):
            quiet(CLOUD, until_chi2=None, max_samples=3000, epsilon=epsilon, run=tmp_path / "run.zarr")
        assert not (tmp_path / "run.zarr").exists()

    def test_says_what_few_winners_leave_out(self) -> None:
        with pytest.warns(
            distot.DistotWarning, match="lies beyond the 2 best latents of a sample; give a larger top_k"
        ):
            solution = quiet(CLOUD, until_chi2=None, max_samples=3000, epsilon=2.0, top_k=2)
        assert solution.certificate.truncation > 0.1

    def test_log_sum_exp_is_that_of_all_atoms(self) -> None:
        atoms, x = torch.randn(5000, 4), torch.randn(700, 4)
        heights = torch.randn(5000, dtype=torch.float64)
        expected = 0.3 * ((x.double() @ atoms.double().T + heights) / 0.3).logsumexp(1)
        assert torch.allclose(entropic._potential(atoms, x, heights, 0.3), expected, atol=1e-4)


class TestWarmStart:
    def test_goes_on_from_its_own_heights(self, tmp_path: Any) -> None:
        """A little more work on a good answer keeps it good; from scratch it would not be."""
        n = len(CLOUD)
        first = quiet(
            CLOUD, until_chi2=None, max_samples=60 * n, run=tmp_path / "first.zarr", certificate_samples=10**5
        )
        for init in (first, first.heights, tmp_path / "first.zarr"):
            more = quiet(CLOUD, until_chi2=None, max_samples=8 * n, init=init, seed=3, certificate_samples=10**5)
            assert more.certificate.chi2 < 0.5 * quiet(CLOUD, until_chi2=None, max_samples=8 * n).certificate.chi2
            assert more.certificate.chi2 < 2 * first.certificate.chi2 + 0.02

    def test_heights_follow_latents_to_another_frame(self) -> None:
        """All latents moved and one added: the transferred heights are those of the moved problem."""
        first = quiet(CLOUD, until_chi2=None, max_samples=20_000, certificate_samples=10**5)
        moved = np.concatenate([CLOUD[::-1] * 1.001 + 0.002, [CLOUD[5] + 0.01]])
        problem = build_problem(moved, distot.Gaussian(np.full(5, 2.0)))
        heights = start.transfer(problem, first.problem, first.held.progress.state.average, "dense")
        search = assign.build("dense", problem.target.atoms[:])
        assert error(problem, search, heights) > 1  # the source moved: those heights are for another source
        problem = build_problem(moved)
        heights = start.transfer(problem, first.problem, first.held.progress.state.average, "dense")
        assert error(problem, assign.build("dense", problem.target.atoms[:]), heights) < 0.1

    def test_resume_of_a_start_that_was_cut_short(self, tmp_path: Any) -> None:
        first = quiet(CLOUD, until_chi2=None, max_samples=20_000)
        cut = quiet(CLOUD, init=first.heights, max_seconds=1e-9, run=tmp_path / "run.zarr")
        assert cut.reason == "max_seconds"
        distot.resume(tmp_path / "run.zarr", max_seconds=60, progress=False)
        straight = quiet(CLOUD, init=first.heights)
        assert np.array_equal(distot.load(tmp_path / "run.zarr").heights, straight.heights)

    @pytest.mark.parametrize(
        ("init", "message"),
        [
            (np.zeros(299), "one height for each of the 300 latents"),
            (np.full(300, np.nan), "300 heights that are NaN"),
            (np.full(300, -1e200), "heights of up to .*; searches in float32 cannot"),
        ],
    )
    def test_bad_heights(self, init: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            quiet(CLOUD, init=init)
        with pytest.raises(InputError, match="solved in dimension 5, the latents have 4"):
            quiet(CLOUD[:, :4], init=quiet(CLOUD, until_chi2=None, max_samples=500))


class TestParts:
    def test_events_tell_the_story(self) -> None:
        events: list[dict[str, Any]] = []
        quiet(CLOUD, until_chi2=0.2, on_event=events.append)
        names = [e["event"] for e in events]
        assert names[:3] == ["begin", "start", "step"]
        assert names[-3:] == ["stop", "certify", "certificate"]
        assert {"step", "check"} <= set(names)
        assert all(0 < e["wanted"] < float("inf") for e in events if e["event"] == "step")

    def test_resume_changes_the_limits(self, tmp_path: Any) -> None:
        run = tmp_path / "run.zarr"
        quiet(CLOUD, until_chi2=0.3, max_samples=4000, run=run)
        again = distot.resume(run, until_chi2=float("inf"), max_samples=9000, progress=False)
        assert again.options.until_chi2 is None
        assert again.reason == "max_samples"
        assert 4000 < again.samples <= 9000
        assert distot.load(run).options == again.options
        with pytest.raises(InputError, match="has spent its 9,000 samples; give a larger"):
            distot.resume(run, progress=False)
        lines = (run / "log.jsonl").read_text()
        assert "Infinity" not in lines
        assert "NaN" not in lines

    def test_gaussian_start_is_exact_for_quadratic_potentials(self) -> None:
        """For source N(0, I) and target moments (m, S) the start is -½ (y - m)^T S^-½ (y - m), math (12)."""
        problem = build_problem(CLOUD)
        y = problem.target.atoms[:].double().numpy()
        centred = y - y.mean(axis=0)
        values, vectors = np.linalg.eigh(centred.T @ centred / len(y))
        expected = -0.5 * (((centred @ vectors) ** 2) / np.sqrt(values)).sum(axis=1)
        found = start.normal(problem).heights(problem.target.atoms).numpy()
        assert np.allclose(found - found.mean(), expected - expected.mean(), atol=1e-5)

    def test_refinement_is_exact_for_quadratic_potentials(self) -> None:
        """Where the potential is that of the Gaussian problem, (12), the refined heights are those of (12) again."""
        problem = build_problem(RNG.standard_normal((400, 4)) * [1.0, 2.0, 0.5, 3.0] + 1.0)
        guess, atoms = start.normal(problem), problem.target.atoms[:]
        level = tree.grow(problem.target, problem.grid, 0, lambda: None).levels[-1]
        refined = start.prolong(guess.heights(level.atoms), guess.inverse(level.atoms), level, atoms, guess)
        assert torch.allclose(refined, guess.heights(atoms), atol=1e-9)

    def test_start_is_much_better_than_the_gaussian_one(self) -> None:
        """Two far clusters of unequal mass, which no Gaussian describes."""
        y = np.concatenate([RNG.standard_normal((900, 3)), 0.1 * RNG.standard_normal((100, 3)) + 8.0])
        problem = build_problem(y)
        search = assign.build("dense", problem.target.atoms[:])
        heights, work = start.multilevel(problem, "dense", lambda: None)
        assert work == pytest.approx(start.work(1000, problem.orbit.work), rel=0.1)
        assert error(problem, search, heights) < 0.3 * error(
            problem, search, start.normal(problem).heights(problem.target.atoms)
        )

    def test_lift_brings_a_starving_atom_back(self) -> None:
        problem = build_problem(RNG.standard_normal((50, 3)))
        search = assign.build("dense", problem.target.atoms[:])
        x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
        heights = torch.zeros(50, dtype=torch.float64)
        heights[7] = -1000.0
        state, hungry = optim.begin(heights, 0, Split((50,))), torch.tensor([7])
        for _ in range(30):
            near = search(x, state.heights, 2)
            state = descent.lift(problem, state, hungry, [(0, x, near.score[:, 0])], 10.0)
        heights = state.heights
        assert search(x, heights + 1e-3 * (torch.arange(50) == 7), 1).index.eq(7).sum() >= 1
        assert search(x, heights, 1).index.eq(7).sum() <= 1
        assert descent.lift(problem, state, torch.arange(25), [(0, x, near.score[:, 0])], 10.0).samples == 10 * 25 / 50
        assert descent.lift(problem, state, torch.arange(25), [(0, x, near.score[:, 0])], 2.0).samples == 2

    def test_starving_is_only_who_should_have_won(self) -> None:
        zero = torch.zeros(4, dtype=torch.float64)
        wins = torch.tensor([0.0, 0.5, 20.0, 0.0], dtype=torch.float64)
        state = optim.State(zero, zero, zero, wins)
        mass = torch.tensor([0.5, 0.45, 0.05, 1e-9], dtype=torch.float64)
        assert optim.starving(state, mass, Split((4,))).tolist() == [0, 1]

    def test_tree_covers_every_atom(self) -> None:
        rows = np.random.default_rng(0).standard_normal((2000, 6))
        mass = np.arange(1, 2001) / (2000 * 2001 / 2)
        problem = build_problem(rows, mass=mass)
        atoms, levels = problem.target.atoms[:], tree.grow(problem.target, problem.grid, 0, lambda: None).levels
        assert [len(level.mass) for level in levels] == pytest.approx(tree.widths(2000), rel=0.05)
        assert [len(level.node) for level in levels] == [len(levels[1].mass), 2000]
        mean = mass @ atoms.double().numpy()
        for level in levels:
            assert level.mass.sum() == pytest.approx(1)
            assert (level.mass > 0).all()
            assert np.allclose(level.mass @ level.atoms.double().numpy(), mean, atol=1e-6)

    def test_graph_solves_its_laplacian(self) -> None:
        pairs = torch.randint(0, 30, (2, 400), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        pairs = pairs[:, pairs[0] != pairs[1]]
        margin = torch.linspace(0.5, 2.0, 30, dtype=torch.float64)
        laplacian = np.zeros((30, 30))
        for i, j in pairs.T.tolist():
            edge = np.eye(30)[i] - np.eye(30)[j]
            laplacian += np.outer(edge, edge) / (float(margin[i] + margin[j]) * pairs.shape[1])
        gradient, anchor = torch.randn(30, generator=torch.Generator().manual_seed(1)), torch.full((30,), 0.01)
        found = graph.build(pairs, margin, Axis())
        expected = np.linalg.solve(laplacian + 0.01 * np.eye(30), gradient.numpy())
        assert np.allclose(found.solve(gradient, anchor), expected, rtol=0.02, atol=0.02 * np.abs(expected).max())
        shift = torch.arange(30.0)
        apart = [(i - j) / (0.5 * float(margin[i] + margin[j])) for i, j in pairs.T.tolist()]
        assert found.stretch(shift) == pytest.approx(np.sqrt(np.mean(np.square(apart))), rel=1e-5)

    def test_damping_follows_the_steps(self) -> None:
        """A batch that one atom wins whole would be followed too far: the next step is damped more, and less later."""
        n, split = 20, Split((20,))
        near = assign.Winners(torch.tensor([[3, 4]] * 200), torch.tensor([[1.0, 0.9]] * 200))
        even = torch.stack([torch.arange(200) % n, (torch.arange(200) + 1) % n], 1)
        mass = torch.full((n,), 1 / n, dtype=torch.float64)
        state = optim.begin(torch.zeros(n, dtype=torch.float64), 0, split)
        wild = optim.update(state, optim.count(near, split), 32, mass, 200, split, Grid())
        assert wild.damping > 1.2
        tally = optim.count(assign.Winners(even, near.score), split)
        calm = optim.update(state, tally, 200, mass, 200, split, Grid())
        assert calm.damping < 0.5
        assert torch.allclose(calm.heights, state.heights)

    def test_a_failed_step_brakes(self) -> None:
        """A batch whose chi2 jumps trebles the damping and lifts its floor; one that is as bad as the last does not."""
        n, split = 20, Split((20,))
        near = assign.Winners(torch.tensor([[3, 4]] * 200), torch.tensor([[1.0, 0.9]] * 200))
        mass, tally = torch.full((n,), 1 / n, dtype=torch.float64), optim.count(near, split)
        before = replace(optim.begin(torch.zeros(n, dtype=torch.float64), 0, split), damping=0.3, floor=0.1)
        found = float(n - 1)  # chi2 of this batch
        failed, usual = (
            optim.update(replace(before, error=error), tally, 200, mass, 200, split, Grid())
            for error in (found / 10, found)
        )
        assert failed.error == usual.error == pytest.approx(found)
        assert failed.damping == pytest.approx(3 * before.damping)
        assert failed.floor == pytest.approx(0.6)
        assert usual.floor < before.floor
        entropic = optim.update(replace(before, error=found / 10), tally, 200, mass, 200, split, Grid(), epsilon=1.0)
        assert entropic.floor < before.floor

    def test_tally_shares_a_sample_between_the_two_best(self) -> None:
        near = assign.Winners(torch.tensor([[0, 1], [2, 0]]), torch.tensor([[3.0, 2.0], [1.0, 1.0]]))
        hard, soft = optim.count(near, Split((3,))), optim.count(near, Split((3,)), 1.0)
        assert hard.sums.tolist() == [[1, 0, 1], [1, 0, 1], [1, 0, 2**-24]]  # hits, wins, margins that float32 can show
        p = 1 / (1 + np.exp(-1))
        assert soft.sums[0].tolist() == pytest.approx([p + 0.5, 1 - p, 0.5])

    def test_one_far_atom_does_not_set_the_mean_margin(self) -> None:
        sums = torch.tensor([1.0, 2.0, 3.0, 1e6, 0.0], dtype=torch.float64)
        counts = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        assert float(optim.mean_margin(sums, counts)) == pytest.approx((1 + 2 + 3 + 100 * 2) / 4)
        assert float(optim.mean_margin(sums[:3], counts[:3])) == pytest.approx(2)

    def test_margins_of_atoms_are_trusted_as_far_as_their_spread_is_no_noise(self) -> None:
        wins = torch.full((200,), 10.0, dtype=torch.float64)
        tau = torch.tensor(1.0, dtype=torch.float64)
        random = torch.Generator().manual_seed(0)
        noise = torch.exp(0.3 * torch.randn(200, generator=random, dtype=torch.float64))  # of means of ten
        alike = optim.scales(noise * wins, wins, tau)
        assert float(alike.log().std()) < 0.5 * float(noise.log().std()), "noise was taken for what it is"
        true = torch.logspace(-5, 1, 200, dtype=torch.float64)
        uneven = optim.scales(true * noise * wins, wins, tau)
        assert float((uneven / (true * noise)).log().abs().max()) < 0.5, "margins of other orders of magnitude stay"
        wins[0] = 0
        assert float(optim.scales(true * wins, wins, tau)[0]) == 1

    def test_an_average_that_is_worse_than_the_heights_begins_anew(self) -> None:
        problem = quiet(CLOUD, max_samples=3000, until_chi2=None).problem
        zero = torch.zeros(300, dtype=torch.float64)
        state = replace(optim.begin(zero + 1, 0, problem.target.split), average=zero, time=50.0, error=0.1)
        bad = Check(samples=1, looked=1, step=1, chi2=5.0, error=0.1, close=False, upper=9.0)
        anew = solver.renewed(problem, state, bad)
        assert torch.equal(anew.average, state.heights)
        assert anew.since == 50
        assert solver.renewed(problem, state, replace(bad, chi2=0.1)) is state
        assert solver.renewed(problem, state, replace(bad, error=2.5)) is state

    def test_a_signal_at_any_moment_of_a_poll_is_heard(self) -> None:
        """Also one that comes while others are asked whether they have one."""
        moments: list[str] = []

        def asked() -> None:
            if not moments:
                moments.append("asked")
                signal.raise_signal(signal.SIGINT)

        class Slow(Axis):
            def max(self, x: torch.Tensor) -> torch.Tensor:
                if moments == ["reset"]:
                    moments.append("told")
                    signal.raise_signal(signal.SIGINT)
                return super().max(x)

        def polled(watch: Watch) -> None:
            with signals(watch):
                watch.poll()
                watch.poll()

        for watch in (Watch(asked=asked), Watch(world=Slow())):
            with pytest.raises(Stop, match="interrupted"):
                polled(watch)
            moments[:] = ["reset"]

    def test_batches_grow_only_late(self) -> None:
        assert batch(10_000, 1.0, 0) == batch(10_000, 1.0, 64) == first_batch(10_000, 1.0) == 2000
        assert batch(10_000, 1.0, 25_600) == 40_000
        assert first_batch(10_000, 0.25) == 4000
        assert first_batch(3, 1.0) == 32

    def test_stop_rule_needs_a_close_look(self) -> None:
        rule = StopRule(1000, 0.05)
        glance = Check(30_000, 500, 10, 0.001, 0.001, False, 0.01)
        assert not rule.done((glance,))
        assert rule.done((glance, Check(31_000, 500, 10, 0.04, 0.001, True, 0.05)))
        assert not rule.done((glance, Check(31_000, 500, 10, 0.04, 0.001, True, 0.0501)))

    def test_later_close_looks_demand_more(self) -> None:
        rule = StopRule(1000, 0.05)
        found = Estimate(0.0333, 0.0015)
        history: tuple[Check, ...] = ()
        uppers = []
        for _ in range(3):
            check = Check(100_000, 500, 10, 0.01, 0.001, True, 0.06)
            history += (check,)
            uppers.append(rule.judge(found, 200_000, 500, 11, history).upper)
        assert uppers == sorted(set(uppers))


class TestSolution:
    def test_save_and_load(self, tmp_path: Any) -> None:
        solution = quiet(CLOUD, until_chi2=None, max_samples=5000)
        again = distot.load(solution.save(tmp_path / "kept.zarr"))
        assert np.array_equal(again.heights, solution.heights)
        assert again.certificate == solution.certificate
        assert (again.samples, again.reason, again.history) == (solution.samples, solution.reason, solution.history)
        x = RNG.standard_normal((100, 5))
        assert np.array_equal(again.map(x), solution.map(x))

    def test_assign_is_the_argmax_of_the_exported_heights(self) -> None:
        y = CLOUD + 50
        solution = quiet(y, distot.Gaussian(np.full(5, 20.0)), until_chi2=None, max_samples=5000)
        x = RNG.standard_normal((2000, 5)) + 20
        assert (solution.assign(x) == (x @ y.T + solution.heights).argmax(axis=1)).mean() > 0.999
        assert np.array_equal(solution.assign(torch.from_numpy(x)), solution.assign(x))
        assert solution.assign(np.empty((0, 5))).shape == (0,)

    @pytest.mark.parametrize(("x", "message"), [(np.zeros(5), r"\(B, 5\)"), (np.zeros((2, 4)), r"\(B, 5\)")])
    def test_assign_refuses_wrong_shapes(self, x: Any, message: str) -> None:
        solution = quiet(CLOUD, until_chi2=None, max_samples=700)
        with pytest.raises(InputError, match=message):
            solution.assign(x)
        with pytest.raises(InputError, match="NaN"):
            solution.assign(np.full((1, 5), np.nan))
