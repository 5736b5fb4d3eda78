"""The fastest search for the problem at hand, by trial.

Scores of orbits and of plain samples differ by rounding, and two runs that choose differently drift apart by as much as
sampling noise. So for orbits the choice is made once, from what lists would compute of some samples that the problem
alone decides: it is the same in a run that goes on, and for its certificate. For plain samples the answer is the same
bit for bit whichever is taken, and the samples of the calls themselves decide, again and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from distot import assign
from distot.assign import Assigner, Winners
from distot.assign.native import Native
from distot.orbit import Orbits, points, work

if TYPE_CHECKING:
    from distot.assign.lists import Lists

LEAST = 4096  # atoms, from which lists may be worth their while
ROUTE = 50.0  # scores that a list costs every sample, visited or not
ENOUGH, USELESS = 0.8, 0.9  # of the work of the plain choice: lists are taken below the one, dropped above the other
CLEAR, PATIENCE = 2.0, 4  # so many times as slow in call 4 or later: dropped
BETTER = 1.1  # times as fast by the clock, to be preferred to the plain choice
LEARNED, JUDGED = 2.0, 256  # samples for each list that are searched for the choice, and samples that are counted

Trial = Callable[[int], tuple[Tensor | Orbits, Tensor]]
"""At least so many samples of a problem, as its steps draw them, and heights (n,) to search them by."""


class Auto:
    """On the CPU ``native`` or ``lists``; on a GPU ``dense``, as a rival would have to be chosen by the clock.

    With a ``recall`` on the CPU the clock may choose, for lists that miss some depend on what they have seen anyway.
    The choice for plain samples is looked at again in calls 1, 2, 4, ...; a rival that is clearly slower is dropped.
    ``name`` is that of the choice, ``why`` says what was measured. ``among``: how many atoms there are in all, if these
    are a share of them. trial: by which the choice for orbits is made; None: the plain search.
    """

    def __init__(
        self, atoms: Tensor, recall: float | None = None, among: int | None = None, trial: Trial | None = None
    ) -> None:
        self.rival: Assigner | None = None
        self.lists: Lists | None = None  # the rival, if its scores decide
        self.plain = assign.plain(atoms)
        self.recall, self.calls, self.trial = recall, 0, trial
        if isinstance(self.plain, Native) and (among or len(atoms)) >= LEAST:
            from distot.assign.likely import Likely  # k-means is of FAISS, which small problems can do without
            from distot.assign.lists import Lists

            if recall is None:
                self.rival = self.lists = Lists(atoms, self.plain)
            else:
                self.rival = Likely(atoms, recall, self.plain)
        self.choice: Assigner = self.plain
        self.orbits: Assigner | None = None  # the choice for them, once it is made
        self.why = "nothing else to choose" if self.rival is None else "nothing measured yet"

    @property
    def name(self) -> str:
        return (self.orbits or self.choice).name

    @property
    def exact(self) -> Assigner:
        return self if self.recall is None else self.plain

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        if self.recall is None and isinstance(x, Orbits):
            self.orbits = self.orbits or self._of_orbits()
            return self.orbits(x, heights, k)
        self.calls += 1
        if self.rival is None or self.calls & (self.calls - 1) or not len(x):
            return self.choice(x, heights, k)
        rival = self.rival
        scored = 0.0 if self.lists is None else self.lists.scored
        near = rival(x, heights, k)  # lists learn from their first call
        if self.lists is not None:
            share = (self.lists.scored - scored) / len(x)
            cheaper, slower = self._counted(share, 1.0)
        else:
            plain, other = (_seconds(search, x, heights, k) for search in (self.plain, rival))
            cheaper, slower = plain > BETTER * other, other > CLEAR * plain
            self.why = f"{rival.name} took {other / plain:.2f} of the time of {self.plain.name} for {len(x):,} samples"
        self.choice = rival if cheaper else self.plain
        if slower and self.calls >= PATIENCE:
            self.rival = None
        return near

    def _of_orbits(self) -> Assigner:
        """The choice for orbits, which depends on nothing that was searched before."""
        if self.lists is None or self.trial is None:
            return self.plain
        lists = self.lists.anew()
        learned = round(LEARNED * len(lists.groups.sizes))
        x, heights = self.trial(learned + JUDGED)
        samples = points(x)
        lists(samples[:learned], heights)
        before, judges = lists.scored, samples[learned:]
        lists(judges, heights)
        cheaper, _ = self._counted((lists.scored - before) / len(judges), work(x))
        return lists if cheaper else self.plain

    def _counted(self, share: float, cost: float) -> tuple[bool, bool]:
        """Whether lists that compute this share of all scores are cheaper than a search of that cost; clearly not."""
        assert self.lists is not None
        self.why = f"lists computed {share:.1%} of all scores, {self.plain.name} costs {cost:.1%} of them"
        return share + ROUTE * self.lists.density < ENOUGH * cost, share > USELESS * cost


def _seconds(search: Assigner, x: Tensor | Orbits, heights: Tensor, k: int) -> float:
    """The better of two calls, to the arrival of the last score; lists may learn in one of them."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        search(x, heights, k).score[-1:].tolist()
        times.append(time.perf_counter() - began)
    return min(times)
