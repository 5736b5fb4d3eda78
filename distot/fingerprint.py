"""The content hash of latents, by which a run knows its own again, however they are divided among processes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distot.atoms import ROWS


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
