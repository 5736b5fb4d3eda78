"""The winners among all atoms from those that each process finds among its own; they meet, best first, as packed keys.

Legend: B samples, k winners.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distot.assign import Assigner, Winners
from distot.grid import Split
from distot.orbit import Orbits

LOW = (1 << 32) - 1
NOBODY = -(1 << 63)  # a key that loses to all others


class Sharded:
    """``own``: the assigner over the atoms of this process; None if it has no atoms.

    All processes of the axis ask for the same samples at the same time. A call sends k numbers of 8 bytes a sample.
    """

    def __init__(self, own: Assigner | None, split: Split) -> None:
        self.own, self.split = own, split

    @property
    def name(self) -> str:
        return "none" if self.own is None else self.own.name

    @property
    def why(self) -> str:
        return "" if self.own is None else self.own.why

    @property
    def exact(self) -> Sharded:
        return Sharded(None if self.own is None else self.own.exact, self.split)

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        keys = torch.full((len(x), k + 1), NOBODY, device=heights.device)
        if self.own is not None and len(x):
            near = self.own(x, heights, min(k, self.split.count))
            keys[:, : near.index.shape[1]] = pack(near, self.split.first)
        place = torch.zeros(len(x), 1, dtype=torch.int64, device=keys.device)
        best = torch.empty_like(keys[:, :k])
        for j in range(k):
            mine = keys.gather(1, place)
            best[:, j : j + 1] = self.split.axis.max(mine)
            place += mine == best[:, j : j + 1]
        return unpack(best)


def pack(near: Winners, first: int) -> Tensor:
    """Keys (B, k) int64 in the order of scores, those of equal scores in the reverse order of indices + ``first``."""
    bits = (near.score + 0.0).view(torch.int32)  # -0.0 and 0.0 are equal
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (LOW - near.index - first)


def unpack(keys: Tensor) -> Winners:
    """The inverse of ``pack``, with indices among all atoms."""
    bits = (keys >> 32).int()
    return Winners(LOW - (keys & LOW), (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32))
