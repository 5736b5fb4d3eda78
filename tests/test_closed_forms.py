"""Problems whose solution is known: heights, cells and costs agree with it, up to a constant and the sampling error."""

from __future__ import annotations

import itertools

import numpy as np
import ot
import pytest
from numpy.typing import NDArray
from scipy import stats

import distot
from distot.power import heights_to_weights, weights_to_heights

Array = NDArray[np.float64]
SAMPLES = 30_000


def solve(latents: Array, source: object = "gaussian", mass: Array | None = None, samples: int = SAMPLES) -> Array:
    return distot.solve(latents, source, mass, until_chi2=None, max_samples=samples, progress=False).heights


def flat(heights: Array) -> Array:
    return heights - heights.mean()


CUBE = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
SIMPLEX = np.eye(4) - 0.25
CROSS = np.concatenate([np.eye(5), -np.eye(5)])


class TestLine:
    """In one dimension the cells are the quantile intervals of the masses."""

    @pytest.mark.parametrize(
        ("source", "law"),
        [
            ("gaussian", stats.norm()),
            (distot.Gaussian([3.0], [4.0]), stats.norm(3, 2)),
            ("cube", stats.uniform()),
            (distot.Ball(1, 2.0, [1.0]), stats.uniform(-1, 4)),
        ],
        ids=["gaussian", "moved gaussian", "cube", "ball"],
    )
    def test_cell_edges_are_quantiles(self, source: object, law: stats.rv_continuous) -> None:
        generator = np.random.default_rng(1)
        y = np.sort(generator.exponential(size=12))
        mass = generator.dirichlet(np.full(12, 5.0))
        order = generator.permutation(12)
        found = distot.solve(y[order, None], source, mass[order], progress=False)
        h = found.heights[np.argsort(order)]
        edges = -np.diff(h) / np.diff(y)
        assert np.abs(law.cdf(edges) - np.cumsum(mass)[:-1]).max() < 1e-12
        assert (found.reason, found.samples) == ("exact", 0)
        assert abs(found.certificate.chi2) < 4 * found.certificate.chi2_error
        assert abs(found.certificate.mismatch) < 4 * found.certificate.mismatch_error + 1e-6

    def test_of_a_source_without_a_formula_by_sampling(self) -> None:
        """An array's rows, or what a user's function draws."""
        y = np.sort(np.random.default_rng(1).exponential(size=12))
        with pytest.warns(distot.DistotWarning, match="on a line sampling gets slower"):
            found = distot.solve(
                y[:, None], lambda random, n: random.standard_normal((n, 1)), until_chi2=0.001, progress=False
            )
        edges = -np.diff(found.heights) / np.diff(y)
        assert found.reason == "until_chi2"
        assert np.abs(stats.norm.cdf(edges) - np.arange(1, 12) / 12).max() < 0.01

    def test_crowded_latents_are_no_matter(self) -> None:
        """Cubed normals, many of which are closer than a float32 tells: the heights are exact all the same."""
        y = np.random.default_rng(0).standard_normal(300) ** 3
        found = distot.solve(y[:, None], progress=False)
        order = np.argsort(y)
        edges = -np.diff(found.heights[order]) / np.diff(y[order])
        assert np.abs(np.diff(stats.norm.cdf(edges)) * 300 - 1).max() < 1e-4

    def test_order_of_the_latents_does_not_matter(self) -> None:
        y = np.random.default_rng(2).standard_normal(9)
        order = np.argsort(y)
        assert np.allclose(flat(solve(y[:, None]))[order], flat(solve(y[order][:, None])), atol=1e-9)


class TestTwoAtoms:
    """The cells are half spaces: h_0 - h_1 puts the plane at the quantile of the mass."""

    @pytest.mark.parametrize("mass", [0.5, 0.1, 0.97])
    @pytest.mark.parametrize("dim", [1, 7])
    def test_plane_is_at_the_quantile(self, mass: float, dim: int) -> None:
        y = np.zeros((2, dim))
        y[1, 0], y[1, -1] = 3.0, 4.0 if dim > 1 else 3.0
        distance = float(np.linalg.norm(y[1]))
        h = solve(y, "gaussian", np.array([mass, 1 - mass]), samples=50_000)
        assert (h[0] - h[1]) / distance == pytest.approx(stats.norm.ppf(mass), abs=0.03)


class TestSymmetry:
    """Corners of a regular body around the source's centre have equal heights."""

    @pytest.mark.parametrize("corners", [CUBE, SIMPLEX, CROSS], ids=["cube", "simplex", "cross"])
    @pytest.mark.parametrize("source", ["gaussian", "ball", "sphere"])
    def test_equal_heights(self, corners: Array, source: str) -> None:
        assert np.abs(flat(solve(corners, source))).max() < 0.03 * np.linalg.norm(corners[0])

    def test_cube_in_a_cube(self) -> None:
        assert np.abs(flat(solve(CUBE, distot.Cube(3, -2.0, 2.0)))).max() < 0.05

    def test_moved_target_keeps_its_heights(self) -> None:
        assert np.abs(flat(solve(CUBE + np.array([100.0, -50.0, 7.0])))).max() < 0.05

    def test_moved_source_tilts_the_heights(self) -> None:
        """x = m + z: <x, y> + h is as for z when h = -<m, y> + constant."""
        m = np.array([10.0, -20.0, 5.0])
        assert np.allclose(flat(solve(CUBE, distot.Gaussian(m))), flat(-CUBE @ m), atol=0.05)

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_heights_scale_with_the_target(self, scale: float) -> None:
        y = np.random.default_rng(3).standard_normal((20, 3))
        assert np.allclose(solve(y * scale) / scale, solve(y), atol=1e-3)

    def test_anisotropic_gaussian(self) -> None:
        """N(0, L L^T) against L^-T s is N(0, I) against s."""
        root = np.array([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-0.3, 0.2, 0.1]])
        source = distot.Gaussian(np.zeros(3), root @ root.T)
        assert np.abs(flat(solve(CUBE @ np.linalg.inv(root), source))).max() < 0.05

    def test_anisotropic_gaussian_far_from_the_origin(self) -> None:
        root = np.diag([3.0, 1.0, 0.2])
        m = np.array([1e3, 1e3, -1e3])
        y = CUBE @ np.linalg.inv(root) + 1e4
        h = solve(y, distot.Gaussian(m, root @ root.T))
        assert np.allclose(flat(h), flat(-y @ m), atol=0.05)


class TestGaussianToGaussian:
    def test_cost_is_near_the_bures_distance(self) -> None:
        """W2² between N(0, I) and many samples of N(m, S) is near |m|² + tr(I + S - 2 S^½), from above."""
        deviations = np.array([0.5, 2.0])
        y = np.random.default_rng(0).standard_normal((2000, 2)) * deviations + [1.0, -1.0]
        solution = distot.solve(y, until_chi2=None, max_samples=60_000, progress=False)
        bures = 2.0 + float(((1 - deviations) ** 2).sum())
        assert solution.certificate.w2_squared_bound == pytest.approx(bures, rel=0.1)


class TestAgainstOtherTools:
    def test_conversion_is_exact(self) -> None:
        generator = np.random.default_rng(0)
        y, h = generator.standard_normal((30, 4)), generator.standard_normal(30)
        x = generator.standard_normal((500, 4))
        w = heights_to_weights(h, y)
        distance = ((x[:, None] - y) ** 2).sum(axis=2)
        assert np.array_equal((x @ y.T + h).argmax(axis=1), (distance - w).argmin(axis=1))
        assert np.allclose(weights_to_heights(w, y), h)

    def test_potential_of_pot(self) -> None:
        """POT's solver, fed from the same source for long, finds our potential, math (7)."""
        y = np.random.default_rng(4).standard_normal((8, 2))
        generator = np.random.default_rng(5)
        g = ot.semidiscrete.solve_semidiscrete(
            y, sampler_source=lambda n: generator.standard_normal((n, 2)), max_iter=5_000, batch_size=64
        )
        ours = heights_to_weights(solve(y), y)
        assert np.allclose(flat(np.asarray(g)), flat(ours), atol=0.1)

    @pytest.mark.filterwarnings("ignore:on a line sampling gets slower")
    @pytest.mark.parametrize("dim", [1, 3])
    def test_interval_holds_the_exact_discrete_cost(self, dim: int) -> None:
        """An array of samples as source makes the problem discrete: POT's network simplex solves it exactly."""
        generator = np.random.default_rng(dim)
        x, y = generator.standard_normal((400, dim)), generator.standard_normal((25, dim)) + 0.5
        mass = generator.dirichlet(np.full(25, 4.0))
        exact = ot.emd2(np.full(400, 1 / 400), mass, ot.dist(x, y))
        solution = distot.solve(
            y, x, mass, until_chi2=None, max_samples=60_000, certificate_samples=100_000, progress=False
        )
        found = solution.certificate
        assert found.w2_squared_limit <= exact
        assert found.w2_squared_bound == pytest.approx(exact, abs=4 * found.w2_squared_bound_error + 0.005 * exact)
