"""The fastest search for the problem at hand, by measurement: candidates are timed on the very samples of the calls."""

from __future__ import annotations

import time
from importlib.util import find_spec

from torch import Tensor

from distot import assign
from distot.assign import Assigner, Winners
from distot.assign.native import Native
from distot.orbit import Orbits

LEAST = 4096  # atoms, from which lists may be worth their while
CLEAR, PATIENCE = 2.0, 4  # so many times as slow in call 4 or later: dropped
BETTER = 1.1  # times as fast as the plain choice, to be preferred to it


class Auto:
    """On the CPU ``native`` or ``lists``, with a ``recall`` if one is given; on a GPU ``dense`` or ``triton``.

    The choice is looked at again in calls 1, 2, 4, ..., as heights change; a rival that is clearly slower is dropped.
    ``name`` is that of the choice, ``why`` says what was measured.
    """

    def __init__(self, atoms: Tensor, recall: float | None = None) -> None:
        self.rival: Assigner | None = None
        self.plain = assign.plain(atoms)
        if isinstance(self.plain, Native):
            if len(atoms) >= LEAST:
                from distot.assign.likely import Likely
                from distot.assign.lists import Lists

                self.rival = Lists(atoms, self.plain) if recall is None else Likely(atoms, recall, self.plain)
        elif find_spec("triton"):
            from distot.assign.triton import Triton

            self.rival = Triton(atoms)
        self.choice: Assigner = self.plain
        self.recall, self.calls = recall, 0
        self.why = "nothing else to choose" if self.rival is None else "nothing measured yet"

    @property
    def name(self) -> str:
        return self.choice.name

    @property
    def exact(self) -> Assigner:
        return self if self.recall is None else self.plain

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        self.calls += 1
        if self.rival is None or self.calls & (self.calls - 1) or not len(x):
            return self.choice(x, heights, k)
        rival = self.rival
        near = rival(x, heights, k)  # lists learn from their first call
        plain, other = (_seconds(search, x, heights, k) for search in (self.plain, rival))
        self.choice = rival if plain > BETTER * other else self.plain
        self.why = f"{rival.name} took {other / plain:.2f} of the time of {self.plain.name} for {len(x):,} samples"
        if other > CLEAR * plain and self.calls >= PATIENCE:
            self.rival = None
        return near


def _seconds(search: Assigner, x: Tensor | Orbits, heights: Tensor, k: int) -> float:
    """The better of two calls, to the arrival of the last score; lists may learn in one of them."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        search(x, heights, k).score[-1:].tolist()
        times.append(time.perf_counter() - began)
    return min(times)
