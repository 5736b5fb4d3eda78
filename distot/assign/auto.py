"""The fastest search for the problem at hand, by trial on the very samples of the calls.

Between exact searches on a CPU it is the share of scores that lists compute which decides, and not the clock: scores of
orbits and of plain samples differ by rounding, and so would the answers of two runs that chose differently.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import Tensor

from distot import assign
from distot.assign import Assigner, Winners
from distot.assign.native import Native
from distot.orbit import Orbits, work

if TYPE_CHECKING:
    from distot.assign.lists import Lists

LEAST = 4096  # atoms, from which lists may be worth their while
ROUTE = 50.0  # scores that a list costs every sample, visited or not
ENOUGH, USELESS = 0.8, 0.9  # of the work of the plain choice: lists are taken below the one, dropped above the other
CLEAR, PATIENCE = 2.0, 4  # so many times as slow in call 4 or later: dropped
BETTER = 1.1  # times as fast by the clock, to be preferred to the plain choice


class Auto:
    """On the CPU ``native`` or ``lists``, with a ``recall`` if one is given; on a GPU ``dense`` or ``triton``.

    The choice is looked at again in calls 1, 2, 4, ..., as heights change; a rival that is clearly slower is dropped.
    ``name`` is that of the choice, ``why`` says what was measured. ``among``: how many atoms there are in all, if these
    are a share of them.
    """

    def __init__(self, atoms: Tensor, recall: float | None = None, among: int | None = None) -> None:
        self.rival: Assigner | None = None
        self.lists: Lists | None = None  # the rival, if its scores decide
        self.plain = assign.plain(atoms)
        self.recall, self.calls = recall, 0
        if isinstance(self.plain, Native):
            if (among or len(atoms)) >= LEAST:
                from distot.assign.likely import Likely
                from distot.assign.lists import Lists

                if recall is None:
                    self.rival = self.lists = Lists(atoms, self.plain)
                else:
                    self.rival = Likely(atoms, recall, self.plain)
        elif find_spec("triton"):
            from distot.assign.triton import Triton

            self.rival = Triton(atoms)
        self.choice: Assigner = self.plain
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
        scored = 0.0 if self.lists is None else self.lists.scored
        near = rival(x, heights, k)  # lists learn from their first call
        if self.lists is not None:
            share, cost = (self.lists.scored - scored) / len(x), work(x)
            cheaper = share + ROUTE * self.lists.density < ENOUGH * cost
            slower = share > USELESS * cost
            self.why = f"{rival.name} computed {share:.1%} of all scores, {self.plain.name} costs {cost:.1%} of them"
        else:
            plain, other = (_seconds(search, x, heights, k) for search in (self.plain, rival))
            cheaper, slower = plain > BETTER * other, other > CLEAR * plain
            self.why = f"{rival.name} took {other / plain:.2f} of the time of {self.plain.name} for {len(x):,} samples"
        self.choice = rival if cheaper else self.plain
        if slower and self.calls >= PATIENCE:
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
