"""What users bring: rows of an array, a function that draws; and two sources side by side.

Legend: n samples or rows, d dimension.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distot.environment import callers
from distot.errors import InputError
from distot.given import array, numbers
from distot.power import Array
from distot.source.base import BLOCK, Key, Source, Spec, Stream
from distot.source.shapes import Cube, Gaussian


class Samples(Source):
    """The empirical distribution of an array (n, d): rows are drawn with equal probability."""

    kind = "samples"

    def __init__(self, rows: ArrayLike) -> None:
        r = array(rows, "the array of the source")
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
    SHOWN = 4  # samples that are stored with what was drawn from this source

    def __init__(self, sample: Sample, dim: int) -> None:
        super().__init__(dim)
        self.sample = sample

    @property
    def columns(self) -> None:
        return None

    def centred(self, key: Key, n: int) -> Tensor:
        x = numbers(self.sample(key.generator(), n), "what the sampler gave")
        if x.shape != (n, self.dim):
            raise InputError(f"the sampler gave an array of shape {x.shape} where ({n}, {self.dim}) was asked for")
        if not np.isfinite(x).all():
            raise InputError("the sampler gave NaN or Inf; a source must be finite")
        return torch.from_numpy(x)

    def moments(self, seed: int) -> tuple[Array, Array]:
        keys = [Key(seed, Stream.MOMENTS, 0, block) for block in range(self.MOMENT_BLOCKS)]
        return _moments(torch.cat([self.draw(key, BLOCK) for key in keys]).numpy())

    def __getstate__(self) -> dict[str, Any]:
        """Raises InputError for a function that a pickle cannot name, unless it takes code as well."""
        try:
            pickle.dumps(self.sample)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            if not any(callers("cloudpickle")):
                raise InputError(
                    f"the source {self.sample!r} cannot be handed to another process ({error}); define it at the top "
                    "of a module, as a function or a class"
                ) from error
        return self.__dict__

    def __deepcopy__(self, memo: object) -> Sampler:
        return self

    def spec(self) -> tuple[Spec, dict[str, NDArray[Any]]]:
        name = getattr(self.sample, "__qualname__", type(self.sample).__name__)
        drawn = self.centred(Key(0, Stream.MOMENTS, 0, 0), BLOCK)[: self.SHOWN].numpy()  # tells it from others
        return {"kind": self.kind, "dim": self.dim, "name": name}, {"drawn": drawn}


class Product(Source):
    """Two independent sources side by side: the first coordinates are of ``first``, the others of ``second``."""

    kind = "product"

    def __init__(self, first: Source, second: Source) -> None:
        super().__init__(first.dim + second.dim)
        self.first, self.second = first, second
        if _normal(first) and _normal(second):
            self.symmetry = "rotations"
        elif isinstance(first, Cube) and isinstance(second, Cube) and first.edge == second.edge:
            self.symmetry = "signs"  # of coordinates that may change places

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
        return torch.cat([self.first.place(z[..., : self.first.dim]), self.second.place(z[..., self.first.dim :])], -1)

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
