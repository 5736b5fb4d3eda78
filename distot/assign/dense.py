"""Exact search in plain torch on any device, by tiles of samples x atoms that stay in cache.

One matrix product and one group-wise maximum read each score once: the maximum of every GROUP consecutive atoms is all
that is kept of a tile. The k best atoms lie in the k best groups, which are scored again at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distot.assign import Exact, Winners
from distot.orbit import Orbits, points

GROUP = 32
TILE_ROWS, TILE_ATOMS = 512, 2048  # 4 MiB of scores on the CPU
TILE_ROWS_CUDA, TILE_ATOMS_CUDA = 4096, 4096  # 64 MiB on a GPU, where a launch must be worth its while
RESCORE_BYTES = 4 << 20


class Dense(Exact):
    name = "dense"

    def __init__(self, atoms: Tensor) -> None:
        self.atoms = atoms
        on_gpu = atoms.device.type == "cuda"
        self.rows = TILE_ROWS_CUDA if on_gpu else TILE_ROWS
        self.width = TILE_ATOMS_CUDA if on_gpu else TILE_ATOMS

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        x = points(x)
        h = heights.to(dtype=torch.float32, device=x.device)
        parts = [self._rows(x[a : a + self.rows], h, k) for a in range(0, len(x), self.rows)]
        if not parts:
            return Winners(torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))
        index, score = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return Winners(index, score)

    def _rows(self, x: Tensor, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
        n, b = len(self.atoms), len(x)
        tile = torch.empty(b, min(self.width, -(-n // GROUP) * GROUP), dtype=torch.float32, device=x.device)
        score = torch.empty(b, 0, dtype=torch.float32, device=x.device)
        group = torch.empty(b, 0, dtype=torch.int64, device=x.device)
        for a in range(0, n, self.width):
            y = self.atoms[a : a + self.width]
            groups = -(-len(y) // GROUP)
            tile[:, len(y) : groups * GROUP] = -torch.inf
            torch.addmm(h[a : a + len(y)], x, y.T, out=tile[:, : len(y)])
            best = tile[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amax(dim=2)
            index = torch.arange(a // GROUP, a // GROUP + groups, device=x.device).expand(b, -1)
            score, group = best_of(torch.cat([score, best], 1), torch.cat([group, index], 1), k)
        return self._rescore(x, h, group.sort(dim=1).values, k)

    def _rescore(self, x: Tensor, h: Tensor, group: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Index and score (B, k) of the k best among the atoms of the groups (B, k), which are in ascending order."""
        n, d = self.atoms.shape
        member = torch.arange(GROUP, device=x.device)
        step = max(1, RESCORE_BYTES // (4 * d * GROUP * group.shape[1]))
        parts = []
        for a in range(0, len(x), step):
            index = (group[a : a + step, :, None] * GROUP + member).flatten(1)  # (b, k * GROUP)
            inside = index.clamp_max(n - 1)
            score = torch.bmm(self.atoms[inside], x[a : a + step, :, None]).squeeze(2) + h[inside]
            parts.append(best_of(score.masked_fill_(index >= n, -torch.inf), index, k))
        score, index = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return index, score


def best_of(score: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, best first; of equal ones the leftmost first. Overwrites ``score``."""
    k = min(k, score.shape[1])
    if k > 4:
        order = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return score.gather(1, order), index.gather(1, order)
    values, places = [], []
    for _ in range(k):
        value, place = score.max(dim=1, keepdim=True)
        score.scatter_(1, place, -torch.inf)
        values.append(value)
        places.append(place)
    return torch.cat(values, 1), index.gather(1, torch.cat(places, 1))
