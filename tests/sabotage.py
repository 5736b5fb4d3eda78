"""A problem for workers, its answer in one process, and somebody who kills them."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import pytest

import distot
from cluster.workers import Shape, on_workers
from distot.schedule import Options
from distot.solution import Solution
from distot.store import Place
from distot.work import Solve

CLOUD = np.random.default_rng(3).standard_normal((3000, 5)) * np.linspace(2, 0.4, 5)
WORK = 24_000
OPTIONS = Options(
    until_chi2=None, max_samples=WORK, assigner="native", certificate_samples=20_000, checkpoint_seconds=0.1
)
WHOLE: dict[str, Any] = {"until_chi2": None, "max_samples": WORK, "assigner": "native", "certificate_samples": 20_000}


@cache
def alone() -> Solution:
    """The same problem in this process."""
    return distot.solve(CLOUD, progress=False, **WHOLE)


def assert_right(found: Solution) -> None:
    expected = alone()
    assert found.samples == expected.samples
    assert np.allclose(found.heights, expected.heights, rtol=0, atol=1e-8 * np.abs(expected.heights).max())
    assert found.certificate.chi2 == pytest.approx(expected.certificate.chi2, rel=1e-8)
    assert found.certificate.w2_squared_bound == pytest.approx(expected.certificate.w2_squared_bound, rel=1e-8)


class Saboteur:
    """Hears events, and sends a signal to one worker after another, each time after the second checkpoint."""

    def __init__(self, number: int, *ranks: int) -> None:
        self.number, self.ranks = number, list(ranks)
        self.pids: list[int] = []
        self.events: list[dict[str, Any]] = []
        self.checkpoints = 0  # since the workers started

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["event"] == "workers":
            self.pids = event["pids"]
            self.checkpoints = 0
        self.checkpoints += event["event"] == "checkpoint"
        if self.ranks and self.checkpoints == 2:
            self.checkpoints = 3
            os.kill(self.pids[self.ranks.pop(0)], self.number)

    def said(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.events if record["event"] == event]


def solved(shape: Shape, run: Place, listen: Any = None, options: Options = OPTIONS, latents: Any = CLOUD) -> Solution:
    found: Solution = on_workers(Solve(latents, "gaussian", None, options, run), shape, False, listen)
    return found
