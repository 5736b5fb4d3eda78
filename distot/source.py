"""Sources: what the mass is moved from. Samples are a function of a key (seed, stream, step, block) alone.

A source turns uniform numbers into samples, so every one of them can be drawn either independently
(estimators with error bars) or as scrambled Sobol points (the solver's steps, where evenly spread points
carry less noise). Legend: n samples, d dimension. All values are float64 in the user's units.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.quasirandom import SobolEngine

from distot.errors import InputError
from distot.orbit import Symmetry
from distot.power import Array

BLOCK = 4096
"""Samples in one block of a stream; part of the definition of a stream, so never changed lightly."""

Spec = dict[str, Any]


class Stream(enum.IntEnum):
    """Independent sample streams of one seed. Only STEP and START are evenly spread (Sobol)."""

    START = 1
    STEP = 2
    CHECK = 3
    CERTIFY = 4
    MOMENTS = 5
    CELLS = 6
    GENERATE = 7
    PAIRS = 8


class Key(NamedTuple):
    """Names one block of samples."""

    seed: int
    stream: Stream
    step: int
    block: int
    first: int = 0  # points of the step before this block, where points are evenly spread over the step

    def generator(self) -> np.random.Generator:
        """A counter-based generator of this block's own."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(self.stream, self.step, self.block))
        return np.random.Generator(np.random.Philox(sequence))


def uniforms(key: Key, n: int, columns: int) -> Tensor:
    """Numbers in the open unit interval (n, columns), evenly spread over a step for START and STEP."""
    if key.stream in (Stream.START, Stream.STEP) and columns <= SobolEngine.MAXDIM:
        engine = _sobol(key.seed, key.stream, key.step, columns).reset()
        if key.first:  # engine.fast_forward would take the points one by one
            last, engine.num_generated = key.first - 1, key.first
            for bit in range(last.bit_length()):
                if (last ^ last >> 1) >> bit & 1:
                    engine.quasi ^= engine.sobolstate[:, bit]
        return engine.draw(n, dtype=torch.float64) + 0.5 * 2.0**-SobolEngine.MAXBIT
    u = key.generator().random((n, columns))
    return torch.from_numpy(np.maximum(u, 2.0**-54))


@lru_cache(maxsize=1)
def _sobol(seed: int, stream: Stream, step: int, columns: int) -> SobolEngine:
    """The scrambled points of a step, from the first one on."""
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, step))
    scramble = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
    return SobolEngine(columns, scramble=True, seed=scramble)


class Source(ABC):
    """A probability on R^d that can be sampled: ``place``, an affine map, of a variable that has a ``symmetry``.

    A source implements ``shaped`` with the number of its ``columns``, or ``centred`` itself.
    """

    kind: ClassVar[str]
    symmetry: Symmetry = "none"

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise InputError(f"a source needs a dimension of at least 1, not {dim}")
        self.dim = dim

    @property
    def columns(self) -> int | None:
        """Uniform numbers that a sample takes; None if it is not made of such."""
        return self.dim

    def shaped(self, u: Tensor) -> Tensor:
        """The variable about zero (n, d) float64 from uniform numbers (n, columns)."""
        raise NotImplementedError

    def centred(self, key: Key, n: int) -> Tensor:
        """The variable about zero (n, d) float64 of the block named by ``key``; all rotations, or all sign flips of
        its coordinates, keep its law if ``symmetry`` says so."""
        assert self.columns is not None
        return self.shaped(uniforms(key, n, self.columns))

    def place(self, z: Tensor) -> Tensor:
        """Samples (n, d) in user units from the variable about zero."""
        return z

    def draw(self, key: Key, n: int) -> Tensor:
        """Samples (n, d) float64 of the block named by ``key``."""
        return self.place(self.centred(key, n))

    def quantiles(self, p: Tensor) -> Tensor | None:
        """Where the shares p (n,) of the mass of a source on a line lie below, (n,) in user units; None if that has no
        formula, or there are more dimensions."""
        return None

    @abstractmethod
    def moments(self, seed: int) -> tuple[Array, Array]:
        """Mean (d,) and covariance (d, d); exact where known, else from samples of the MOMENTS stream."""

    @abstractmethod
    def spec(self) -> tuple[Spec, dict[str, NDArray[Any]]]:
        """What ``from_spec`` needs to rebuild this source: plain values, and arrays."""


class Gaussian(Source):
    """Normal distribution. ``mean``: scalar or (d,). ``cov``: scalar, (d,) variances or (d, d) matrix."""

    kind = "gaussian"
    symmetry = "rotations"

    def __init__(self, mean: ArrayLike = 0.0, cov: ArrayLike = 1.0, dim: int | None = None) -> None:
        m, c = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
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
        self.low, self.high = float(low), float(high)

    def shaped(self, u: Tensor) -> Tensor:
        return (self.high - self.low) * (u - 0.5)

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
        c = np.asarray(centre, dtype=np.float64)
        if c.shape not in ((), (dim,)) or not np.isfinite(c).all():
            raise InputError(f"{type(self).__name__}: centre must be finite, a scalar or ({dim},), not {c.shape}")
        if not (np.isfinite(radius) and radius > 0):
            raise InputError(f"{type(self).__name__}: radius must be positive, not {radius}")
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


class Samples(Source):
    """The empirical distribution of an array (n, d): rows are drawn with equal probability."""

    kind = "samples"

    def __init__(self, rows: ArrayLike) -> None:
        r = np.asarray(rows)
        if r.ndim != 2 or r.shape[0] < 1 or not np.issubdtype(r.dtype, np.number) or np.iscomplexobj(r):
            raise InputError(f"an array source must be real and of shape (n, d) with n >= 1, not {r.dtype} {r.shape}")
        bad = ~np.isfinite(r).all(axis=1)
        if bad.any():
            raise InputError(
                f"the array source has {int(bad.sum()):,} rows with NaN or Inf, the first is row "
                f"{int(bad.argmax()):,}; remove or mend them"
            )
        super().__init__(int(r.shape[1]))
        self.rows = r

    @property
    def columns(self) -> int:
        return 1

    def shaped(self, u: Tensor) -> Tensor:
        index = (u[:, 0] * len(self.rows)).long().clamp_max(len(self.rows) - 1)
        return torch.from_numpy(self.rows[index.numpy()].astype(np.float64))

    def moments(self, seed: int) -> tuple[Array, Array]:
        return _moments(self.rows)

    def spec(self) -> tuple[Spec, dict[str, NDArray[Any]]]:
        return {"kind": self.kind, "dim": self.dim}, {"rows": self.rows}


Sample = Callable[[np.random.Generator, int], ArrayLike]


class Sampler(Source):
    """A user's own source: ``sample(generator, n) -> (n, d)``, which must use that generator alone."""

    kind = "sampler"
    MOMENT_BLOCKS = 16

    def __init__(self, sample: Sample, dim: int) -> None:
        super().__init__(dim)
        self.sample = sample

    @property
    def columns(self) -> None:
        return None

    def centred(self, key: Key, n: int) -> Tensor:
        x = np.asarray(self.sample(key.generator(), n), dtype=np.float64)
        if x.shape != (n, self.dim):
            raise InputError(f"the sampler gave an array of shape {x.shape} where ({n}, {self.dim}) was asked for")
        if not np.isfinite(x).all():
            raise InputError("the sampler gave NaN or Inf; a source must be finite")
        return torch.from_numpy(x)

    def moments(self, seed: int) -> tuple[Array, Array]:
        keys = [Key(seed, Stream.MOMENTS, 0, block) for block in range(self.MOMENT_BLOCKS)]
        return _moments(torch.cat([self.draw(key, BLOCK) for key in keys]).numpy())

    def spec(self) -> tuple[Spec, dict[str, NDArray[Any]]]:
        name = getattr(self.sample, "__qualname__", type(self.sample).__name__)
        return {"kind": self.kind, "dim": self.dim, "name": name}, {}


class Product(Source):
    """Two independent sources side by side: the first coordinates are of ``first``, the others of ``second``."""

    kind = "product"

    def __init__(self, first: Source, second: Source) -> None:
        super().__init__(first.dim + second.dim)
        self.first, self.second = first, second
        if first.symmetry != "none" and second.symmetry != "none":  # rotations flip signs, too
            self.symmetry = "rotations" if _normal(first) and _normal(second) else "signs"

    @property
    def columns(self) -> int | None:
        a, b = self.first.columns, self.second.columns
        return None if a is None or b is None else a + b

    def shaped(self, u: Tensor) -> Tensor:
        own = self.first.columns
        assert own is not None
        return torch.cat([self.first.shaped(u[:, :own]), self.second.shaped(u[:, own:])], dim=1)

    def centred(self, key: Key, n: int) -> Tensor:
        if self.columns is not None:
            return super().centred(key, n)
        other = int(np.random.SeedSequence(key.seed, spawn_key=(1,)).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.cat([self.first.centred(key, n), self.second.centred(key._replace(seed=other), n)], 1)

    def place(self, z: Tensor) -> Tensor:
        return torch.cat([self.first.place(z[:, : self.first.dim]), self.second.place(z[:, self.first.dim :])], 1)

    def moments(self, seed: int) -> tuple[Array, Array]:
        (mean, cov), (other_mean, other_cov) = self.first.moments(seed), self.second.moments(seed)
        d = self.first.dim
        whole = np.zeros((self.dim, self.dim))
        whole[:d, :d], whole[d:, d:] = cov, other_cov
        return np.concatenate([mean, other_mean]), whole

    def spec(self) -> tuple[Spec, dict[str, NDArray[Any]]]:
        spec: Spec = {"kind": self.kind, "dim": self.dim}
        arrays: dict[str, NDArray[Any]] = {}
        for name, source in (("first", self.first), ("second", self.second)):
            spec[name], its = source.spec()
            arrays |= {f"{name}-{key}": values for key, values in its.items()}
        return spec, arrays


def _normal(source: Source) -> bool:
    """Whether the variable about zero is a standard normal one, so that two of them together are one again."""
    return isinstance(source, Gaussian) or (isinstance(source, Product) and source.symmetry == "rotations")


def _moments(rows: NDArray[Any]) -> tuple[Array, Array]:
    """Mean and covariance of rows (n, d), block by block in float64."""
    blocks = [slice(a, a + 65536) for a in range(0, len(rows), 65536)]
    mean = sum((rows[b].astype(np.float64).sum(axis=0) for b in blocks), np.zeros(rows.shape[1])) / len(rows)
    cov = np.zeros((rows.shape[1], rows.shape[1]))
    for b in blocks:
        centred = rows[b].astype(np.float64) - mean
        cov += centred.T @ centred
    return mean, cov / len(rows)


def as_source(source: object, dim: int) -> Source:
    """A Source of dimension ``dim`` from a name, a Source, an array (n, d) or a callable.

    Names: "gaussian" N(0, I), "cube" [0, 1]^d, "ball" and "sphere" of radius 1.

    Raises InputError for an unknown name or a dimension other than ``dim``.
    """
    named: dict[str, Callable[[], Source]] = {
        "gaussian": lambda: Gaussian(dim=dim),
        "cube": lambda: Cube(dim),
        "ball": lambda: Ball(dim),
        "sphere": lambda: Sphere(dim),
    }
    if isinstance(source, str):
        if source not in named:
            raise InputError(f"unknown source {source!r}; choose one of {', '.join(named)}, an array or a callable")
        return named[source]()
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, Source):
        found = source
    elif callable(source):
        found = Sampler(source, dim)
    else:
        found = Samples(np.asarray(source))
    if found.dim != dim:
        raise InputError(
            f"the source has dimension {found.dim} and the latents have dimension {dim}; "
            "they must live in the same space"
        )
    return found


def from_spec(spec: Spec, arrays: dict[str, NDArray[Any]]) -> Source:
    """The inverse of ``Source.spec``. Raises InputError for a user's sampler, which is code, not data."""
    kind, values = spec["kind"], {k: v for k, v in spec.items() if k != "kind"}
    if kind == "sampler":
        raise InputError(
            f"this run draws from the sampler {spec.get('name')!r}, which cannot be stored; "
            "go on from Python: distot.resume(run, source=your_sampler)"
        )
    if kind == "samples":
        return Samples(arrays["rows"])
    if kind == "product":
        parts = ("first", "second")
        its = [{k.removeprefix(f"{p}-"): v for k, v in arrays.items() if k.startswith(f"{p}-")} for p in parts]
        return Product(*(from_spec(spec[part], own) for part, own in zip(parts, its, strict=True)))
    kinds: dict[str, Callable[..., Source]] = {s.kind: s for s in (Gaussian, Cube, Ball, Sphere)}
    return kinds[kind](**values, **arrays)
