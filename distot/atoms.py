"""Own atoms in the frame, wherever they are: in memory as float32, in memory as they are stored, or in their store.

A raw row becomes one of the frame number by number: a subtraction and a division in float64, rounded once. So it comes
out the same bit for bit, whenever and with whatever other rows that is done. Legend: n own atoms, d dimension.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.power import Frame

ROWS = 65536
"""Rows handled at a time, at most; part of the definition of a fingerprint."""
TILE = 1 << 20  # numbers of a tile of atoms: 4 MiB of float32
FRAMED = 1 << 17  # numbers framed at a time, which stay in cache
SHARE = 0.4  # of the memory that is available may go into latents; some assigners keep them twice
GATHERED = 64 << 20  # bytes of rows that may be picked out at once, if no more are allowed


class Rows(Protocol):
    """Latents that can be read by row range: an array in memory or a store."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[np.generic]: ...

    def __getitem__(self, rows: slice) -> NDArray[np.generic]: ...


@runtime_checkable
class Stored(Protocol):
    """What rows in a store can do besides."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is stored."""
        ...

    def held(self, span: slice) -> Rows:
        """A range of the rows in memory, as they are stored, numbered as before."""
        ...


def tile_rows(d: int) -> int:
    """Rows of a tile: a power of two, ROWS at most."""
    return int(min(ROWS, 1 << max(0, (TILE // d).bit_length() - 1)))


def blocks(n: int, d: int = 1) -> Iterator[slice]:
    """Ranges of the rows of a tile, that cover n rows of d numbers."""
    rows = tile_rows(d)
    return (slice(a, min(a + rows, n)) for a in range(0, n, rows))


class Whole:
    """Atoms in memory: a float32 tensor (n, d) on the device of the search."""

    kept, why = "float32", ""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self.shape, self.device = (len(whole), whole.shape[1]), whole.device

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return self.whole[index]

    def to(self, device: torch.device) -> Whole:
        return Whole(self.whole.to(device))

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """The first row of each tile, and the tile."""
        return ((rows.start, self.whole[rows]) for rows in blocks(*self.shape))

    def some(self, index: Tensor) -> Callable[[Tensor], Tensor]:
        """The rows of any atoms among ``index``, asked for by their own index of any shape."""
        return self.__getitem__

    def moved(self, by: Callable[[Tensor], Tensor]) -> Whole:
        """Every number of the atoms (n, d) changed by a function of rows."""
        return Whole(torch.cat([by(self.whole[rows]) for rows in blocks(*self.shape)] or [self.whole]))


class Framed:
    """Atoms that are rows ``which`` (n,) of ``rows``, in ascending order, and are framed when they are asked for.

    origin: where any rows can be read, those of other shares as well. kept, why: in words, how rows are kept. room:
    bytes that rows picked out at once may take.
    """

    whole = None

    def __init__(
        self,
        rows: Rows,
        origin: Rows,
        frame: Frame,
        which: NDArray[np.int64],
        kept: str,
        why: str = "",
        room: float = GATHERED,
        device: torch.device | None = None,
        then: Callable[[Tensor], Tensor] = lambda tile: tile,
    ) -> None:
        self.rows, self.origin, self.frame, self.which = rows, origin, frame, which
        self.kept, self.why, self.room, self.then = kept, why, max(room, GATHERED), then
        self.shape, self.device = (len(which), rows.shape[1]), device or torch.device("cpu")

    def __len__(self) -> int:
        return len(self.which)

    def _like(
        self,
        rows: Rows | None = None,
        which: NDArray[np.int64] | None = None,
        device: torch.device | None = None,
        then: Callable[[Tensor], Tensor] | None = None,
    ) -> Framed:
        which = self.which if which is None else which
        same = self.frame, which, self.kept, self.why, self.room
        return Framed(rows or self.rows, self.origin, *same, device or self.device, then or self.then)

    def to(self, device: torch.device) -> Framed:
        return self._like(device=device)

    def among(self, index: NDArray[np.int64]) -> Framed:
        """Those of ``index`` alone, in ascending order."""
        return self._like(which=self.which[index])

    def elsewhere(self, which: NDArray[np.int64]) -> Framed:
        """Atoms that are other rows, in ascending order, perhaps of other shares."""
        return self._like(self.origin, which)

    def moved(self, by: Callable[[Tensor], Tensor]) -> Framed:
        """Every number of the atoms (n, d) changed by a function of rows."""
        before = self.then
        return self._like(then=lambda tile: by(before(tile)))

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        if isinstance(index, slice):
            return self._read(self.which[index], Reader(self.rows))
        distinct, inverse = torch.unique(index, return_inverse=True)
        return self._read(self.which[distinct.cpu().numpy()], Reader(self.rows))[inverse]

    def some(self, index: Tensor) -> Callable[[Tensor], Tensor]:
        """The rows of any atoms among ``index``, asked for by their own index of any shape. Reads each one once."""
        distinct = torch.unique(index)
        rows = self._read(self.which[distinct.cpu().numpy()], Reader(self.rows))
        return lambda asked: rows[torch.searchsorted(distinct, asked)]

    def tiles(self) -> Generator[tuple[int, Tensor]]:
        """The first row of each tile, and the tile; a thread makes the next one meanwhile, and ends with the iterator.

        Raises what reading rows raises.
        """
        n, rows, read = len(self), tile_rows(self.shape[1]), Reader(self.rows)

        def make(first: int) -> Tensor:
            return self._read(self.which[first : first + rows], read)

        with ThreadPoolExecutor(1, "tiles") as ahead:
            coming = ahead.submit(make, 0)
            for first in range(0, n, rows):
                tile = coming.result()
                if first + rows < n:
                    coming = ahead.submit(make, first + rows)
                yield first, tile

    def _read(self, which: NDArray[np.int64], read: Reader) -> Tensor:
        """Rows ``which``, in ascending order, framed; of a range whatever lies between is not kept."""
        out = np.empty((len(which), self.shape[1]), dtype=np.float32)
        done = 0
        while done < len(which):
            first, whole = int(which[done]), len(which) - done
            end = int(which[-1]) + 1
            if end - first > whole:  # not all in a row: piece by piece
                end = min(end, (first // read.grain + 1) * read.grain)
                whole = int(np.searchsorted(which, end)) - done
            raw, here = read(first, end), which[done : done + whole]
            into_frame(raw if len(raw) == whole else raw[here - first], self.frame, out[done : done + whole])
            done += whole
        return self.then(torch.from_numpy(out).to(self.device)).to(self.device)


Atoms = Whole | Framed


def as_atoms(atoms: Tensor | Atoms) -> Atoms:
    return Whole(atoms) if isinstance(atoms, Tensor) else atoms


def each_row(atoms: Atoms, value: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """A value of every atom (n,), from a function of tiles.

    They are put where they belong one by one: small results left between large ones that go would hold the heap open.
    """
    out = torch.empty(len(atoms), dtype=dtype, device=atoms.device)
    for first, tile in atoms.tiles():
        out[first : first + len(tile)] = value(tile)
    return out


def into_frame(raw: NDArray[np.generic], frame: Frame, out: NDArray[np.float32]) -> None:
    """Raw rows (n, d) -> float32 in the frame: ``Frame.target_in`` in cache, and -0.0 becomes 0.0, the same point."""
    n, d = out.shape
    step = max(1, FRAMED // d)
    double = np.empty((min(step, n), d))
    for first in range(0, n, step):
        part, y = out[first : first + step], double[: n - first]
        np.copyto(y, raw[first : first + step])
        np.subtract(y, frame.target_centre, out=y)
        np.divide(y, frame.target_scale, out=y)
        part[...] = y
        part += np.float32(0)


class Reader:
    """Reads ranges of rows one after the other, in whole pieces of a store: where one ends, the next may begin.

    ``grain``: rows of a piece. Rows in memory are not copied.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        grains: tuple[int, ...] = getattr(rows, "grains", ())
        self.grain = grains[-1] if grains else tile_rows(rows.shape[1])
        self.ahead = bool(grains)
        self.left: NDArray[np.generic]
        self.first, self.left = 0, np.empty((0, rows.shape[1]), dtype=rows.dtype)  # read, but not asked for yet

    def __call__(self, first: int, end: int) -> NDArray[np.generic]:
        if not self.ahead:
            return self.rows[first:end]
        known = (
            self.left[max(0, first - self.first) : max(0, end - self.first)] if first >= self.first else self.left[:0]
        )
        first += len(known)
        if first == end:
            return known
        stop = min(-(-end // self.grain) * self.grain, self.rows.shape[0])
        new = self.rows[first:stop]
        last = max(first, (end - 1) // self.grain * self.grain)
        self.first, self.left = last, new[last - first :].copy() if stop > end else new[:0]
        new = new[: end - first]
        return np.concatenate([known, new]) if len(known) else new


def available(device: torch.device) -> float:
    """Bytes of memory that are free to use now: of a GPU, else of this machine or of the container that limits it."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    facts = Path("/proc/meminfo")
    if not facts.exists():  # not Linux: half of what there is
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = dict(line.split(":") for line in facts.read_text().splitlines())
    free = 1024.0 * int(lines["MemAvailable"].split()[0])
    group = Path("/sys/fs/cgroup")
    most, used, cached = (group / name for name in ("memory.max", "memory.current", "memory.stat"))
    if most.exists() and most.read_text().strip() != "max":
        spare = dict(line.split() for line in cached.read_text().splitlines())["inactive_file"]
        free = min(free, float(most.read_text()) - float(used.read_text()) + float(spare))
    return max(free, 0.0)
