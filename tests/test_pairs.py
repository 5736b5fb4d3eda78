"""Pairs for training: the coupling they promise, in whatever way they are shared out, stopped, balanced or stored."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.data import DataLoader

import distot
from distot.cli import main as command
from distot.entropic import shares
from distot.errors import InputError, StoreError
from distot.orbit import Orbit, points
from distot.pairs.balance import balance, balanced_index, quotas
from distot.pairs.coupling import Coupling, Shelf
from distot.pairs.loader import Loader, Plan
from distot.pairs.noise import Noise
from distot.problem import build_problem
from distot.solution import Solution
from distot.source import Key, Product, Samples, Stream, as_source, from_spec
from distot.store import Latents

RNG = np.random.default_rng(5)
CLOUD = (RNG.standard_normal((400, 4)) * [2, 1, 1, 0.5]).astype(np.float16)
REPEATED = np.concatenate([CLOUD[:200], CLOUD[:100], CLOUD[:50]])  # 100 once, 50 twice, 50 three times
WEIGHTS = np.where(np.arange(350) % 9 == 4, 0.0, RNG.gamma(2.0, size=350))
LABELS = np.repeat([3, 7, 8], [60, 140, 200])


@cache
def solution() -> Solution:
    return distot.solve(CLOUD, until_chi2=0.05, progress=False, assigner="native")


@cache
def repeated() -> Solution:
    with pytest.warns(distot.DistotWarning):
        return distot.solve(REPEATED, distot.Cube(4, -3, 3), WEIGHTS, until_chi2=0.2, progress=False)


@cache
def classes() -> distot.Classes:
    return distot.solve_classes(CLOUD + LABELS[:, None], LABELS, until_chi2=0.3, progress=False)


def joined(batches: Iterable[Any]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def sorted_rows(parts: list[Tensor]) -> np.ndarray[Any, Any]:
    """Samples as a set: rows of noise and index in one order."""
    whole = torch.cat([parts[0].double(), parts[-1].double()[:, None]], dim=1).numpy()
    return whole[np.lexsort(whole.T)]


@pytest.mark.parametrize("orbits", [True, False])
def test_pairs_are_those_of_the_map(orbits: bool) -> None:
    noise, latent, index = joined(distot.Pairs(solution(), 64, samples=20_000, orbits=orbits))
    assert (noise.dtype, latent.dtype, index.dtype) == (torch.float32, torch.float32, torch.int64)
    assert noise.shape == latent.shape == (20_000, 4)
    assert (solution().assign(noise) != index.numpy()).sum() <= 2  # ties, to rounding
    assert np.array_equal(CLOUD[index].astype(np.float32), latent)
    assert stats.kstest(noise[:, 0], "norm").pvalue > 1e-3
    distance = stats.kstest(noise.square().sum(1).double(), stats.chi2(4).cdf).statistic
    assert stats.kstwo.sf(distance, 20_000 // (8 if orbits else 1)) > 1e-3  # points of an orbit have one norm


@pytest.mark.parametrize("orbits", [True, False])
def test_latents_come_as_often_as_the_certificate_says(orbits: bool) -> None:
    """chi2 of the indexes against the wanted masses, without bias, as a certificate would find it."""
    samples = 200_000
    index = joined(distot.Pairs(solution(), 1000, samples=samples, seed=3, orbits=orbits, latents=False))[1]
    count = np.bincount(index, minlength=400).astype(float)
    chi2 = float((count * (count - 1)).sum()) * 400 / (samples * (samples - 1)) - 1
    error = np.hypot(np.sqrt(2 * 400) / samples * (3 if orbits else 1), solution().certificate.chi2_error)
    assert abs(chi2 - solution().certificate.chi2) < 5 * error + 0.1 * solution().certificate.chi2


def test_shuffled_orbits_are_spread_over_batches() -> None:
    """Points of an orbit, +z and -z among them, hardly ever share a batch."""
    opposite = [
        float((b[0][:, None] + b[0]).norm(dim=2).lt(1e-5).sum()) for b in distot.Pairs(solution(), 64, samples=8192)
    ]
    assert np.mean(opposite) == pytest.approx(64 * 63 / 8191, rel=0.5)


@pytest.mark.parametrize("make", [solution, repeated])
def test_who_asks_makes_no_difference(make: Callable[[], Solution]) -> None:
    """The same samples from 0, 1 or 2 workers, and from 1 or 3 ranks."""
    options: dict[str, Any] = {"samples": 3001, "epoch": 2}
    expected = sorted_rows(joined(distot.Pairs(make(), 50, **options)))
    assert len(np.unique(expected, axis=0)) == 3001
    for workers in (1, 2):
        loader = DataLoader(distot.Pairs(make(), 50, **options), batch_size=None, num_workers=workers)
        assert len(loader) == 61
        assert np.array_equal(sorted_rows(joined(loader)), expected)
    with pytest.warns(distot.DistotWarning, match="some of 3 ranks have 21 batches and others 20"):
        ranks = [distot.Pairs(make(), 50, rank=r, world=3, drop_last=False, **options) for r in range(3)]
    assert [len(its) for its in ranks] == [21, 20, 20]
    assert np.array_equal(sorted_rows(joined(b for its in ranks for b in its)), expected)
    assert not np.array_equal(sorted_rows(joined(distot.Pairs(make(), 50, samples=3001, epoch=3))), expected)


def test_ranks_get_equally_many_full_batches() -> None:
    ranks = [list(distot.Pairs(solution(), 50, samples=3001, drop_last=True, rank=r, world=7)) for r in range(7)]
    assert [[len(b[0]) for b in its] for its in ranks] == [[50] * 8] * 7


def batches(loader: Any) -> list[Tensor]:
    return [its[0] for its in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_of_an_epoch(workers: int) -> None:
    def loader(**options: Any) -> Any:
        pairs = distot.Pairs(solution(), 100, samples=25_000, latents=False, **options)
        return DataLoader(pairs, batch_size=None, num_workers=workers)

    whole = batches(loader())
    for start in (0, 1, 7, 131, 250):
        rest = batches(loader(start=start))
        assert len(rest) == 250 - start
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_state_of_a_loader() -> None:
    pairs = distot.Pairs(solution(), 100, samples=1050, endless=True)
    every = iter(pairs)
    for _ in range(14):
        next(every)
    state = pairs.state_dict()
    assert state == {"epoch": 1, "batch": 3, "part": 0}
    other = distot.Pairs(solution(), 100, samples=1050, endless=True)
    other.load_state_dict(state)
    for mine, its, _ in zip(every, other, range(20), strict=False):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))
    with pytest.raises(TypeError, match="no length"):
        len(pairs)


def test_workers_that_stay_alive_hear_of_epochs() -> None:
    pairs = distot.Pairs(solution(), 100, samples=500)
    loader = DataLoader(pairs, batch_size=None, num_workers=1, persistent_workers=True)
    first = joined(loader)[0]
    pairs.set_epoch(1)
    second = joined(loader)[0]
    assert not torch.equal(first, second)
    assert torch.equal(second, joined(distot.Pairs(solution(), 100, samples=500, epoch=1))[0])


def test_equal_latents_share_by_their_masses() -> None:
    index = joined(distot.Pairs(repeated(), 1000, samples=200_000))[-1].numpy()
    assert (WEIGHTS[index] > 0).all()
    assert np.array_equal(
        REPEATED[index], REPEATED[repeated().assign(joined(distot.Pairs(repeated(), 1000, samples=200_000))[0])]
    )
    count = np.bincount(index, minlength=350)
    same = REPEATED[:, None].astype(float) == REPEATED[None].astype(float)
    group = same.all(axis=2).argmax(axis=1)  # the first equal one
    whole, mass = np.bincount(group, count, 350)[group], np.bincount(group, WEIGHTS, 350)[group]
    several = (mass > WEIGHTS) & (WEIGHTS > 0) & (whole > 50)
    assert several.sum() > 70
    share = WEIGHTS[several] / mass[several]
    z = (count[several] - whole[several] * share) / np.sqrt(whole[several] * share * (1 - share))
    assert np.abs(z).max() < 5
    assert np.mean(z**2) == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize("samples", [200, 350, 12_345])
def test_balance_gives_every_latent_its_quota(samples: int) -> None:
    pairs = distot.Pairs(repeated(), 50, samples=samples, balance=True, seed=1)
    noise, latent, index = joined(pairs)
    wanted = samples * WEIGHTS / WEIGHTS.sum()
    count = np.bincount(index, minlength=350)
    assert count.sum() == samples
    assert (np.abs(count - wanted) < 1).all()
    assert (count[WEIGHTS == 0] == 0).all()
    found = pairs.balanced
    assert found is not None
    assert float((noise - latent).square().sum(1).mean()) == pytest.approx(found.cost + found.rise, rel=1e-4)
    assert found.gap >= 0


def test_balance_stays_near_the_best_assignment() -> None:
    coupling = Coupling(solution(), 1)
    found = balance(coupling, 0, 800)
    x, y = coupling.noise.samples(0, 0, 800).numpy(), CLOUD.astype(float)
    index = balanced_index(coupling, found, 0)
    assert (np.bincount(index) == 2).all()
    cost = ((x[:, None] - np.repeat(y, 2, axis=0)) ** 2).sum(axis=2)
    best = cost[linear_sum_assignment(cost)].mean()
    ours = ((x - y[index]) ** 2).sum(axis=1).mean()
    assert ours - found.gap <= best + 1e-6 <= ours + 2e-6
    assert ours < best + 0.05 * (cost.mean() - best)


def test_largest_remainders() -> None:
    assert quotas(np.array([0.5, 0.26, 0.24, 0.0]), 10, 0, 0).tolist() == [5, 3, 2, 0]
    ties = np.array([quotas(np.full(10, 0.1), 13, seed, 0) for seed in range(300)])
    assert (ties.sum(axis=1) == 13).all()
    assert set(np.unique(ties)) == {1, 2}
    assert np.abs(ties.mean(axis=0) - 1.3).max() < 5 * np.sqrt(0.21 / 300)
    thirds = quotas(np.array([0.1, 0.2, 0.7]), 30, 0, 0)  # 0.1 * 3 is not 0.3
    assert thirds.tolist() == [3, 6, 21]


def test_soft_pairs_follow_the_softmax() -> None:
    """Shares of latents of the same samples, summed, against a dense softmax of all scores."""
    soft = distot.solve(CLOUD[:40], until_chi2=0.1, epsilon=0.3, top_k=40, progress=False)
    noise, _, index = joined(distot.Pairs(soft, 1000, samples=100_000))
    score = (noise.double() @ torch.from_numpy(CLOUD[:40].astype(float)).T + torch.from_numpy(soft.heights)) / 0.3
    plan = torch.softmax(score, dim=1)
    error = (plan * (1 - plan)).sum(0).sqrt()
    z = (torch.bincount(index, minlength=40) - plan.sum(0)) / error
    assert float(z.abs().max()) < 4.5
    likeliest = plan.max(dim=1).values
    hits = (plan.argmax(dim=1) == index).double()
    assert abs(float((hits - likeliest).sum())) < 4.5 * float((likeliest * (1 - likeliest)).sum().sqrt())
    near = Coupling(soft, 0).search(0, 0, 10, 40)[1]
    assert torch.allclose(shares(near, 0.3 / soft.problem.frame.unit).sum(1), torch.ones(10, dtype=torch.float64))


def test_pairs_of_a_run_in_other_processes(tmp_path: Path) -> None:
    run = solution().save(tmp_path / "run.zarr")
    again = pickle.loads(pickle.dumps(distot.Pairs(run, 100, orbits=False, balance=True)))
    for mine, its in zip(again, distot.Pairs(solution(), 100, orbits=False, balance=True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))
    with pytest.raises(InputError, match=r"save it \(solution.save"):
        pickle.dumps(distot.Pairs(solution(), 100))


@pytest.mark.parametrize("balanced", [False, True])
def test_a_file_of_pairs(tmp_path: Path, balanced: bool) -> None:
    """It has the same pairs as a loader, without the run."""
    out = tmp_path / "pairs.zarr"
    found = distot.write_pairs(solution(), out, 20_000, seed=4, epoch=2, balanced=balanced)
    assert (found is None) != balanced
    expected = joined(distot.Pairs(solution(), 64, samples=20_000, seed=4, epoch=2, balance=balanced))
    for workers in (0, 2):
        loader = DataLoader(distot.PairFile(out, CLOUD, 64, epoch=2), batch_size=None, num_workers=workers)
        got = joined(loader)
        assert np.array_equal(sorted_rows(got), sorted_rows(expected))
        assert np.array_equal(CLOUD[got[2]].astype(np.float32), got[1])
    assert len(next(iter(distot.PairFile(out)))) == 2
    with pytest.raises(InputError, match=r"are of other latents, of shape \(400, 4\)"):
        distot.PairFile(out, CLOUD + np.float16(1))


def test_a_file_of_pairs_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distot.store.rows.LEAST_BYTES", 8 * 8192)
    run, out = solution().save(tmp_path / "run.zarr"), tmp_path / "pairs.zarr"

    def stop(done: int, total: int) -> None:
        if done > 20_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distot.write_pairs(solution(), out, 40_000, on_rows=stop)
    with pytest.raises(InputError, match="has 24,576 of 40,000 pairs"):
        distot.PairFile(out, CLOUD)
    part = joined(distot.PairFile(out, partial=True))
    with pytest.raises(SystemExit) as end:
        command(["pairs", str(run), str(out), "-n", "4e4"])
    assert end.value.code == 0
    assert "complete; use it as distot.PairFile(" in capsys.readouterr().out
    whole = joined(distot.PairFile(out))
    assert np.array_equal(sorted_rows(part), sorted_rows(joined(distot.Pairs(solution(), 10, samples=24_576))))
    assert np.array_equal(sorted_rows(whole), sorted_rows(joined(distot.Pairs(solution(), 10, samples=40_000))))
    with pytest.raises(InputError, match="was begun with epoch = 0, and not 1"):
        distot.write_pairs(solution(), out, 40_000, epoch=1)


def test_a_sampler_of_the_user_in_a_file(tmp_path: Path) -> None:
    found = distot.solve(CLOUD, uniform, until_chi2=None, max_samples=5000, progress=False)
    distot.write_pairs(found, tmp_path / "pairs.zarr", 5000)
    with pytest.raises(InputError, match="give it as source="):
        distot.PairFile(tmp_path / "pairs.zarr")
    got = joined(distot.PairFile(tmp_path / "pairs.zarr", source=uniform))
    assert (found.assign(got[0]) == got[1].numpy()).mean() > 0.999


def uniform(generator: np.random.Generator, n: int) -> np.ndarray[Any, Any]:
    return generator.uniform(-2, 2, (n, 4))


@pytest.mark.parametrize("balanced", [False, True])
def test_classes_come_in_their_shares(balanced: bool) -> None:
    pairs = distot.ClassPairs(classes(), 64, samples=4000, balance=balanced)
    noise, latent, index, label = joined(pairs)
    assert np.bincount(label)[[3, 7, 8]].tolist() == [600, 1400, 2000]
    assert np.array_equal(LABELS[index], label)
    assert np.array_equal((CLOUD + LABELS[:, None])[index].astype(np.float32), latent)
    assert balanced == bool((np.bincount(index) == 10).all())
    for number in (3, 7, 8):
        own = label == number
        assert stats.kstest(noise[own][:, 0], "norm").pvalue > 1e-3
        if not balanced:
            assert np.array_equal(classes().rows[number][classes()[number].assign(noise[own])], index[own])
    assert len(torch.unique(noise, dim=0)) == 4000  # classes have noise of their own
    shuffled = [int((b[3] == 3).sum()) for b in pairs]
    assert np.var(shuffled[:-1]) == pytest.approx(64 * 0.15 * 0.85, rel=0.6)
    two = DataLoader(distot.ClassPairs(classes(), 64, samples=4000, balance=balanced), batch_size=None, num_workers=2)
    got = joined(two)
    assert np.array_equal(sorted_rows([got[0], got[2]]), sorted_rows([noise, index]))


def test_classes_in_a_folder(tmp_path: Path) -> None:
    """Text as labels, masses, and a second call that finds its work done."""
    text, mass = np.array(["a/b", "c"])[(LABELS > 3).astype(int)], np.arange(400) + 1.0
    heard: list[dict[str, Any]] = []
    options: dict[str, Any] = {"until_chi2": 0.2, "progress": False, "run": tmp_path / "all"}
    with pytest.warns(distot.DistotWarning, match="sum to"):
        first = distot.solve_classes(CLOUD, text, mass=mass, on_event=heard.append, **options)
    assert {event["event"] for event in heard} >= {"certificate"}
    heard.clear()
    again = distot.solve_classes(CLOUD, text, mass=mass, on_event=heard.append, **options)
    assert not heard
    stored = distot.load_classes(tmp_path / "all")
    for found in (first, again, stored):
        assert found.labels == ["a/b", "c"]
        assert found.share == pytest.approx([mass[:60].sum() / mass.sum(), mass[60:].sum() / mass.sum()])
        assert np.array_equal(found["c"].heights, first["c"].heights)
    assert joined(distot.ClassPairs(tmp_path / "all", samples=1000))[3].sum() == round(1000 * stored.share[1])
    with pytest.raises(InputError, match="was begun with other labels"):
        distot.solve_classes(CLOUD, text[::-1], mass=mass, **options)
    with pytest.raises(InputError, match=r"class a/b: .* was begun with seed = 0"):
        distot.solve_classes(CLOUD, text, mass=mass, seed=1, **options)


def test_conditions_are_kept_as_beta_grows() -> None:
    one_hot, y = np.eye(3)[np.searchsorted([3, 7, 8], LABELS)], CLOUD.astype(float)
    agreed, cost = [], []
    for beta in (0.01, 1.0, 300.0):
        both, wide = distot.conditional(y, one_hot, beta)
        found = distot.solve(both, wide, until_chi2=None, max_samples=16_000, progress=False, assigner="native")
        noise, latent, index = joined(distot.Pairs(found, samples=20_000))
        assert np.allclose(noise[:, 4:].sum(1), beta**0.5)
        agreed.append(float(np.mean(noise[:, 4:].argmax(1).numpy() == one_hot[index].argmax(1))))
        cost.append(float((noise[:, :4] - latent[:, :4]).square().sum(1).mean()))
    assert agreed[0] < agreed[1] < agreed[2]
    assert agreed[2] > 0.995
    assert cost[0] < cost[1] < cost[2]


def test_sources_side_by_side() -> None:
    """Independent, also as points that are evenly spread over a step; with moments, a spec, and their symmetry."""
    normal, box = distot.Gaussian([1.0, 2.0], [[2.0, 0.5], [0.5, 1.0]]), distot.Cube(2, -1, 1)
    rows = Samples(RNG.gamma(2.0, size=(50, 1)))
    sampler = as_source(lambda g, n: g.exponential(size=(n, 1)), 1)
    for first, second, symmetry in (
        (normal, distot.Gaussian(dim=3), "rotations"),
        (box, distot.Cube(3, 1, 3), "signs"),
        (box, distot.Cube(2), "none"),  # whose coordinates cannot change places
        (normal, box, "none"),
        (distot.Ball(2), distot.Sphere(3), "none"),
        (box, rows, "none"),
        (sampler, sampler, "none"),
    ):
        both = Product(first, second)
        assert (both.dim, both.symmetry) == (first.dim + second.dim, symmetry)
        mean, cov = both.moments(0)
        for stream in (Stream.STEP, Stream.PAIRS):
            x = both.draw(Key(0, stream, 0, 0), 4096).numpy()
            deviation = np.sqrt(np.diag(cov))
            assert np.abs((x.mean(0) - mean) / deviation).max() < 0.08
            assert np.abs((np.cov(x.T) - cov) / np.outer(deviation, deviation)).max() < 0.12
            halves = (x[:, 0] > np.median(x[:, 0])) == (x[:, -1] > np.median(x[:, -1]))
            assert abs(halves.mean() - 0.5) < 0.04
        if first is not sampler:
            again = from_spec(*both.spec())
            assert torch.equal(again.draw(Key(1, Stream.PAIRS, 0, 0), 64), both.draw(Key(1, Stream.PAIRS, 0, 0), 64))
        if symmetry != "none":
            noise = Noise(both, Orbit(both.dim, both.symmetry, 0), 0)
            x = noise.samples(0, 5, 30_005).numpy()
            assert np.abs((np.cov(x.T) - cov) / np.outer(deviation, deviation)).max() < 0.08
        if first is not sampler:  # what looks and certificates draw, whose orbits have axes of their own
            problem = build_problem(RNG.standard_normal((50, both.dim)), both, device="cpu")
            x = torch.cat([points(part) for _, part in problem.batch(Stream.CERTIFY, 0, 30_000)]).double().numpy()
            x = x * problem.frame.source_scale + problem.frame.source_centre
            assert np.abs((x.mean(0) - mean) / deviation).max() < 0.05
            assert np.abs((np.cov(x.T) - cov) / np.outer(deviation, deviation)).max() < 0.08


def test_a_plan_sampler_in_the_place_of_another() -> None:
    with pytest.warns(distot.DistotWarning, match="one map for all latents pairs noise with labels"):
        sampler = distot.PlanSampler(solution(), labels=LABELS)
    x0, x1 = torch.randn(32, 2, 2, dtype=torch.float64), torch.zeros(32, 2, 2)
    same, latent = sampler.sample_plan(x0, x1, replace=False)
    assert same is x0
    assert latent.dtype == torch.float64
    assert np.array_equal(latent.flatten(1), solution().map(x0.flatten(1)).astype(float))
    y0 = torch.arange(32)
    _, again, left, label = sampler.sample_plan_with_labels(x0, x1, y0, None)
    assert torch.equal(again, latent)
    assert left is y0
    assert label is not None
    assert np.array_equal(label, LABELS[solution().assign(x0.flatten(1))])
    assert distot.PlanSampler(solution()).sample_plan_with_labels(x0)[2:] == (None, None)
    with pytest.raises(InputError, match=r"shape \(B, 4\), not \(32, 3\)"):
        sampler.sample_plan(torch.zeros(32, 3))


def test_latents_in_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read into memory where they fit, by rows where they do not."""
    found = distot.load(solution().save(tmp_path / "run.zarr"))
    expected = joined(distot.Pairs(solution(), 100))
    for fits in (True, False):
        pairs = distot.Pairs(found, 100)
        assert pairs.shelf is not None
        if not fits:
            monkeypatch.setattr("distot.pairs.coupling.SHARE", 0.0)
            pairs.shelf = pickle.loads(pickle.dumps(Shelf(found.held.latents)))
            assert isinstance(pairs.shelf.rows, Latents)
        assert all(torch.equal(a, b) for a, b in zip(joined(pairs), expected, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: distot.Pairs(solution(), 0), "batch must be at least 1, it is 0"),
        (lambda: distot.Pairs(solution(), samples=0), "samples must be at least 1"),
        (lambda: distot.Pairs(solution(), seed=-1), "seed must be between 0"),
        (lambda: distot.Pairs(solution(), epoch=-1), "epoch must be 0 or more"),
        (lambda: distot.Pairs(solution(), start=3), "start must lie between 0 and the 2 batches"),
        (lambda: distot.Pairs(solution(), rank=1), "give rank and world together"),
        (lambda: distot.Pairs(solution(), rank=2, world=2), "rank must lie between 0 and world - 1 = 1"),
        (lambda: distot.Pairs(solution(), endless=True, balance=True), "leave out endless"),
        (lambda: distot.Pairs(solution(), 500, world=2, rank=0, drop_last=True, endless=True), "no batch of 500"),
        (lambda: distot.write_pairs(solution(), "never.zarr", 0), "samples must be at least 1"),
        (lambda: distot.PlanSampler(solution(), labels=[1, 2]), r"labels must have shape \(400,\)"),
        (lambda: distot.solve_classes(CLOUD, LABELS[:5]), r"whole numbers or text of shape \(400,\)"),
        (lambda: distot.solve_classes(CLOUD, np.arange(400)), r"have fewer: 0 \(1\), 1 \(1\)"),
        (lambda: distot.solve_classes(np.ones((4, 2)), [0, 0, 1, 1]), "class 0: all latents .* are the same point"),
        (lambda: distot.conditional(CLOUD, LABELS, 1.0), r"they are \(400, 4\), \(400,\)"),
        (lambda: distot.conditional(CLOUD, np.eye(3)[LABELS % 3], 0.0), "beta must be positive"),
    ],
)
def test_bad_input(make: Callable[[], Loader], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
    assert not Path("never.zarr").exists()


def test_no_pairs_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no rows"):
        distot.PairFile(solution().save(tmp_path / "run.zarr"))
    with pytest.raises(StoreError, match="does not exist"):
        distot.Pairs(tmp_path / "none.zarr")


def test_shares_of_batches() -> None:
    """Every batch once, whatever the shape; batches come from workers in turn."""
    for count, world, workers in ((10, 3, 2), (3, 2, 4), (100, 1, 7)):
        got = [
            list(Plan(count * 8 - 3, 8, rank=r, world=world).own(w, workers))
            for r in range(world)
            for w in range(workers)
        ]
        assert sorted(chain(*got)) == list(range(count))
