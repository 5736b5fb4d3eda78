"""Generative models: training goes on bit for bit, penalties and critics meet exact values, theorems hold, judges."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import distot
from distot.errors import InputError
from distot.models import (
    Adversary,
    Autoencoder,
    Classifier,
    Code,
    Critic,
    Data,
    Discrepancy,
    Divergence,
    Fit,
    Judge,
    Penalty,
    Spec,
    Training,
    Transport,
    fit,
    fit_batches,
    load,
    mmd,
    train,
)
from distot.models.autoencoder import about
from distot.models.datasets import COPIES, floats
from distot.models.evaluation import density_coverage, frechet, precision_recall, sliced_w2, w2_squared
from distot.models.penalties import PENALTIES, SCALES, kernel
from jobs.critic import minimise

RNG = np.random.default_rng(3)
PLANE = torch.from_numpy(RNG.standard_normal((300, 2)) * [2, 0.5]).float()
IMAGES = torch.from_numpy(RNG.integers(0, 256, (40, 1, 8, 8))).byte()
SHORT = Training(epochs=3, batch=50)


def draws(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


# --- networks and their training


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (1, 5, 9), (7,)])
@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_shapes_of_any_size(shape: tuple[int, ...], kind: Literal["dense", "convolutional"]) -> None:
    if len(shape) == 1 and kind == "convolutional":
        with pytest.raises(InputError, match="is for images"):
            Spec(shape, 3, kind)
        return
    model = Autoencoder(Spec(shape, 3, kind, width=8))
    x = torch.rand(5, *shape)
    z = model.encode(x)
    assert z.shape == (5, 3)
    assert model.decode(z).shape == x.shape
    assert model.decode(torch.empty(0, 3)).shape == (0, *shape)
    if len(shape) == 3:
        assert 0 <= float(model.decode(100 * z).min()) <= float(model.decode(100 * z).max()) <= 1
        assert torch.equal(model.encode((x * 255).byte()), model.encode((x * 255).byte().float() / 255))


@pytest.mark.parametrize("name", PENALTIES)
def test_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Training that is killed between epochs gives what it had given without, whatever the penalty remembers."""

    def fresh() -> tuple[Autoencoder, Penalty]:
        penalty = PENALTIES[name](2)
        return Autoencoder(Spec((2,), 2, width=16, random=penalty.random), seed=1), penalty

    def stop(epoch: Any) -> None:
        if epoch.number == 0:
            raise KeyboardInterrupt

    whole, penalty = fresh()
    history = train(whole, PLANE, penalty, SHORT)
    assert history[-1].cost < history[0].cost
    begun, penalty = fresh()
    with pytest.raises(KeyboardInterrupt):
        train(begun, PLANE, penalty, SHORT, state=tmp_path / "state", on_epoch=stop)
    again, penalty = fresh()
    assert train(again, PLANE, penalty, SHORT, state=tmp_path / "state") == history
    assert again.fingerprint == whole.fingerprint
    done, penalty = fresh()
    seen: list[Any] = []
    assert train(done, PLANE, penalty, SHORT, state=tmp_path / "state", on_epoch=seen.append) == history
    assert not seen
    assert done.fingerprint == whole.fingerprint
    other, penalty = fresh()
    with pytest.raises(InputError, match="state of another training"):
        train(other, PLANE + 1, penalty, SHORT, state=tmp_path / "state")
    (tmp_path / "state").write_bytes(b"no state at all")
    with pytest.raises(InputError, match="cannot be read"):
        train(fresh()[0], PLANE, fresh()[1], SHORT, state=tmp_path / "state")


def test_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (Autoencoder(Spec((1, 8, 8), 3, "convolutional", 4), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), before)  # nobody else's numbers are touched
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_files(tmp_path: Path) -> None:
    model = Autoencoder(Spec((1, 8, 8), 3, "convolutional", 4), seed=4)
    file = tmp_path / "model.safetensors"
    model.save(file, epochs=3, data="digits")
    again = Autoencoder.load(file)
    assert (again.fingerprint, again.spec) == (model.fingerprint, model.spec)
    assert about(file) == {"epochs": 3, "data": "digits"}
    assert torch.equal(again.encode(IMAGES), model.encode(IMAGES))
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    (tmp_path / "damaged").write_bytes(file.read_bytes()[:-100])
    for name, match in (("foreign", "not an autoencoder"), ("damaged", "cannot be read"), ("none", "cannot be read")):
        with pytest.raises(InputError, match=match):
            Autoencoder.load(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        about(tmp_path / "foreign")


def test_bad_input() -> None:
    model = Autoencoder(Spec((1, 8, 8), 3, "convolutional", 4))
    bad: list[tuple[Tensor, str]] = [
        (torch.rand(5, 1, 9, 8), r"for data of shape \(B, 1, 8, 8\), not"),
        (torch.rand(5, 64), "for data of shape"),
        (torch.empty(0, 1, 8, 8), "for data of shape"),
        (torch.rand(5, 1, 8, 8) * 255, r"values in \[0, 1\], or be bytes"),
        (torch.rand(5, 1, 8, 8) - 0.5, r"values in \[0, 1\]"),
        (torch.full((5, 1, 8, 8), float("nan")), "NaN"),
    ]
    for x, match in bad:
        for act in (model.encode, lambda x: train(model, x)):
            with pytest.raises(InputError, match=match):
                act(x)
    with pytest.raises(InputError, match="vectors must be floating"):
        Autoencoder(Spec((2,), 2)).encode(torch.zeros(3, 2).byte())
    with pytest.raises(InputError, match=r"have shape \(B, 3\)"):
        model.decode(torch.zeros(5, 4))
    with pytest.raises(InputError, match="NaN"):
        model.decode(torch.full((5, 3), float("inf")))
    with pytest.raises(InputError, match="takes random=True"):
        train(model, IMAGES, Divergence())
    with pytest.raises(InputError, match="at least 2 data"):
        train(model, IMAGES[:1])
    wrong: list[Callable[[], Any]] = [
        lambda: Spec((2, 2), 2),
        lambda: Spec((2,), 0),
        lambda: Spec((2,), 2, "round"),  # type: ignore[arg-type]
        lambda: Training(epochs=0),
        lambda: Training(rate=0),
        lambda: Training(seed=-1),
        lambda: Discrepancy(-1),
        lambda: Transport(every=0),
        lambda: mmd(torch.zeros(1, 2), torch.zeros(5, 2)),
        lambda: Fit(batch=1),
        lambda: fit_batches(np.zeros((10, 2)), size=11),
        lambda: Critic(torch.zeros(1, 2)),
        lambda: Critic(PLANE, cost="w3"),  # type: ignore[arg-type]
        lambda: Critic(PLANE, mass=np.zeros(300)),
        lambda: Critic(PLANE)(torch.zeros(5, 3)),
        lambda: Critic(PLANE, cost="w1").solve(lambda n: draws(n, 2)),
        lambda: fit(distot.solve(PLANE[:20], epsilon=1.0, until_chi2=0.5, progress=False)),
    ]
    for make in wrong:
        with pytest.raises(InputError):
            make()


# --- penalties


def test_discrepancy_against_the_sums() -> None:
    a, b = draws(6, 3).double(), draws(5, 3, 1).double() + 1

    def k(x: Tensor, y: Tensor) -> float:
        return sum(6 * s / (6 * s + float((x - y).square().sum())) for s in SCALES)

    within = [np.mean([k(x, y) for i, x in enumerate(c) for j, y in enumerate(c) if i != j]) for c in (a, b)]
    between = np.mean([k(x, y) for x in a for y in b])
    assert float(mmd(a, b)) == pytest.approx(sum(within) - 2 * between)
    assert float(Discrepancy(3.0)(Code(a, None), a, b, torch.arange(6), torch.tensor(0.0), 3)) == pytest.approx(
        3 * (sum(within) - 2 * between)
    )


def test_discrepancy_of_equal_laws_is_zero_in_the_mean() -> None:
    values = np.array([float(mmd(draws(20, 4, 2 * i), draws(20, 4, 2 * i + 1))) for i in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 20
    assert float(mmd(draws(20, 4, 1), draws(20, 4, 2) + 2)) > 10 * values.std()


def test_adversary_learns_where_noise_is() -> None:
    """A shifted cloud is told from noise, and the encoder's gradient leads it back."""
    penalty = Adversary(2)
    for seed in range(150):
        penalty.learn(draws(64, 2, seed) + torch.tensor([3.0, 0.0]), draws(64, 2, 1000 + seed))
    z = (draws(64, 2, 9) + torch.tensor([3.0, 0.0])).requires_grad_()
    loss = penalty(Code(z, None), z, draws(64, 2, 10), torch.arange(64), torch.tensor(0.0), 2)
    (slope,) = torch.autograd.grad(loss, z)
    assert float(loss.detach()) / penalty.weight > 2
    assert float(slope[:, 0].mean()) > 5 * abs(float(slope[:, 1].mean())) > 0


def test_divergence_against_torch() -> None:
    """The penalty is 2 cost / d times KL, so that cost + penalty has the gradient of σ² (cost / σ² + KL)."""
    mean, log_variance = draws(7, 3).requires_grad_(), draws(7, 3, 1)
    noise = torch.distributions.Normal(0.0, 1.0)
    each = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * log_variance).exp()), noise)
    found = Divergence()(Code(mean, log_variance), mean, mean, torch.arange(7), torch.tensor(0.6), 4)
    assert float(found) == pytest.approx(2 * 0.6 / 4 * each.sum(dim=1).mean().item(), rel=1e-6)
    variance = np.linspace(0.1, 0.6, 51)  # likeliest of the decoder: least d/2 log σ² + cost / σ²
    assert variance[np.argmin(2 * np.log(variance) + 0.6 / variance)] == pytest.approx(2 * 0.6 / 4)


def test_transport_penalty_is_the_gradient_of_w2() -> None:
    """Against finite differences of the exact ½W2², in a small case in the plane; math (33)."""
    y = draws(30, 2, 5).double() * torch.tensor([2.0, 0.7])
    penalty = Transport(weight=1.0, until_chi2=0.02)
    penalty.begin(0, lambda: y)
    sampled = penalty.centre.clone()
    cells = distot.solve(y, exact=True, progress=False).exact_cells()
    penalty.centre = torch.from_numpy(cells.centre).float()
    assert float((sampled - penalty.centre).square().mean().sqrt()) < 0.1

    def slope() -> Tensor:
        z = y.float().requires_grad_()
        value = penalty(Code(z, None), z, z, torch.arange(30), torch.tensor(0.0), 2)
        return torch.autograd.grad(value, z)[0].double()

    way, step = draws(30, 2, 6).double(), 1e-3
    ends = [distot.solve(y + s * step * way, exact=True, progress=False).exact_cells() for s in (1, -1)]
    wanted = 0.5 * (ends[0].w2_squared_bound - ends[1].w2_squared_bound) / (2 * step)
    assert float((slope() * way).sum()) == pytest.approx(wanted, rel=1e-4)
    penalty.centre = sampled
    assert float((slope() * way).sum()) == pytest.approx(wanted, rel=0.1)
    penalty.centre[:5] = float("nan")  # cells that no sample found
    assert bool(torch.isfinite(slope()).all())
    assert float(slope()[:5].abs().max()) == 0


# --- theorems of docs/math.md, section 12


@pytest.mark.parametrize("bend", [1.0, 3.0])
def test_power_cell_encoder(bend: float) -> None:
    """Its latents are noise exactly at the solution, and its cost bounds that of data and generated data from above."""
    x = draws(60, 2, 7).double() * torch.tensor([1.5, 0.8])
    z = x * torch.tensor([bend, 1.0])  # encoder; the decoder takes this back
    solution = distot.solve(z, exact=True, progress=False)
    cells = solution.exact_cells()
    ratio = cells.wanted / cells.mass  # density of Q_Z relative to P_Z
    assert np.abs(ratio - 1).max() < 1e-8
    coarse = distot.solve(z, max_samples=300, until_chi2=None, progress=False).exact_cells()
    assert np.abs(coarse.wanted / coarse.mass - 1).max() > 0.01

    noise = draws(40_000, 2, 8).double()
    made = noise / torch.tensor([bend, 1.0])
    each = 0.5 * (x[solution.assign(noise)] - made).square().sum(dim=1)
    source = distot.Gaussian(np.zeros(2), np.diag([bend**-2.0, 1.0]))
    least = 0.5 * distot.solve(x, source, exact=True, progress=False).exact_cells().w2_squared_bound
    error = float(each.std() / 200)
    if bend == 1:  # the decoder keeps distances: equality
        assert float(each.mean()) == pytest.approx(least, abs=4 * error)
    else:
        assert float(each.mean()) > least + 4 * error


def test_blur_of_a_gaussian_decoder() -> None:
    """E|x - y|² with y = G(z) + σ noise is E|x - G(z)|² + d σ²."""
    model = Autoencoder(Spec((6,), 2, width=16))
    x, blur = draws(20_000, 6), 0.7
    sharp = model.decode(model.encode(x))
    each = (x - sharp - blur * draws(20_000, 6, 1)).square().sum(dim=1) - (x - sharp).square().sum(dim=1)
    assert float(each.mean()) == pytest.approx(6 * blur**2, abs=4 * float(each.std()) / 20_000**0.5)


def test_discrepancy_falls_with_chi2() -> None:
    """During a solve MMD(Q_Z, P_Z) of the power-cell encoder falls with chi2, and is below K(0) times its own chi2."""
    z = np.concatenate([draws(20, 2, seed).numpy() * 0.1 + [4 * seed, 0] for seed in range(3)])
    noise = draws(2000, 2, 11).double()
    k, found = kernel(noise, noise), []
    for budget in (600, 2000, 6000, 60_000):
        solution = distot.solve(z, max_samples=budget, until_chi2=None, progress=False)
        cells = solution.exact_cells()
        ratio = cells.wanted / cells.mass  # the density of Q_Z relative to P_Z
        weight = torch.from_numpy(ratio[solution.assign(noise)]) - 1
        found.append((float(weight @ k @ weight) / 2000**2, cells.chi2))
        assert found[-1][0] <= 1.2 * len(SCALES) * float(cells.mass @ (ratio - 1) ** 2)
    squares, chi2s = zip(*found, strict=True)
    assert list(squares) == sorted(squares, reverse=True)
    assert list(chi2s) == sorted(chi2s, reverse=True)
    assert squares[-1] < 0.02 * squares[0]


# --- potentials and critics


def test_potential_of_gaussians_is_that_of_brenier() -> None:
    y = draws(2000, 2, 1).double() @ torch.tensor([[2.0, 0.0], [0.5, 0.4]]).double() + torch.tensor([3.0, -1.0])
    potential = fit(distot.solve(y, until_chi2=0.02, progress=False), Fit(pool=20_000, steps=600, width=64))
    values, vectors = torch.linalg.eigh(torch.cov(y.T))
    root = vectors @ values.sqrt().diag() @ vectors.T
    x = draws(2000, 2, 2)
    wanted = x.double() @ root + y.mean(dim=0)
    off = float((potential.map(x) - wanted).square().sum(dim=1).mean()) / float(values.sum())
    assert off < 0.01
    batches = fit_batches(y.numpy(), how=Fit(pool=10_000, steps=600, width=64), problems=4, size=300, until_chi2=0.1)
    assert float((batches.map(x) - wanted).square().sum(dim=1).mean()) / float(values.sum()) < 0.03
    with pytest.raises(InputError, match=r"shape \(B, 2\)"):
        potential.map(np.zeros((4, 3)))


def test_potential_reaches_eight_gaussians() -> None:
    """Every mode, and at a map cost that is close to the certificate's W2²."""
    data = load("gaussians8", 2000)
    solution = distot.solve(data.values, until_chi2=0.05, exact=True, progress=False)
    potential = fit(solution, Fit(pool=40_000, steps=1000, width=64))
    x = draws(20_000, 2, 3)
    y = potential.map(x)
    assert data.core is not None
    nearest = torch.cdist(y, torch.from_numpy(data.core.points).float()).argmin(dim=1)
    share = torch.bincount(nearest, minlength=8) / len(y)
    assert float((8 * share - 1).abs().max()) < 0.1
    cost = float((x - y).square().sum(dim=1).mean())
    assert cost == pytest.approx(solution.certificate.w2_squared_bound, rel=0.12)


@pytest.mark.parametrize("cost", ["w2", "w1"])
def test_critic_and_its_gradient(cost: Literal["w2", "w1"]) -> None:
    """The dual value of a generator m + s noise, and its slopes in m and s, against the exact ones.

    For w2 the noise is normal and cells are exact, for w1 it is 400 points, assigned exactly.
    """
    y, cloud = draws(20, 2, 4) * 1.5, draws(400, 2, 5)
    place, size = torch.tensor(0.7, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    random = torch.Generator().manual_seed(1)

    def sample(n: int) -> Tensor:
        if cost == "w2":
            return place + size * torch.randn(n, 2, generator=random)
        return place + size * cloud[torch.randint(400, (n,), generator=random)]

    def exact(m: float, s: float) -> float:
        if cost == "w1":
            costs = torch.cdist(m + s * cloud, y).repeat_interleave(20, dim=1).numpy()
            return float(costs[linear_sum_assignment(costs)].mean())
        source = distot.Gaussian(np.full(2, m), np.full(2, s * s))
        return 0.5 * distot.solve(y, source, exact=True, progress=False).exact_cells().w2_squared_bound

    critic = Critic(y, cost=cost)
    with torch.no_grad():
        critic.fit(sample, steps=300)
    wanted, found = exact(0.7, 0.8), critic.estimate(sample, 100_000)
    assert found.value == pytest.approx(wanted, rel=0.01)
    assert found.value < wanted + 4 * found.error
    slopes = torch.autograd.grad(critic(sample(100_000)), (place, size))
    for slope, ends in zip(slopes, (((0.72, 0.8), (0.68, 0.8)), ((0.7, 0.82), (0.7, 0.78))), strict=True):
        assert float(slope) == pytest.approx((exact(*ends[0]) - exact(*ends[1])) / 0.04, abs=0.02)


def test_critic_of_uneven_masses() -> None:
    """Cells get the masses that were asked for, and the map takes samples to the data of their cells."""
    y, mass = draws(9, 2, 6) + 5, np.arange(1.0, 10)
    critic = Critic(y, mass)
    random = torch.Generator().manual_seed(0)
    critic.fit(lambda n: torch.randn(n, 2, generator=random), steps=300)
    found = torch.cdist(critic.map(draws(50_000, 2)), y).argmin(dim=1)
    assert np.abs(np.bincount(found, minlength=9) / 50_000 / mass * 45 - 1).max() < 0.1
    assert float(critic.g @ torch.from_numpy(mass).float()) == pytest.approx(0, abs=1e-3)


def test_generator_by_minimisation_alone() -> None:
    data = load("gaussians8", 1000)
    before, after = (minimise(data, "w2", 256, steps, Judge(data, count=200)) for steps in (1, 400))
    assert after.distance.value < 0.15 * before.distance.value
    assert after.worst < 0.5


def test_critic_by_the_solver() -> None:
    y = draws(200, 3, 5) * torch.tensor([1.0, 2.0, 0.5]) + 1
    random = torch.Generator().manual_seed(1)
    critic = Critic(y)

    def sample(n: int) -> Tensor:
        return torch.randn(n, 3, generator=random)

    with torch.no_grad():
        solution = critic.solve(lambda n: torch.randn(n, 3), until_chi2=0.05)
        found = critic.estimate(sample, 50_000)
        assert solution.certificate.w2_squared_bound == pytest.approx(2 * found.value, abs=8 * found.error)
        again = critic.solve(lambda n: torch.randn(n, 3), until_chi2=0.05)  # from where it is
    assert again.history[0].chi2 < 0.1


# --- judging


def test_frechet_in_closed_form() -> None:
    a = draws(500, 4).double()
    a = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(a.T)), (a - a.mean(dim=0)).T, upper=False).T
    shift = torch.tensor([1.0, 0.0, -2.0, 0.5]).double()
    assert frechet(a, 3 * a + shift) == pytest.approx(4 * 4 + 5.25)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, torch.zeros_like(a)) == pytest.approx(4)  # a law that has collapsed


def test_neighbours_of_the_same_and_of_others() -> None:
    a = draws(300, 3).double()
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 100) == (0, 0)
    assert density_coverage(a, a) == pytest.approx((6 / 5, 1))  # each ball has its centre and 5 others
    assert density_coverage(a, a + 100) == (0, 0)
    precision, recall = precision_recall(a, a[:30] * 0.1)
    assert precision > 0.9 > 0.2 > recall
    with pytest.raises(InputError, match="too few"):
        precision_recall(a[:3], a)


def test_distances_of_a_shift() -> None:
    a, shift = draws(400, 3).double(), torch.tensor([2.0, 0.0, 1.0]).double()
    sliced = sliced_w2(a, a + shift)
    assert sliced.value == pytest.approx((5 / 3) ** 0.5, abs=4 * sliced.error)
    assert sliced_w2(a, a).value == 0
    found = w2_squared(a, a + shift)
    assert found.value - 4 * found.error <= 5
    assert found.value == pytest.approx(5, rel=0.05)


def test_judge_of_toys() -> None:
    data = load("gaussians25", 5000)
    judge = Judge(data, count=1000)
    good = judge(load("gaussians25", 25_000).values)
    assert good.covered == 1
    assert good.worst < 0.01
    assert good.between < 1e-4
    assert good.coverage > 0.9
    half = judge(data.values[data.labels < 12])
    assert half.covered == pytest.approx(12 / 25)
    assert half.worst == pytest.approx(25 / 12 - 1, rel=0.02)
    between = judge(data.values + 0.5)
    assert between.between > 0.99
    assert between.precision == between.coverage == 0
    for bad, match in (
        (data.values[:99], "at least 100"),
        (torch.zeros(200, 3), "of shape"),
        (torch.full((200, 2), float("nan")), "NaN"),
    ):
        with pytest.raises(InputError, match=match):
            judge(bad)


def test_classifier_of_images() -> None:
    labels = torch.arange(600) % 3
    images = (torch.rand(600, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 100).byte()
    for label in range(3):
        images[labels == label, :, 2 * label : 2 * label + 2] += 120
    data = Data("stripes", images[:400], labels[:400], images[400:], labels[400:])
    classifier = Classifier(data)
    assert classifier.accuracy > 0.95
    assert torch.equal(classifier(images[:50]), Classifier(data)(images[:50]))
    judge = Judge(data)
    assert judge(floats(images[400:])) == judge(images[400:])
    empty = Data("gap", images[:400], labels[:400] + (labels[:400] == 2), images[400:], labels[400:])
    with pytest.raises(InputError, match=r"classes \[2\] of gap have no members"):
        Classifier(empty)


# --- data sets


def write_idx(file: Path, values: np.ndarray[Any, Any]) -> None:
    """In the format of MNIST: a magic number, big-endian shape, bytes; compressed if the name says so."""
    raw = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)


@pytest.mark.parametrize(("sign", "end"), [("-", ""), (".", ""), ("-", ".gz")])
def test_mnist(tmp_path: Path, sign: str, end: str) -> None:
    images, labels = RNG.integers(0, 256, (30, 28, 28)), np.arange(30) % 10
    for part, span in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        write_idx(tmp_path / f"{part}-images{sign}idx3-ubyte{end}", images[span])
        write_idx(tmp_path / f"{part}-labels{sign}idx1-ubyte{end}", labels[span])
    data = load(tmp_path)
    assert (data.shape, data.values.dtype, data.classes) == ((1, 28, 28), torch.uint8, 10)
    assert np.array_equal(data.values[:, 0], images[:20])
    assert np.array_equal(data.fresh[:, 0], images[20:])
    assert np.array_equal(data.fresh_labels, labels[20:])
    few = load(tmp_path, 5)
    assert len(few.values) == len(few.labels) == 5
    with pytest.raises(InputError, match="too many"):
        load(tmp_path, 21)


def test_broken_mnist(tmp_path: Path) -> None:
    def whole() -> None:
        for part in ("train", "t10k"):
            write_idx(tmp_path / f"{part}-images-idx3-ubyte", np.zeros((5, 28, 28)))
            write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.zeros(5))

    with pytest.raises(InputError, match="has no train-images-idx3-ubyte"):
        load(tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    whole()
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"3,919 values, where its head says 3,920"):
        load(tmp_path)
    whole()
    images.write_bytes(labels.read_bytes())
    with pytest.raises(InputError, match="not an IDX file of bytes in 3 dimensions"):
        load(tmp_path)
    whole()
    write_idx(labels, np.zeros(4))
    with pytest.raises(InputError, match="5 train images, and 4 labels"):
        load(tmp_path)
    whole()
    images.unlink()
    images.with_suffix(".gz").write_bytes(gzip.compress(b"abc")[:-4])
    images.with_suffix(".gz").rename(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path)


def test_celeba(tmp_path: Path) -> None:
    """178 x 218 pictures, a list of parts, and attributes of 1 and -1 below a count and their names."""
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "img_align_celeba").mkdir()
    names = [f"{number:06}.jpg" for number in range(1, 6)]
    for number, name in enumerate(names):
        picture = np.full((218, 178, 3), 40 * number, np.uint8)
        picture[:35] = 255  # cut away
        image.fromarray(picture).save(tmp_path / "img_align_celeba" / name)
    with pytest.raises(InputError, match=r"has no list_eval_partition\.txt"):
        load(tmp_path)
    parts = tmp_path / "list_eval_partition.txt"
    parts.write_text("".join(f"{name} {part}\n" for name, part in zip(names, (0, 0, 1, 2, 2), strict=True)))
    attributes = tmp_path / "list_attr_celeba.txt"
    rows = [f"{name}  {sign} -1 " for name, sign in zip(names, (1, -1, 1, 1, -1), strict=True)]
    attributes.write_text("\n".join(["5", "Smiling Young ", *rows]) + "\n")
    data = load(tmp_path)
    assert data.values.shape == (2, 3, 64, 64)
    assert [int(its.float().mean().round()) for its in (*data.values, *data.fresh)] == [0, 40, 120, 160]
    assert (data.labels.tolist(), data.fresh_labels.tolist()) == ([1, 0], [1, 0])
    attributes.write_text("5\nYoung\n")
    with pytest.raises(InputError, match="has no attribute 'Smiling'"):
        load(tmp_path)
    attributes.unlink()
    assert load(tmp_path).labels.tolist() == [0, 0]
    image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(tmp_path / "img_align_celeba" / names[0])
    with pytest.raises(InputError, match="100 x 100 pixels"):
        load(tmp_path)
    (tmp_path / "img_align_celeba" / names[0]).write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path)
    parts.write_text(f"{names[0]} 0\n")
    with pytest.raises(InputError):
        load(tmp_path)


def test_patches_are_windows_and_those_held_out_are_of_other_strips() -> None:
    data = load("patches", 20_000)
    assert data.values.shape == (20_000, 3, 8, 8)
    assert (data.values.dtype, len(data.fresh), data.classes) == (torch.uint8, 10_000, 2)
    assert float(data.shares[0]) == pytest.approx(0.5, abs=0.02)
    from sklearn.datasets import load_sample_images

    flower = torch.from_numpy(load_sample_images().images[1].copy()).movedim(-1, 0)
    for values, labels, first in ((data.values, data.labels, 0), (data.fresh, data.fresh_labels, 560)):
        patch = values[labels == 1][0]
        places = (flower.unfold(1, 8, 1).unfold(2, 8, 1) == patch[:, None, None]).all(0).all(-1).all(-1).nonzero()
        assert len(places), "it is no window of the photograph"
        assert any(first <= column <= (632 if first else 552) for _, column in places.tolist())


def test_digits_are_varied_as_documented() -> None:
    data, again = load("digits"), load("digits")
    assert (data.values.shape, data.fresh.shape, data.classes) == ((50_932, 1, 8, 8), (10_166, 1, 8, 8), 10)
    assert torch.equal(data.values, again.values)
    first = len(data.values) // COPIES
    from sklearn.datasets import load_digits

    found = load_digits()
    held = np.arange(len(found.images)) % 6 == 5
    wanted = np.round(found.images[~held] / 16 * 255)
    assert np.abs(data.values[:first, 0].numpy() - wanted).max() <= 1
    assert np.array_equal(data.labels[:first], found.target[~held])
    assert torch.equal(data.labels[first : 2 * first], data.labels[:first])
    copies = floats(data.values).view(COPIES, first, -1)
    moved = (copies[1:] - copies[0]).square().sum(dim=2).mean() / (copies[0] - copies[0].roll(1, 0)).square().sum(
        1
    ).mean()
    assert 0.02 < float(moved) < 0.4  # other than the original, and far nearer to it than to another digit
    assert float(data.shares.sum()) == pytest.approx(1)


def test_toys() -> None:
    for name, modes in (("gaussians8", 8), ("gaussians25", 25), ("swissroll", 8)):
        data = load(name, 4000)
        assert (data.shape, data.classes, len(data.fresh)) == ((2,), modes, 10_000)
        assert float((data.shares * modes - 1).abs().max()) < 0.01
        assert not torch.equal(data.values, data.fresh[:4000])
    for name, size in (("gaussians9", None), ("digits", 1), ("digits", 10**9), ("no/folder", None)):
        with pytest.raises(InputError):
            load(name, size)
