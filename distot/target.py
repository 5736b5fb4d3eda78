"""The target: this process's share of the atoms, in the frame, checked, with duplicates merged.

Legend: N latents as the user counts them, n distinct atoms of positive mass, d dimension. A process reads a range of
the latents and owns their atoms: "own" counts those alone. Of equal latents the first is the atom, wherever others are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot import twins
from distot.atoms import ROWS, Atoms, Framed, Reader, Rows, Stored, Whole, as_atoms, blocks, into_frame, tile_rows
from distot.errors import InputError
from distot.fingerprint import Fingerprint, combined
from distot.grid import Axis, Grid, Split
from distot.power import Array, Cost, Frame, Quadratic
from distot.sphere import check_half, check_unit
from distot.twins import Twins

SURVEYED = 16384  # rows of which the centre is the median
NOTHING = 1e-18  # a share of all mass that changes no sum of float64
UNEVEN = 8  # pieces of a store are kept whole where this many go to a share
QUADRATIC = Quadratic()


Cache = dict[Any, Any]
"""What a process has read of one problem, kept for when it has to build the same share again."""


@dataclass(frozen=True)
class Target:
    """Distinct atoms of positive mass, numbered from 0 to n - 1 over all shares. Heights live in the solver's state."""

    atoms: Atoms  # (own, d), in the frame
    mass: Array  # (own,) float64, sums to 1 over all shares
    tilt: Array  # (own,) float64, <source_centre, y_i - target_centre>
    original: NDArray[np.int64]  # (own,) row of each atom among the N latents
    atom_of: NDArray[np.int64]  # (own latents,) atom of each latent of this share, -1 where the mass is zero
    spans: tuple[int, ...]  # latents of share t are rows spans[t] to spans[t + 1]
    split: Split  # of the atoms
    fingerprint: str
    notes: tuple[str, ...]
    merge: bool = True  # whether latents that float32 scores cannot tell apart are one atom
    twins: Twins | None = None  # of all atoms

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
        for first, tile in self.atoms.tiles():
            y = tile.double().cpu().numpy()
            weighted = y * self.mass[first : first + len(y), None]
            found[0] += weighted.sum(axis=0)
            found[1:] += weighted.T @ y
        found = self.split.axis.sum(torch.from_numpy(found)).numpy()
        return found[0], found[1:] - np.outer(found[0], found[0])

    def replaced(self, atoms: Tensor | Atoms, mass: Array, split: Split) -> Target:
        """Another target in the same frame: other atoms (own, d) with their masses (own,), for the search alone."""
        index = np.arange(len(atoms))
        none = np.zeros(len(atoms))
        return Target(as_atoms(atoms), mass, none, index, index, (0, 0), split, self.fingerprint, ())

    def spread(self, values: Array) -> Array:
        """Values of all atoms (n,) -> values of own latents; -inf where the mass is zero."""
        out = np.full(len(self.atom_of), -np.inf)
        kept = self.atom_of >= 0
        out[kept] = values[self.atom_of[kept]]
        return out


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
    largest = float(axis.max(torch.tensor(m.max(), dtype=torch.float64)))
    if largest == 0:
        raise InputError("all masses are zero; at least two latents need a positive mass")
    total = axis.total(float((m / largest).sum()))
    notes = []
    if abs(total * largest - 1.0) > 1e-6:
        notes.append(f"the masses sum to {total * largest:.6g}; they were divided by that sum")
    if zeros := int(axis.total(int((m == 0).sum()))):
        notes.append(f"{zeros:,} of {n:,} latents have zero mass and are left out; their height is -inf")
    nu = m / largest / total
    none = (nu < NOTHING) & (m > 0)
    if few := int(axis.total(int(none.sum()))):
        notes.append(
            f"{few:,} of {n:,} latents have less than {NOTHING:g} of all mass and are left out like those of none"
        )
    return np.where(none, 0.0, nu), notes


def build_target(
    rows: Rows,
    mass: Any,
    source_moments: tuple[Array, Array],
    grid: Grid,
    cache: Cache,
    room: tuple[float, float] = (np.inf, np.inf),
    cost: Cost = QUADRATIC,
    merge: bool = True,
) -> tuple[Target, Frame]:
    """Reads this process's share of the latents, checks and centres it, merges equal ones. Costs three passes over it.

    merge: whether those that float32 scores cannot tell apart are merged as well.
    room: bytes that own latents may take as float32, and here in memory as they are stored; see ``_kept``.
    Raises InputError for NaN or Inf (how many, first row), wrong shapes or masses, fewer than two distinct atoms; at a
    spherical cost for latents that are not unit vectors, or have more mass than the half of the sphere that they see.
    """
    axis = grid.target
    check_rows(rows, axis.size)
    total, d = rows.shape
    spans = divide(rows, axis.size)
    span = slice(spans[axis.rank], spans[axis.rank + 1])
    nu, notes = check_mass(mass, total, span, axis)
    mean, cov = source_moments
    fingerprint, centre, typical = _survey(rows, span, axis, cache)
    if cost.spherical:
        check_unit(rows, span, axis, cache)
        frame, typical = Frame(np.zeros(d), 1.0, np.zeros(d), 1.0), 1.0
    else:
        scale = _scale(rows, span, nu, centre, axis, cache)
        frame, typical = Frame(mean, float(np.sqrt(np.trace(cov) / d)) or 1.0, centre, scale), typical / scale
    kept = _kept(rows, span, room, grid, cache)
    every, tilt, code = _framed(rows, span, frame, kept, room, cache)

    leader = _leaders(every, code, nu > 0, span.start, axis)
    repeated = _followers(leader, span, axis)
    if merge and d > 1:
        leader = twins.merged(every, leader, total, typical, span.start, axis)
    original = np.flatnonzero(leader == np.arange(span.start, span.stop))
    split = Split(tuple(axis.objects(len(original))), axis)
    joined = _followers(leader, span, axis) - repeated
    if split.n < 2:
        light = next((f"; {note}" for note in notes if "have less than" in note), "")
        raise InputError(f"all latents of positive mass are the same point; there is nothing to transport apart{light}")
    if repeated:
        notes.append(f"{repeated:,} latents repeat another one; each group is one atom with the sum of its masses")
    if joined:
        near = twins.reach(d, total, typical)(np.array([typical]))[0] * frame.target_scale
        notes.append(
            f"{joined:,} latents lie closer to another one than float32 scores tell, about {near:.1g}; each group is "
            "one atom with the sum of its masses"
        )
    atom_of, weight = _join(leader, nu, original, spans, split)
    if cost.spherical:
        check_half(weight, original + span.start, axis)
    atoms: Atoms = every
    if len(original) < len(leader):
        atoms = every.among(original) if isinstance(every, Framed) else Whole(every[torch.from_numpy(original)])
        tilt = tilt[original]
    target = Target(
        atoms,
        weight,
        tilt,
        original + span.start,
        atom_of,
        spans,
        split,
        fingerprint,
        tuple(notes),
        merge,
        twins.grouped(atoms, typical, split) if d > 1 else None,
    )
    return target, frame


def _followers(leader: NDArray[np.int64], span: slice, axis: Axis) -> int:
    """How many latents of all shares stand behind another one."""
    return int(axis.total(int(((leader >= 0) & (leader != np.arange(span.start, span.stop))).sum())))


def _survey(rows: Rows, span: slice, axis: Axis, cache: Cache) -> tuple[str, Array, float]:
    """Fingerprint (content hash) of all latents; of up to SURVEYED rows the centre, which is the median of each
    coordinate, and the median distance from it.

    A block of ROWS rows is hashed where it begins, even if its end belongs to the next share.
    """
    total, d = rows.shape
    key = "survey", span.start, span.stop
    if key not in cache:
        stride = -(-total // SURVEYED)
        begin, end = (min(-(-edge // ROWS) * ROWS, total) for edge in (span.start, span.stop))
        found = Fingerprint(rows.shape, rows.dtype)
        few, bad, first = [np.empty((0, d))], 0, -1
        step, read = tile_rows(d), Reader(rows)
        parts = [(a, min(a + step, begin, span.stop)) for a in range(span.start, min(begin, span.stop), step)]
        for a, b in parts + [(a, min(a + step, end)) for a in range(begin, end, step)]:
            y = np.ascontiguousarray(read(a, b))
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
    surveyed = axis.gather(torch.from_numpy(few_rows)).numpy()
    # part by part, as the median copies
    centre = np.concatenate([np.median(its, axis=0) for its in np.array_split(surveyed, -(-d // 64), axis=1)])
    typical = float(np.median(np.sqrt(((surveyed - centre) ** 2).sum(axis=1))))
    return combined(rows.shape, rows.dtype, [digest for *_, its in reports for digest in its]), centre, typical


def _scale(rows: Rows, span: slice, nu: Array, centre: Array, axis: Axis, cache: Cache) -> float:
    """Root mean square of a coordinate about the centre."""
    key = "squares", span.start, span.stop
    if key not in cache:
        cache[key], read = 0.0, Reader(rows)
        for block in blocks(len(nu), len(centre)):
            y = np.asarray(read(span.start + block.start, span.start + block.stop), dtype=np.float64)
            cache[key] += float(((y - centre) ** 2).sum(axis=1) @ nu[block])
    scale = float(np.sqrt(axis.total(cache[key]) / len(centre)))
    if not np.isfinite(scale):
        raise InputError("the latents are too large for float64 arithmetic; divide them by a common factor")
    return scale or 1.0


KINDS = ("float32", "stored", "disk")


def _kept(rows: Rows, span: slice, room: tuple[float, float], grid: Grid, cache: Cache) -> str:
    """How all processes keep their latents: the first of KINDS for which there is room in each of them.

    "float32": widened, in memory. "stored": in memory as they are; an array of the caller's is there already.
    "disk": read whenever they are needed. What was read before has its room.
    """
    n, d = span.stop - span.start, rows.shape[1]
    sizes = 4 * n * d, n * rows.row_bytes if isinstance(rows, Stored) else 0
    fits = [
        size <= limit or (kind, span.start, span.stop) in cache
        for kind, size, limit in zip(KINDS, sizes, room, strict=False)
    ]
    own = fits.index(True) if any(fits) else len(fits)
    return KINDS[int(grid.world.max(torch.tensor(own)))]


def _framed(
    rows: Rows, span: slice, frame: Frame, kept: str, room: tuple[float, float], cache: Cache
) -> tuple[Atoms, Array, NDArray[np.uint64]]:
    """Own latents in the frame, their tilts, and hashes of 64 bits that are the same for equal ones."""
    key = kept, span.start, span.stop
    for kind in KINDS:
        if kind != kept:
            cache.pop((kind, *key[1:]), None)
    if key not in cache:
        n, d = span.stop - span.start, rows.shape[1]
        source = rows.held(span) if kept == "stored" and isinstance(rows, Stored) else rows
        whole = np.empty((n, d) if kept == "float32" else (0, d), dtype=np.float32)
        tilt, code, read = np.empty(n), np.empty(n, dtype=np.uint64), Reader(source)
        odd = np.random.default_rng(0).integers(0, 2**63, d, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        for block in blocks(n, d):
            y = np.asarray(read(span.start + block.start, span.start + block.stop), dtype=np.float64)
            tile = whole[block] if len(whole) else np.empty(y.shape, dtype=np.float32)
            into_frame(y, frame, tile)
            tilt[block] = (y - frame.target_centre) @ frame.source_centre
            mixed = tile.view(np.uint32).astype(np.uint64) * odd
            code[block] = (mixed ^ (mixed >> np.uint64(29))).sum(axis=1, dtype=np.uint64)
        atoms: Atoms = Whole(torch.from_numpy(whole))
        if kept != "float32":
            atoms = Framed(source, rows, frame, np.arange(span.start, span.stop), *_described(rows, kept, n, room))
        cache[key] = atoms, tilt, code
    return cache[key]


def _described(rows: Rows, kept: str, n: int, room: tuple[float, float]) -> tuple[str, str, float]:
    """How latents are kept, why, and how many bytes may be picked out at once."""
    name = getattr(rows, "stored", rows.dtype.name) if kept == "stored" else kept
    how = f"in memory as {name}, as they came" if kept == "stored" else "on disk and are read again for every search"
    allowed = room[0] if kept == "stored" else max(room)
    why = (
        f"the latents stay {how}: the {n:,} of this process would take {4 * n * rows.shape[1] / 2**30:.2f} GiB as "
        f"float32, and {allowed / 2**30:.2f} GiB are allowed (memory); the answer is the same"
    )
    return name, why, room[1] / 4


def _leaders(
    every: Atoms, code: NDArray[np.uint64], positive: NDArray[np.bool_], first: int, axis: Axis
) -> NDArray[np.int64]:
    """The lowest row of positive mass that equals each own one, (own latents,); -1 where the mass is zero."""
    kept = np.flatnonzero(positive)
    leader = np.full(len(every), -1)
    leader[kept] = twins.meeting(every, kept, code[kept], first, axis, twins.equal)
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
    atom_of[kept] = twins.asked(axis, owner, [leader[kept], nu[kept]], joined)
    return atom_of, mass
