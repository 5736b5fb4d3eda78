"""The cost model: what must hold whatever its rates are, and its counts against real runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from grids import on_grid

import distot
from distot import optim
from distot.case import Room
from distot.errors import InputError
from distot.grid import Grid
from distot.plan import MACHINES, duration, parse_machines, plan, table
from distot.schedule import Options
from distot.work import Solve

CPU = MACHINES["cpu"]


def test_counts_are_those_of_a_run() -> None:
    """Steps and samples to a goal, within what luck and the shape of the data may change."""
    n, d, goal = 2000, 16, 0.1
    events: list[dict[str, Any]] = []
    latents = np.random.default_rng(0).standard_normal((n, d))
    found = distot.solve(latents, until_chi2=goal, progress=False, on_event=events.append)
    expected = plan(n, d, CPU, goal=goal)
    steps = sum(event["event"] == "step" for event in events)
    assert 0.3 < steps / expected.steps < 3
    assert 0.3 < found.samples / (n * expected.samples) < 3


def traffic(grid: Grid, n: int, d: int) -> float:
    """Median bytes that this process sends in a step."""
    optim.SMALL = 100  # so that the pairs stay where they are
    events: list[dict[str, Any]] = []
    latents = np.random.default_rng(0).standard_normal((n, d))
    options = Options(until_chi2=None, max_samples=3 * n, assigner="native")
    Solve(latents, "gaussian", None, options)(Room(grid, show=False, on_event=events.append))
    return float(np.median(np.diff([event["sent"] for event in events if event["event"] == "step"])))


def test_traffic_is_that_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that two workers send for each step."""
    n, d = 5000, 4
    monkeypatch.setattr(optim, "SMALL", 100)
    expected = plan(n, d, CPU, 2)
    assert 0.4 < on_grid((2, 1), traffic, n, d)[0] / (expected.sent / expected.steps) < 2


def test_more_workers_are_faster_and_hold_less() -> None:
    for machine in MACHINES.values():
        few, many = plan(10**8, 64, machine, 8), plan(10**8, 64, machine, 64)
        assert many.seconds < few.seconds
        assert many.latents == pytest.approx(few.latents / 8)
        assert many.bytes < few.bytes
    assert plan(10**7, 64, CPU, 8, replicas=4).latents == 4 * plan(10**7, 64, CPU, 8).latents
    assert not plan(10**9, 64, MACHINES["h200"], 1).fits
    assert plan(10**6, 32, replace(CPU, gflops=2 * CPU.gflops)).search == pytest.approx(plan(10**6, 32, CPU).search / 2)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="'8 cars' names no machines"):
        parse_machines("8 cars")
    with pytest.raises(InputError, match="one of cpu, h200, h100, l40s"):
        parse_machines("8x abacus")
    with pytest.raises(InputError, match="3 workers cannot hold 2 replicas"):
        plan(1000, 2, CPU, 3, 2)
    with pytest.raises(InputError, match="no such problem: N = 1"):
        plan(1, 2, CPU)
    assert parse_machines(" 64x H200 ") == (64, MACHINES["h200"])


def test_table_says_what_does_not_fit() -> None:
    lines = table([plan(10**9, 64, MACHINES["h200"], workers) for workers in (8, 64)])
    assert len(lines) == 4
    assert "(too much)" in lines[2]
    assert "(too much)" not in lines[3]
    assert [duration(seconds) for seconds in (5, 90, 7200, 1e6)] == ["5 s", "1.5 min", "2.0 h", "11.6 d"]
