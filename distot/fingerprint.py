"""The content hash of latents, by which a run knows its own again, however they are divided among processes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distot.atoms import ROWS, Rows


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


def fingerprint_of(rows: Rows) -> str:
    """The fingerprint of rows: as their store says, or else of what they hold."""
    known: str | None = getattr(rows, "fingerprint", None)
    if known is not None:
        return known
    found = Fingerprint(tuple(rows.shape), np.dtype(rows.dtype))
    for first in range(0, rows.shape[0], ROWS):
        found.update(np.asarray(rows[first : first + ROWS]))
    return found.hexdigest()


def hashed(values: NDArray[Any]) -> str:
    """A short content hash of an array: of its shape, its dtype and its values."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    about = f"{values.shape} {little.dtype.str}".encode()
    return hashlib.sha256(about + little.tobytes()).hexdigest()[:32]


def hashed_heights(average: NDArray[Any]) -> str:
    """The hash of heights (n,) of all atoms, by which certificates, cells and rows know them again."""
    return hashlib.sha256(np.ascontiguousarray(average).data).hexdigest()[:32]
