"""The target: this process's share of the atoms, in the frame, checked, with duplicates merged.

Legend: N latents as the user counts them, n distinct atoms of positive mass, d dimension. A process reads a range of
the latents and owns their atoms: "own" counts those alone. Of equal latents the first is the atom, wherever others are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.errors import InputError
from distot.grid import Axis, Grid, Split
from distot.power import Array, Frame

ROWS = 65536
"""Rows handled at a time; part of the definition of a fingerprint."""
SURVEYED = 16384  # rows of which the centre is the median
UNEVEN = 8  # pieces of a store are kept whole where this many go to a share


Cache = dict[Any, Any]
"""What a process has read of one problem, kept for when it has to build the same share again."""


class Fingerprint:
    """Content hash of latents, fed row blocks of any size; the same for the same rows, shape and dtype."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.little = shape, dtype.newbyteorder("<")
        self.digests: list[bytes] = []  # of blocks of ROWS rows
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
        self.digests.append(self.block.digest())
        self.block, self.filled = hashlib.sha256(), 0

    def closed(self) -> list[bytes]:
        """Digests of all blocks, the last one as far as it is filled."""
        return [*self.digests, self.block.digest()] if self.filled else self.digests

    def hexdigest(self) -> str:
        return combined(self.shape, self.little, self.closed())


def combined(shape: tuple[int, ...], dtype: np.dtype[Any], digests: list[bytes]) -> str:
    """The fingerprint of latents from the digests of all their blocks; an empty one follows if the last is full."""
    total = hashlib.sha256(f"{tuple(int(n) for n in shape)} {dtype.newbyteorder('<').str}".encode())
    for digest in digests if shape[0] % ROWS else [*digests, hashlib.sha256().digest()]:
        total.update(digest)
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
    """Distinct atoms of positive mass, numbered from 0 to n - 1 over all shares. Heights live in the solver's state."""

    atoms: Tensor  # (own, d) float32, in the frame
    mass: Array  # (own,) float64, sums to 1 over all shares
    tilt: Array  # (own,) float64, <source_centre, y_i - target_centre>
    original: NDArray[np.int64]  # (own,) row of each atom among the N latents
    atom_of: NDArray[np.int64]  # (own latents,) atom of each latent of this share, -1 where the mass is zero
    spans: tuple[int, ...]  # latents of share t are rows spans[t] to spans[t + 1]
    split: Split  # of the atoms
    fingerprint: str
    notes: tuple[str, ...]

    @property
    def n(self) -> int:
        """Atoms of all shares."""
        return self.split.n

    @property
    def latents(self) -> int:
        """N, latents of all shares."""
        return self.spans[-1]

    @property
    def dim(self) -> int:
        return self.atoms.shape[1]

    def moments(self) -> tuple[Array, Array]:
        """Mean (d,) and covariance (d, d) of the target in the frame, in float64."""
        found = np.zeros((self.dim + 1, self.dim))
        for rows in blocks(len(self.atoms)):
            y = self.atoms[rows].double().cpu().numpy()
            weighted = y * self.mass[rows, None]
            found[0] += weighted.sum(axis=0)
            found[1:] += weighted.T @ y
        found = self.split.axis.sum(torch.from_numpy(found)).numpy()
        return found[0], found[1:] - np.outer(found[0], found[0])

    def replaced(self, atoms: Tensor, mass: Array, split: Split) -> Target:
        """Another target in the same frame: other atoms (own, d) with their masses (own,), for the search alone."""
        index = np.arange(len(atoms))
        none = np.zeros(len(atoms))
        return Target(atoms, mass, none, index, index, (0, 0), split, self.fingerprint, ())

    def spread(self, values: Array) -> Array:
        """Values of all atoms (n,) -> values of own latents; -inf where the mass is zero."""
        out = np.full(len(self.atom_of), -np.inf)
        kept = self.atom_of >= 0
        out[kept] = values[self.atom_of[kept]]
        return out


def blocks(n: int) -> Iterator[slice]:
    """Row ranges of at most ROWS that cover n rows."""
    return (slice(a, min(a + ROWS, n)) for a in range(0, n, ROWS))


def divide(rows: Rows, shares: int) -> tuple[int, ...]:
    """Where to cut latents into shares: between pieces that the store keeps together, if they can be shared evenly."""
    n = rows.shape[0]
    grains: tuple[int, ...] = getattr(rows, "grains", ())
    grain = next((size for size in grains if size * shares * UNEVEN <= n), 1)
    pieces = -(-n // grain)
    return tuple(min(n, grain * (pieces * t // shares)) for t in range(shares + 1))


def check_rows(rows: Rows, shares: int = 1) -> None:
    """Shape and dtype of latents. Raises InputError before anything is read."""
    if len(rows.shape) != 2:
        raise InputError(f"latents must have shape (N, d), not {tuple(rows.shape)}; flatten each latent to a row")
    n, d = rows.shape
    if n < 2 or d < 1:
        raise InputError(f"latents of shape {(n, d)} are too few: optimal transport needs N >= 2 points of d >= 1")
    if rows.dtype.kind not in "fiu":
        raise InputError(f"latents have dtype {rows.dtype}; give real numbers (float16, float32 or float64)")
    if n < 2 * shares:
        raise InputError(f"{n:,} latents are too few for {shares} shares of them; use fewer workers, or more replicas")


def check_mass(mass: Any, n: int, span: slice | None = None, axis: Axis | None = None) -> tuple[Array, list[str]]:
    """Masses of own latents float64, of sum 1 over all shares, and notes on what was done to them.

    mass: (N,) values that can be read by range, or None for equal ones. span: own ones; None means all.
    """
    span, axis = span or slice(0, n), axis or Axis()
    if mass is None:
        return np.full(span.stop - span.start, 1.0 / n), []
    if tuple(mass.shape) != (n,) or mass.dtype.kind not in "fiu":
        raise InputError(
            f"mass must be real and of shape ({n},), one value for each latent, not {mass.dtype} {tuple(mass.shape)}"
        )
    m = np.asarray(mass[span]).astype(np.float64)
    wrong = ~(np.isfinite(m) & (m >= 0))
    bad = axis.objects((int(wrong.sum()), span.start + int(wrong.argmax()), float(m[wrong.argmax()])))
    if count := sum(number for number, *_ in bad):
        _, i, value = next(entry for entry in bad if entry[0])
        raise InputError(
            f"mass must be finite and not negative: {count:,} of {n:,} values are wrong, "
            f"the first is mass[{i}] = {value}"
        )
    largest = float(axis.max(torch.tensor(m.max())))
    if largest == 0:
        raise InputError("all masses are zero; at least two latents need a positive mass")
    total = axis.total(float((m / largest).sum()))
    notes = []
    if abs(total * largest - 1.0) > 1e-6:
        notes.append(f"the masses sum to {total * largest:.6g}; they were divided by that sum")
    if zeros := int(axis.total(int((m == 0).sum()))):
        notes.append(f"{zeros:,} of {n:,} latents have zero mass and are left out; their height is -inf")
    return m / largest / total, notes


def build_target(
    rows: Rows, mass: Any, source_moments: tuple[Array, Array], grid: Grid, cache: Cache
) -> tuple[Target, Frame]:
    """Reads this process's share of the latents, checks and centres it, merges equal ones. Costs two passes over it.

    Raises InputError for NaN or Inf (how many, first row), wrong shapes or masses, fewer than two distinct atoms.
    """
    axis = grid.target
    check_rows(rows, axis.size)
    total, d = rows.shape
    spans = divide(rows, axis.size)
    span = slice(spans[axis.rank], spans[axis.rank + 1])
    nu, notes = check_mass(mass, total, span, axis)
    mean, cov = source_moments
    fingerprint, centre = _survey(rows, span, axis, cache)
    scale = _scale(rows, span, nu, centre, axis, cache)
    frame = Frame(mean, float(np.sqrt(np.trace(cov) / d)) or 1.0, centre, scale)
    atoms, tilt = _framed(rows, span, frame, cache)

    leader = _leaders(atoms, nu > 0, span.start, axis)
    original = np.flatnonzero(leader == np.arange(span.start, span.stop))
    split = Split(tuple(axis.objects(len(original))), axis)
    kept = leader >= 0
    merged = int(axis.total(int(kept.sum()))) - split.n
    if split.n < 2:
        raise InputError("all latents of positive mass are the same point; there is nothing to transport apart")
    if merged:
        notes.append(f"{merged:,} latents repeat another one; each group is one atom with the sum of its masses")
    atom_of, weight = _join(leader, nu, original, spans, split)
    if len(original) < len(leader):
        atoms, tilt = atoms[original], tilt[original]
    target = Target(
        torch.from_numpy(atoms),
        weight,
        tilt,
        original + span.start,
        atom_of,
        spans,
        split,
        fingerprint,
        tuple(notes),
    )
    return target, frame


def _survey(rows: Rows, span: slice, axis: Axis, cache: Cache) -> tuple[str, Array]:
    """Fingerprint (content hash) and centre (coordinate-wise median of up to SURVEYED rows) of all latents.

    A block of ROWS rows is hashed where it begins, even if its end belongs to the next share.
    """
    total, d = rows.shape
    key = "survey", span.start, span.stop
    if key not in cache:
        stride = -(-total // SURVEYED)
        begin, end = (min(-(-edge // ROWS) * ROWS, total) for edge in (span.start, span.stop))
        found = Fingerprint(rows.shape, rows.dtype)
        few, bad, first = [np.empty((0, d))], 0, -1
        parts = [(a, min(a + ROWS, begin, span.stop)) for a in range(span.start, min(begin, span.stop), ROWS)]
        for a, b in parts + [(a, min(a + ROWS, end)) for a in range(begin, end, ROWS)]:
            y = np.ascontiguousarray(rows[a:b])
            if a >= begin:
                found.update(y)
            y = y[: max(0, span.stop - a)]
            finite = np.isfinite(y).all(axis=1)
            if not finite.all():
                first = first if bad else a + int((~finite).argmax())
                bad += int((~finite).sum())
            few.append(y[-a % stride :: stride].astype(np.float64))
        cache[key] = found.closed(), np.concatenate(few), bad, first
    digests, few_rows, bad, first = cache[key]
    reports = axis.objects((bad, first, digests))
    if wrong := sum(count for count, *_ in reports):
        row = next(where for count, where, _ in reports if count)
        raise InputError(
            f"{wrong:,} of {total:,} latents contain NaN or Inf, the first is row {row:,}; remove or mend these rows"
        )
    centre = np.median(axis.gather(torch.from_numpy(few_rows)).numpy(), axis=0)
    return combined(rows.shape, rows.dtype, [digest for *_, its in reports for digest in its]), centre


def _scale(rows: Rows, span: slice, nu: Array, centre: Array, axis: Axis, cache: Cache) -> float:
    """Root mean square of a coordinate about the centre."""
    key = "squares", span.start, span.stop
    if key not in cache:
        cache[key] = 0.0
        for block in blocks(len(nu)):
            y = np.asarray(rows[_shifted(block, span.start)], dtype=np.float64)
            cache[key] += float(((y - centre) ** 2).sum(axis=1) @ nu[block])
    scale = float(np.sqrt(axis.total(cache[key]) / len(centre)))
    if not np.isfinite(scale):
        raise InputError("the latents are too large for float64 arithmetic; divide them by a common factor")
    return scale or 1.0


def _framed(rows: Rows, span: slice, frame: Frame, cache: Cache) -> tuple[NDArray[np.float32], Array]:
    """Own latents in the frame, float32, and their tilts."""
    key = "framed", span.start, span.stop
    if key not in cache:
        n = span.stop - span.start
        atoms, tilt = np.empty((n, rows.shape[1]), dtype=np.float32), np.empty(n)
        for block in blocks(n):
            y = np.asarray(rows[_shifted(block, span.start)], dtype=np.float64)
            atoms[block] = frame.target_in(y)
            tilt[block] = (y - frame.target_centre) @ frame.source_centre
        atoms += np.float32(0)  # -0.0 becomes 0.0, which is the same point
        cache[key] = atoms, tilt
    return cache[key]


def _shifted(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)


def _leaders(atoms: NDArray[np.float32], positive: NDArray[np.bool_], first: int, axis: Axis) -> NDArray[np.int64]:
    """The lowest row among those of positive mass that equal each own one, (own latents,); -1 where the mass is zero.

    Rows are hashed to 64 bits by a random odd-multiplier sum. Those with the same hash meet in one process, and only
    they are compared.
    """
    kept = np.flatnonzero(positive)
    words: NDArray[np.uint32] = atoms.view(np.uint32)
    odd = np.random.default_rng(0).integers(0, 2**63, words.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    code = np.empty(len(kept), dtype=np.uint64)
    for block in blocks(len(kept)):
        mixed = words[kept[block]].astype(np.uint64) * odd
        code[block] = (mixed ^ (mixed >> np.uint64(29))).sum(axis=1, dtype=np.uint64)
    judge = (code % np.uint64(axis.size)).astype(np.int64)

    def repeats(codes: NDArray[np.int64]) -> NDArray[np.bool_]:
        _, inverse, count = np.unique(codes, return_inverse=True, return_counts=True)
        return count[inverse] > 1

    twin = kept[_asked(axis, judge, [code.view(np.int64)], repeats)]
    leader = np.where(positive, np.arange(first, first + len(atoms)), -1)

    def lowest(rows: NDArray[np.float32], row: NDArray[np.int64]) -> NDArray[np.int64]:
        _, group = np.unique(rows, axis=0, return_inverse=True)
        least = np.full(int(group.max()) + 1 if len(row) else 0, np.iinfo(np.int64).max)
        np.minimum.at(least, group.ravel(), row)
        return least[group.ravel()]

    place = np.searchsorted(kept, twin)
    leader[twin] = _asked(axis, judge[place], [atoms[twin], twin + first], lowest)
    return leader


def _join(
    leader: NDArray[np.int64],
    nu: Array,
    original: NDArray[np.int64],
    spans: tuple[int, ...],
    split: Split,
) -> tuple[NDArray[np.int64], Array]:
    """Atom of each own latent, or -1, and the mass of each own atom: those of all latents that it leads."""
    axis = split.axis
    kept = np.flatnonzero(leader >= 0)
    owner = np.searchsorted(spans[1:-1], leader[kept], side="right")
    mass = np.zeros(len(original))

    def joined(row: NDArray[np.int64], weight: Array) -> NDArray[np.int64]:
        place = np.searchsorted(original, row - spans[axis.rank])
        np.add.at(mass, place, weight)
        return split.first + place

    atom_of = np.full(len(leader), -1, dtype=np.int64)
    atom_of[kept] = _asked(axis, owner, [leader[kept], nu[kept]], joined)
    return atom_of, mass


def _asked(axis: Axis, whom: NDArray[np.int64], of: Sequence[NDArray[Any]], answer: Callable[..., NDArray[Any]]) -> Any:
    """What process ``whom[i]`` makes of the i-th row of each array, by ``answer`` for all that arrive there."""
    order = whom.argsort(kind="stable")
    ends = np.bincount(whom, minlength=axis.size).cumsum()[:-1]
    arrived = [axis.exchange([torch.from_numpy(part) for part in np.split(values[order], ends)]) for values in of]
    found = answer(*(torch.cat(parts).numpy() for parts in arrived))
    edges = np.cumsum([len(part) for part in arrived[0]])[:-1]
    back = axis.exchange([torch.from_numpy(part) for part in np.split(found, edges)])
    out = np.empty(len(whom), dtype=found.dtype)
    out[order] = torch.cat(back).numpy()
    return out
