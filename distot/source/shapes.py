"""Densities with a formula. Legend: n samples, d dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distot.errors import InputError
from distot.given import numbers
from distot.power import Array
from distot.source.base import Source, Spec

LARGEST = 1e150  # of a coordinate: squares of larger ones are no numbers any more


def _check_size(what: str, values: list[Any]) -> None:
    """Raises InputError for values that cannot be squared."""
    if (largest := float(np.abs(values).max())) > LARGEST:
        raise InputError(f"{what} may be {LARGEST:.0e} at most, not {largest:.3g}; measure in larger units")


class Gaussian(Source):
    """Normal distribution. ``mean``: scalar or (d,). ``cov``: scalar, (d,) variances or (d, d) matrix."""

    kind = "gaussian"
    symmetry = "rotations"

    def __init__(self, mean: ArrayLike = 0.0, cov: ArrayLike = 1.0, dim: int | None = None) -> None:
        m, c = numbers(mean, "the mean"), numbers(cov, "the covariance")
        sizes = {int(a.shape[0]) for a in (m, c) if a.ndim}
        if dim is not None:
            sizes.add(dim)
        if len(sizes) != 1:
            raise InputError(
                f"Gaussian: mean {m.shape}, cov {c.shape} and dim {dim} do not name one dimension; "
                "give a mean of shape (d,), a cov of shape (d,) or (d, d), or dim=d"
            )
        super().__init__(sizes.pop())
        if m.ndim > 1 or c.ndim > 2 or (c.ndim == 2 and c.shape[0] != c.shape[1]):
            raise InputError(f"Gaussian: mean {m.shape} must be (d,), cov {c.shape} (d,) or (d, d)")
        if not (np.isfinite(m).all() and np.isfinite(c).all()):
            raise InputError("Gaussian: mean and cov must be finite")
        _check_size("Gaussian: mean and standard deviations", [*np.atleast_1d(m), *np.sqrt(np.abs(c)).ravel()])
        self.mean = np.broadcast_to(m, (self.dim,)).copy()
        self.cov = c.copy()
        self._root = self._square_root()

    def _square_root(self) -> Tensor:
        if self.cov.ndim < 2:
            if (self.cov <= 0).any():
                raise InputError(f"Gaussian: variances must be positive, the smallest is {self.cov.min()}")
            return torch.as_tensor(np.sqrt(self.cov), dtype=torch.float64)
        scale = float(np.abs(self.cov).max())
        if not np.allclose(self.cov, self.cov.T, rtol=0, atol=1e-8 * scale):
            raise InputError("Gaussian: cov is not symmetric; pass (cov + cov.T) / 2 if that is what you mean")
        values, vectors = np.linalg.eigh(self.cov)
        if values[0] < -1e-8 * scale or values[-1] <= 0:
            raise InputError(f"Gaussian: cov is not positive semi-definite, an eigenvalue is {values[0]:.3g}")
        return torch.from_numpy((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)

    def shaped(self, u: Tensor) -> Tensor:
        return torch.special.ndtri(u)

    def place(self, z: Tensor) -> Tensor:
        return torch.from_numpy(self.mean) + (z @ self._root if self._root.ndim == 2 else z * self._root)

    def quantiles(self, p: Tensor) -> Tensor | None:
        return self.place(torch.special.ndtri(p)[:, None])[:, 0] if self.dim == 1 else None

    def moments(self, seed: int) -> tuple[Array, Array]:
        cov = self.cov if self.cov.ndim == 2 else np.diag(np.broadcast_to(self.cov, (self.dim,)))
        return self.mean, cov.copy()

    def spec(self) -> tuple[Spec, dict[str, NDArray[Any]]]:
        return {"kind": self.kind, "dim": self.dim}, {"mean": self.mean, "cov": self.cov}


class Cube(Source):
    """Uniform on the box [low, high]^d."""

    kind = "cube"
    symmetry = "signs"

    def __init__(self, dim: int, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(dim)
        if not (np.isfinite([low, high]).all() and low < high):
            raise InputError(f"Cube: low {low} must be below high {high}, both finite")
        _check_size("Cube: low and high", [low, high])
        self.low, self.high = float(low), float(high)

    @property
    def edge(self) -> float:
        return self.high - self.low

    def shaped(self, u: Tensor) -> Tensor:
        return self.edge * (u - 0.5)

    def place(self, z: Tensor) -> Tensor:
        return z + 0.5 * (self.low + self.high)

    def quantiles(self, p: Tensor) -> Tensor | None:
        return self.low + (self.high - self.low) * p if self.dim == 1 else None

    def moments(self, seed: int) -> tuple[Array, Array]:
        side = self.high - self.low
        return np.full(self.dim, 0.5 * (self.low + self.high)), np.eye(self.dim) * side**2 / 12

    def spec(self) -> tuple[Spec, dict[str, NDArray[Any]]]:
        return {"kind": self.kind, "dim": self.dim, "low": self.low, "high": self.high}, {}


class Round(Source):
    """What ball and sphere share: a centre, a radius, and a uniform direction."""

    symmetry = "rotations"

    def __init__(self, dim: int, radius: float = 1.0, centre: ArrayLike = 0.0) -> None:
        super().__init__(dim)
        c = numbers(centre, "the centre")
        if c.shape not in ((), (dim,)) or not np.isfinite(c).all():
            raise InputError(f"{type(self).__name__}: centre must be finite, a scalar or ({dim},), not {c.shape}")
        if not (np.isfinite(radius) and radius > 0):
            raise InputError(f"{type(self).__name__}: radius must be positive, not {radius}")
        _check_size(f"{type(self).__name__}: radius and centre", [radius, *np.atleast_1d(c)])
        self.radius = float(radius)
        self.centre = np.broadcast_to(c, (dim,)).copy()

    def _directions(self, u: Tensor) -> Tensor:
        if self.dim == 1:
            return torch.where(u < 0.5, -1.0, 1.0).double()
        z = torch.special.ndtri(u)
        return z / z.norm(dim=1, keepdim=True)

    def place(self, z: Tensor) -> Tensor:
        return z + torch.from_numpy(self.centre)

    def spec(self) -> tuple[Spec, dict[str, NDArray[Any]]]:
        return {"kind": self.kind, "dim": self.dim, "radius": self.radius}, {"centre": self.centre}


class Ball(Round):
    """Uniform in the ball of a radius around a centre."""

    kind = "ball"

    @property
    def columns(self) -> int:
        return self.dim + 1

    def shaped(self, u: Tensor) -> Tensor:
        return self.radius * u[:, -1:] ** (1.0 / self.dim) * self._directions(u[:, :-1])

    def quantiles(self, p: Tensor) -> Tensor | None:
        return float(self.centre[0]) + self.radius * (2 * p - 1) if self.dim == 1 else None

    def moments(self, seed: int) -> tuple[Array, Array]:
        return self.centre, np.eye(self.dim) * self.radius**2 / (self.dim + 2)


class Sphere(Round):
    """Uniform on the sphere of a radius around a centre."""

    kind = "sphere"

    def shaped(self, u: Tensor) -> Tensor:
        return self.radius * self._directions(u)

    def moments(self, seed: int) -> tuple[Array, Array]:
        return self.centre, np.eye(self.dim) * self.radius**2 / self.dim
