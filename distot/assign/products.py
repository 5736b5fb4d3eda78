"""Searches at the cost -log<x, y>, where the winner has the largest e^h <x, y>; docs/math.md (28).

It is the plain search of the atoms e^h y with heights 0, and of orbits, too, as x enters linearly. Products go from
share to share; logarithms are taken last, so that their rounding makes no difference between grids.

Legend: B samples, n atoms, d dimension, k winners.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distot import assign
from distot.assign import Assigner, Exact, Winners
from distot.orbit import Orbits
from distot.power import Logarithmic, factors


class Products(Exact):
    """The assigner ``name``, made anew for the scaled atoms of each call; scores are e^h <x, y>.

    For those that keep nothing of the atoms, or copy them at once; ``native`` scales what it has turned for orbits.
    Raises InputError where that assigner does.
    """

    def __init__(self, name: str, atoms: Tensor) -> None:
        self.name, self.atoms = name, atoms
        assign.build(name, atoms[:1])  # raises what it has to before work starts

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        scaled = self.atoms * factors(heights)[:, None].to(self.atoms.device)
        return assign.build(self.name, scaled)(x, torch.zeros_like(heights), k)


class Logs(Exact):
    """Scores log<x, y> + h of what ``products``, an exact assigner, finds."""

    def __init__(self, products: Assigner, cost: Logarithmic) -> None:
        self.products, self.cost = products, cost

    @property
    def name(self) -> str:
        return self.products.name

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        near = self.products(x, heights, k)
        return Winners(near.index, self.cost.scores(near.score))
