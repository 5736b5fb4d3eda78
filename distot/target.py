"""The target: atoms of one process, in the frame, checked, with duplicates merged.

Legend: N latents as the user counts them, n distinct atoms of positive mass, d dimension.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.errors import InputError
from distot.power import Array, Frame

ROWS = 65536
"""Rows handled at a time; part of the definition of a fingerprint."""


class Fingerprint:
    """Content hash of latents, fed row blocks of any size; the same for the same rows, shape and dtype."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.total = hashlib.sha256(f"{tuple(int(n) for n in shape)} {dtype.newbyteorder('<').str}".encode())
        self.little = dtype.newbyteorder("<")
        self.block, self.filled = hashlib.sha256(), 0

    def update(self, rows: NDArray[Any]) -> None:
        rows = np.ascontiguousarray(rows, dtype=self.little)
        while len(rows):
            part, rows = rows[: ROWS - self.filled], rows[ROWS - self.filled :]
            self.block.update(part.data)
            self.filled += len(part)
            if self.filled == ROWS:
                self._close()

    def _close(self) -> None:
        self.total.update(self.block.digest())
        self.block, self.filled = hashlib.sha256(), 0

    def hexdigest(self) -> str:
        total = self.total.copy()
        total.update(self.block.digest())
        return total.hexdigest()


class Rows(Protocol):
    """Latents that can be read by row range: an array in memory or a store."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, rows: slice) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Target:
    """Distinct atoms of positive mass. Frozen; heights live in the solver's state."""

    atoms: Tensor  # (n, d) float32, in the frame
    mass: Array  # (n,) float64, sums to 1
    tilt: Array  # (n,) float64, <source_centre, y_i - target_centre>
    original: NDArray[np.int64]  # (n,) row of each atom among the N latents (the lowest, if merged)
    atom_of: NDArray[np.int64]  # (N,) atom of each latent, -1 where the mass is zero
    fingerprint: str
    notes: tuple[str, ...]

    @property
    def n(self) -> int:
        return self.atoms.shape[0]

    @property
    def dim(self) -> int:
        return self.atoms.shape[1]

    def moments(self) -> tuple[Array, Array]:
        """Mean (d,) and covariance (d, d) of the target in the frame, in float64."""
        mean = np.zeros(self.dim)
        second = np.zeros((self.dim, self.dim))
        for rows in blocks(self.n):
            y = self.atoms[rows].double().cpu().numpy()
            weighted = y * self.mass[rows, None]
            mean += weighted.sum(axis=0)
            second += weighted.T @ y
        return mean, second - np.outer(mean, mean)

    def replaced(self, atoms: Tensor, mass: Array) -> Target:
        """A coarser target in the same frame: other atoms (K, d) with their masses (K,), for the search alone."""
        index = np.arange(len(atoms))
        return Target(atoms, mass, np.zeros(len(atoms)), index, index, self.fingerprint, ())

    def spread(self, values: Array) -> Array:
        """Values of atoms (n,) -> values of the user's latents (N,); -inf where the mass is zero."""
        out = np.full(len(self.atom_of), -np.inf)
        kept = self.atom_of >= 0
        out[kept] = values[self.atom_of[kept]]
        return out


def blocks(n: int) -> Iterator[slice]:
    """Row ranges of at most ROWS that cover n rows."""
    return (slice(a, min(a + ROWS, n)) for a in range(0, n, ROWS))


def check_rows(rows: Rows) -> None:
    """Shape and dtype of latents. Raises InputError before anything is read."""
    if len(rows.shape) != 2:
        raise InputError(f"latents must have shape (N, d), not {tuple(rows.shape)}; flatten each latent to a row")
    n, d = rows.shape
    if n < 2 or d < 1:
        raise InputError(f"latents of shape {(n, d)} are too few: optimal transport needs N >= 2 points of d >= 1")
    if rows.dtype.kind not in "fiu":
        raise InputError(f"latents have dtype {rows.dtype}; give real numbers (float16, float32 or float64)")


def check_mass(mass: NDArray[Any] | None, n: int) -> tuple[Array, list[str]]:
    """Masses (N,) float64 summing to 1, and notes on what was done to them."""
    if mass is None:
        return np.full(n, 1.0 / n), []
    m = np.asarray(mass)
    if m.shape != (n,) or m.dtype.kind not in "fiu":
        raise InputError(f"mass must be real and of shape ({n},), one value for each latent, not {m.dtype} {m.shape}")
    m = m.astype(np.float64)
    wrong = ~(np.isfinite(m) & (m >= 0))
    if wrong.any():
        i = int(wrong.argmax())
        raise InputError(
            f"mass must be finite and not negative: {int(wrong.sum()):,} of {n:,} values are wrong, "
            f"the first is mass[{i}] = {m[i]}"
        )
    largest = float(m.max())
    if largest == 0:
        raise InputError("all masses are zero; at least two latents need a positive mass")
    total = float((m / largest).sum())
    notes = []
    if abs(total * largest - 1.0) > 1e-6:
        notes.append(f"the masses sum to {total * largest:.6g}; they were divided by that sum")
    if zeros := int((m == 0).sum()):
        notes.append(f"{zeros:,} of {n:,} latents have zero mass and are left out; their height is -inf")
    return m / largest / total, notes


def build_target(rows: Rows, mass: NDArray[Any] | None, source_moments: tuple[Array, Array]) -> tuple[Target, Frame]:
    """Reads, checks and centres latents, merges equal ones. Costs two passes over the rows.

    Raises InputError for NaN or Inf (how many, first row), wrong shapes or masses, fewer than two distinct atoms.
    """
    check_rows(rows)
    total, d = rows.shape
    nu, notes = check_mass(mass, total)
    mean, cov = source_moments
    fingerprint, centre, scale = _survey(rows, nu)
    frame = Frame(mean, float(np.sqrt(np.trace(cov) / d)) or 1.0, centre, scale)

    atoms = np.empty((total, d), dtype=np.float32)
    tilt = np.empty(total)
    for block in blocks(total):
        y = np.asarray(rows[block], dtype=np.float64)
        atoms[block] = frame.target_in(y)
        tilt[block] = (y - centre) @ mean
    atom_of, original = _distinct(atoms, np.flatnonzero(nu > 0))
    if len(original) < 2:
        raise InputError("all latents of positive mass are the same point; there is nothing to transport apart")
    merged = int((atom_of >= 0).sum()) - len(original)
    if merged:
        notes.append(f"{merged:,} latents repeat another one; each group is one atom with the sum of its masses")
    if len(original) < total:
        nu = np.zeros(len(original)) + np.bincount(atom_of[atom_of >= 0], weights=nu[atom_of >= 0])
        atoms, tilt = atoms[original], tilt[original]
    return Target(torch.from_numpy(atoms), nu, tilt, original, atom_of, fingerprint, tuple(notes)), frame


def _survey(rows: Rows, nu: Array) -> tuple[str, Array, float]:
    """Fingerprint (content hash), centre (coordinate-wise median of up to 16,384 rows) and scale (RMS)."""
    total, d = rows.shape
    fingerprint = Fingerprint(rows.shape, rows.dtype)
    stride = -(-total // 16384)
    few, bad, first = [], 0, -1
    for block in blocks(total):
        y = np.ascontiguousarray(rows[block])
        fingerprint.update(y)
        finite = np.isfinite(y).all(axis=1)
        if not finite.all():
            first = first if bad else block.start + int((~finite).argmax())
            bad += int((~finite).sum())
        few.append(y[-block.start % stride :: stride].astype(np.float64))
    if bad:
        raise InputError(
            f"{bad:,} of {total:,} latents contain NaN or Inf, the first is row {first:,}; remove or mend these rows"
        )
    centre = np.median(np.concatenate(few), axis=0)
    squares = sum(
        float(((np.asarray(rows[b], dtype=np.float64) - centre) ** 2).sum(axis=1) @ nu[b]) for b in blocks(total)
    )
    scale = float(np.sqrt(squares / d))
    if not np.isfinite(scale):
        raise InputError("the latents are too large for float64 arithmetic; divide them by a common factor")
    return fingerprint.hexdigest(), centre, scale or 1.0


def _distinct(atoms: NDArray[np.float32], kept: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Groups equal rows among ``kept``: atom of each row (N,) or -1, and the lowest row of each atom (n,).

    Rows are hashed to 64 bits by a random odd-multiplier sum; only rows whose hash repeats are compared.
    """
    atoms += np.float32(0)  # -0.0 becomes 0.0, which is the same point
    words: NDArray[np.uint32] = atoms.view(np.uint32)
    odd = np.random.default_rng(0).integers(0, 2**63, words.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    code = np.empty(len(kept), dtype=np.uint64)
    for block in blocks(len(kept)):
        mixed = words[kept[block]].astype(np.uint64) * odd
        code[block] = (mixed ^ (mixed >> np.uint64(29))).sum(axis=1, dtype=np.uint64)
    _, inverse, count = np.unique(code, return_inverse=True, return_counts=True)
    twin = kept[count[inverse] > 1]
    leader = np.arange(len(atoms))
    if len(twin):
        _, group = np.unique(atoms[twin], axis=0, return_inverse=True)
        lowest = np.full(int(group.max()) + 1, len(atoms))
        np.minimum.at(lowest, group.ravel(), twin)
        leader[twin] = lowest[group.ravel()]
    original = kept[leader[kept] == kept]
    atom_of = np.full(len(atoms), -1, dtype=np.int64)
    atom_of[original] = np.arange(len(original))
    atom_of[kept] = atom_of[leader[kept]]
    return atom_of, original
