"""Exact search of atoms that are not in memory as float32: they come tile by tile and are forgotten again.

Every tile meets all samples of the call, so a call should bring enough of them: ``Problem.groups`` sees to it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing

import torch
from torch import Tensor

from distot.assign import Exact, Winners, build
from distot.assign.dense import best_of
from distot.assign.native import Native
from distot.atoms import Framed
from distot.errors import InputError
from distot.orbit import Orbits


class Tiled(Exact):
    """``name``: of the assigner that searches each tile: "native", bit for bit as it would search all atoms at once,
    "dense" or "triton". ``poll`` is called between tiles and may raise to stop. products: as in ``Native``.

    Raises InputError where that assigner does, and in a call what reading the atoms raises.
    """

    def __init__(
        self, atoms: Framed, name: str, poll: Callable[[], None] = lambda: None, products: bool = False
    ) -> None:
        if name == "native" and atoms.device.type != "cpu":
            raise InputError(f"the native assigner searches on the CPU, the atoms are on {atoms.device}; use 'dense'")
        self.atoms, self.name, self.poll, self.products = atoms, name, poll, products

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        near = Winners(torch.empty(len(x), k, dtype=torch.int64), torch.empty(len(x), k))
        if not len(x):
            return near
        with closing(self._tiles(k)) as tiles:
            for first, tile in tiles:
                self.poll()
                h = heights[first : first + len(tile)]
                if self.name == "native":
                    near = Native(tile, products=self.products).go_on(x, h, near, first)
                else:
                    found = build(self.name, tile, products=self.products)(x, h, min(k, len(tile)))
                    near = found if first == 0 else _merged(near, found, first, k)
        return near

    def _tiles(self, k: int) -> Generator[tuple[int, Tensor]]:
        """The tiles, the first of them of at least k atoms."""
        begun: list[Tensor] = []
        with closing(self.atoms.tiles()) as tiles:
            for first, tile in tiles:
                begun.append(tile)
                if first + len(tile) >= k:
                    joined = torch.cat(begun) if len(begun) > 1 else tile
                    yield first + len(tile) - len(joined), joined
                    begun = []


def _merged(near: Winners, found: Winners, first: int, k: int) -> Winners:
    """The k best of winners and of those among later atoms, which count from ``first``."""
    score, index = torch.cat([near.score, found.score], 1), torch.cat([near.index, found.index + first], 1)
    score, index = best_of(score, index, k)
    return Winners(index, score)
