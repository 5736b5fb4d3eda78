"""Sources draw from the law they name, and a sample depends on its key alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

import distot
from distot.errors import InputError
from distot.orbit import Orbit
from distot.source import BLOCK, Key, Sampler, Source, Stream, as_source, from_spec, uniforms

COV = np.array([[4.0, 1.0, 0.0], [1.0, 2.0, -0.5], [0.0, -0.5, 0.3]])
ROWS = np.random.default_rng(0).gamma(2.0, size=(1000, 3))


def exponential(generator: np.random.Generator, n: int) -> NDArray[np.float64]:
    return generator.exponential(size=(n, 3))


SOURCES: dict[str, Source] = {
    "gaussian": distot.Gaussian(dim=3),
    "diagonal": distot.Gaussian([1.0, 2.0, 3.0], [0.1, 1.0, 9.0]),
    "full": distot.Gaussian([1.0, 2.0, 3.0], COV),
    "degenerate": distot.Gaussian(np.zeros(3), np.outer([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])),
    "cube": distot.Cube(3, -1.0, 3.0),
    "ball": distot.Ball(3, 2.0, [1.0, 0.0, 0.0]),
    "sphere": distot.Sphere(3, 2.0, [1.0, 0.0, 0.0]),
    "samples": distot.Samples(ROWS),
    "sampler": Sampler(exponential, 3),
}
every = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
streams = pytest.mark.parametrize("stream", [Stream.STEP, Stream.CERTIFY], ids=["sobol", "independent"])


def draw(source: Source, stream: Stream, blocks: int = 16, seed: int = 7) -> NDArray[np.float64]:
    return np.concatenate([source.draw(Key(seed, stream, 0, b), BLOCK).numpy() for b in range(blocks)])


@every
@streams
def test_moments(source: Source, stream: Stream) -> None:
    x = draw(source, stream)
    mean, cov = source.moments(0)
    deviation = np.sqrt(np.diag(cov)) + 1e-12
    assert (np.abs(x.mean(axis=0) - mean) / deviation < 0.03).all()
    assert (np.abs(np.cov(x.T) - cov) / np.outer(deviation, deviation) < 0.05).all()


@every
def test_a_sample_depends_on_its_key_alone(source: Source) -> None:
    key = Key(3, Stream.CERTIFY, 5, 2)
    alone = source.draw(key, 100)
    source.draw(Key(3, Stream.CERTIFY, 5, 1), 50)
    assert torch.equal(source.draw(key, 100), alone)
    for other in (key._replace(seed=4), key._replace(stream=Stream.CHECK), key._replace(step=6), key._replace(block=3)):
        assert not torch.equal(source.draw(other, 100), alone)


@every
def test_spec_rebuilds_the_source(source: Source) -> None:
    spec, arrays = source.spec()
    if isinstance(source, Sampler):
        with pytest.raises(InputError, match=r"'exponential', which cannot be stored.*distot.resume\(run, source="):
            from_spec(spec, arrays)
        return
    again = from_spec(spec, arrays)
    assert torch.equal(again.draw(Key(1, Stream.STEP, 0, 0), 64), source.draw(Key(1, Stream.STEP, 0, 0), 64))


def test_laws() -> None:
    ball = (draw(SOURCES["ball"], Stream.CERTIFY) - [1, 0, 0]) / 2
    assert stats.kstest(np.linalg.norm(ball, axis=1) ** 3, "uniform").pvalue > 1e-3
    sphere = (draw(SOURCES["sphere"], Stream.CERTIFY) - [1, 0, 0]) / 2
    assert np.allclose(np.linalg.norm(sphere, axis=1), 1)
    assert stats.kstest(sphere[:, 2], stats.uniform(-1, 2).cdf).pvalue > 1e-3  # Archimedes
    assert stats.kstest(draw(SOURCES["gaussian"], Stream.CERTIFY)[:, 1], "norm").pvalue > 1e-3
    assert set(np.unique(draw(distot.Sphere(1), Stream.CERTIFY))) == {-1.0, 1.0}


def test_sobol_blocks_continue_one_sequence() -> None:
    """Blocks of a step are pieces of one net: together they are far more even than independent draws."""
    u = torch.cat([uniforms(Key(0, Stream.STEP, 3, b, b * BLOCK), BLOCK, 1) for b in range(4)])[:, 0].sort().values
    uneven = (u - (torch.arange(len(u)) + 0.5) / len(u)).abs().max()
    assert uneven < 2 / len(u)
    assert ((u > 0) & (u < 1)).all()


def test_a_short_block_is_the_beginning_of_a_long_one() -> None:
    for stream in Stream:
        key = Key(0, stream, 1, 1)
        assert torch.equal(uniforms(key, 10, 5), uniforms(key, 100, 5)[:10])


@pytest.mark.parametrize("kind", ["gaussian", "cube", "ball", "sphere"])
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 32])
def test_every_point_of_an_orbit_has_the_law_of_the_source(kind: str, dim: int) -> None:
    """Moments of each coordinate and of the radius, at every one of the T places of an orbit by itself."""
    source = as_source(kind, dim)
    orbit = Orbit(dim, source.symmetry, 0)
    blocks = range(5)
    draws = torch.cat([source.centred(Key(1, Stream.CHECK, 0, b), BLOCK) for b in blocks])
    points = source.place(orbit.of(draws, orbit.axes()).points())
    plain = torch.cat([source.draw(Key(2, Stream.CHECK, 0, b), BLOCK) for b in blocks])
    places = points.reshape(len(plain), orbit.size, dim)
    assert orbit.size == {1: 2, 2: 4, 3: 4, 5: 8, 32: 32}[dim]
    for power in (1, 2, 4):
        assert_same_mean(places**power, plain**power)
    assert_same_mean(places.norm(dim=-1, keepdim=True) ** 3, plain.norm(dim=-1, keepdim=True) ** 3)


def assert_same_mean(places: Tensor, plain: Tensor) -> None:
    """At every place (m, T, k) the mean of m plain samples (m, k), within 6 standard errors."""
    error = plain.std(0) / len(plain) ** 0.5
    assert ((places.mean(0) - plain.mean(0)).abs() <= 6 * error + 1e-9).all()


@pytest.mark.parametrize("kind", ["gaussian", "sphere"])
def test_points_of_an_orbit_are_orthogonal_or_opposite_in_the_mean(kind: str) -> None:
    source = as_source(kind, 16)
    orbit = Orbit(16, source.symmetry, 0)
    draws = source.centred(Key(1, Stream.CHECK, 0, 0), 4096)
    x = source.place(orbit.of(draws, orbit.axes()).points()).reshape(4096, orbit.size, 16)
    assert torch.allclose(x.norm(dim=2), x.norm(dim=2)[:, :1])
    gram = (x @ x.transpose(1, 2)).mean(0) / x.square().sum(2).mean()
    expected = torch.eye(16, dtype=torch.float64)
    expected = torch.cat([torch.cat([expected, -expected]), torch.cat([-expected, expected])], 1)
    assert torch.allclose(gram, expected, atol=0.05)


def test_an_orbit_costs_a_fraction_of_plain_samples() -> None:
    assert Orbit(8, "none", 0).work == 1
    assert Orbit(32, "rotations", 0).work == pytest.approx((64 + 64 + 128) / 32 / 69)
    assert 1 > Orbit(1, "signs", 0).work > Orbit(2, "signs", 0).work > Orbit(8, "signs", 0).work


def test_many_dimensions_fall_back_to_independent_points() -> None:
    assert uniforms(Key(0, Stream.STEP, 0, 0), 4, 30_000).shape == (4, 30_000)


def test_steps_are_independent_nets() -> None:
    """Errors of different steps average out like independent ones, and each is far below that of plain draws."""
    error = np.array(
        [float((uniforms(Key(0, Stream.STEP, s, 0), 64, 2) ** 2).prod(1).mean()) - 1 / 9 for s in range(512)]
    )
    assert error.std() < 0.3 * np.sqrt((1 / 25 - 1 / 81) / 64)
    assert error.reshape(32, 16).mean(axis=1).std() == pytest.approx(error.std() / 4, rel=0.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_source("gausian", 3), "unknown source 'gausian'; choose one of gaussian, cube, ball, sphere"),
        (lambda: as_source(distot.Gaussian(dim=4), 3), "the source has dimension 4 and the latents have dimension 3"),
        (lambda: as_source(ROWS[:, :2], 3), "the source has dimension 2 and the latents have dimension 3"),
        (lambda: as_source(np.array([[1.0, np.nan]]), 2), "1 rows with NaN or Inf, the first is row 0"),
        (lambda: as_source(np.zeros(5), 1), r"shape \(n, d\)"),
        (lambda: as_source(np.zeros((0, 2)), 2), "n >= 1"),
        (lambda: distot.Gaussian(), "do not name one dimension"),
        (lambda: distot.Gaussian(np.zeros(3), np.ones(4)), "do not name one dimension"),
        (lambda: distot.Gaussian(np.zeros(2), [[1.0, 0.0], [0.5, 1.0]]), "not symmetric"),
        (lambda: distot.Gaussian(np.zeros(2), [[1.0, 2.0], [2.0, 1.0]]), "not positive semi-definite"),
        (lambda: distot.Gaussian(np.zeros(2), -1.0), "variances must be positive"),
        (lambda: distot.Gaussian([0.0, np.inf]), "must be finite"),
        (lambda: distot.Cube(2, 1.0, 1.0), "low 1.0 must be below high 1.0"),
        (lambda: distot.Ball(2, 0.0), "radius must be positive"),
        (lambda: distot.Sphere(2, 1.0, [0.0]), "centre must be finite"),
        (lambda: distot.Cube(0), "dimension of at least 1"),
    ],
)
def test_bad_sources(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("sample", "message"),
    [(lambda g, n: g.random((n, 2)), r"shape \(8, 2\) where \(8, 3\)"), (lambda g, n: np.full((n, 3), np.nan), "NaN")],
)
def test_bad_samplers(sample, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        Sampler(sample, 3).draw(Key(0, Stream.STEP, 0, 0), 8)
