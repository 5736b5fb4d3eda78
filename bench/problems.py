"""Problems that benchmarks share: a source, and latents of unit mean variance, so that peers' defaults start fairly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from jobs.patches import patches

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One line of a table. ``latents()`` are those of ``build``, scaled; without ``mass`` all have the same."""

    name: str
    build: Callable[[], NDArray[Any]]
    source: str = "gaussian"
    mass: Callable[[], Array] | None = None

    def latents(self) -> Array:
        y = np.asarray(self.build(), dtype=np.float64)
        return (y - y.mean(axis=0)) / np.sqrt(y.var(axis=0).mean())

    def source_of(self, dim: int) -> str | Array:
        """What ``distot.solve`` takes as source; "array" is a mixture of two normal clouds."""
        return mixture(dim) if self.source == "array" else self.source


def gamma(n: int, shape: float) -> Array:
    """Masses of a gamma law; half of those of shape 1 are below 0.7 of the mean, a hundredth below 0.01."""
    found = np.random.default_rng(6).gamma(shape, size=n)
    return found / found.sum()


def lognormal(n: int, width: float) -> Array:
    found = np.exp(width * np.random.default_rng(7).standard_normal(n))
    return found / found.sum()


def mixture(dim: int) -> Array:
    generator = np.random.default_rng(11)
    wide, narrow = generator.standard_normal((20_000, dim)), generator.standard_normal((10_000, dim))
    return np.concatenate([wide, 0.3 * narrow + 2])


def normal(n: int, dim: int) -> Array:
    """Variances of the axes from 0.04 to 4."""
    return np.random.default_rng(n + dim).standard_normal((n, dim)) * np.linspace(0.2, 2, dim)


def student(n: int, dim: int = 10, freedom: float = 3) -> Array:
    generator = np.random.default_rng(1)
    return generator.standard_normal((n, dim)) / np.sqrt(generator.chisquare(freedom, (n, 1)) / freedom)


def clusters(n: int, dim: int = 48, count: int = 40) -> Array:
    """Clusters whose masses follow a power law, of very different widths."""
    generator = np.random.default_rng(2)
    mass = np.arange(1, count + 1) ** -1.2
    label = generator.choice(count, n, p=mass / mass.sum())
    centres, widths = 3 * generator.standard_normal((count, dim)), 0.5 * np.exp(generator.normal(0, 0.7, count))
    return centres[label] + widths[label, None] * generator.standard_normal((n, dim))


def manifold(n: int, dim: int = 64) -> Array:
    """A curved surface of two parameters, slightly noisy."""
    generator = np.random.default_rng(3)
    place = generator.uniform(-1, 1, (n, 2))
    waves, phases = 2 * generator.standard_normal((2, dim)), generator.uniform(0, 2 * np.pi, dim)
    return np.sin(place @ waves + phases) + 0.01 * generator.standard_normal((n, dim))


def grid(n: int) -> Array:
    """25 narrow Gaussians in the plane."""
    generator = np.random.default_rng(4)
    centres = 2.0 * np.stack(np.meshgrid(range(-2, 3), range(-2, 3)), axis=-1).reshape(-1, 2)
    return centres[generator.integers(0, 25, n)] + 0.05 * generator.standard_normal((n, 2))


def far_atom(n: int, dim: int = 16) -> Array:
    """A normal cloud and one atom a thousand widths away."""
    y = np.random.default_rng(5).standard_normal((n, dim))
    y[0] = 1000
    return y


def digits() -> Array:
    return load_digits().data


def cases(n: int) -> list[Case]:
    """All problems; n is the size of those that could have any."""
    gaussian = [
        Case("patches, d = 8", partial(patches, n, 8)),
        Case("patches, d = 32", partial(patches, n, 32)),
        Case("patches, d = 192", partial(patches, n, 192)),
        Case("patches, whitened, d = 8", partial(patches, n, 8, whiten=True)),
        Case("patches, whitened, d = 32", partial(patches, n, 32, whiten=True)),
        Case("patches, whitened, d = 192", partial(patches, n, 192, whiten=True)),
        Case("digits, d = 64", digits),
        Case("Student t, d = 10", partial(student, n)),
        Case("power-law clusters, d = 48", partial(clusters, n)),
        Case("curved surface, d = 64", partial(manifold, n)),
        Case("25 Gaussians, d = 2", partial(grid, n)),
        Case("one far atom, d = 16", partial(far_atom, n)),
        Case("normal, N = 100, d = 3", partial(normal, 100, 3)),
    ]
    sources = ("cube", "ball", "sphere", "array")
    others = [Case(f"patches, d = 8, {s}", partial(patches, n, 8), s) for s in sources]
    others += [Case(f"power-law clusters, d = 48, {s}", partial(clusters, n), s) for s in sources]
    others += [Case(f"normal, d = 3, {s}", partial(normal, n, 3), s) for s in sources]
    others += [Case(f"25 Gaussians, d = 2, {s}", partial(grid, n), s) for s in ("cube", "ball", "array")]
    others += [Case(f"one far atom, d = 16, {s}", partial(far_atom, n), s) for s in ("cube", "array")]
    uneven = [
        Case("normal, d = 2, gamma masses", partial(normal, n, 2), mass=partial(gamma, n, 2)),
        Case("normal, d = 16, exponential masses", partial(normal, n, 16), mass=partial(gamma, n, 1)),
        Case("patches, d = 32, lognormal masses", partial(patches, n, 32), mass=partial(lognormal, n, 1)),
        Case("25 Gaussians, d = 2, exponential masses", partial(grid, n), mass=partial(gamma, n, 1)),
    ]
    return gaussian + others + uneven
