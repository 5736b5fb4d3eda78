"""The processors of this process are not those of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distot import environment


def test_processors_that_the_process_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    monkeypatch.setattr(environment, "_quota", lambda: float("inf"))
    assert environment.cores() == 3
    monkeypatch.setattr(environment, "_quota", lambda: 1.5)
    assert environment.cores() == 2
    monkeypatch.setattr(environment, "_quota", lambda: 0.2)
    assert environment.cores() == 1


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu.cfs_quota_us": "200000\n", "cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_processors_that_a_control_group_allows(tmp_path: Path, files: dict[str, str], allowed: float) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert environment._allowed(tmp_path) == allowed
