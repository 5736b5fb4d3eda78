"""Listeners: TensorBoard's own reader finds in its files what the run has told."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import distot

LATENTS = np.random.default_rng(0).standard_normal((80, 3))


def test_tensorboard_has_what_was_told(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    board = distot.live.TensorBoard(tmp_path / "board")

    def both(event: dict[str, Any]) -> None:
        told.append(event)
        board(event)

    solution = distot.solve(LATENTS, until_chi2=0.1, progress=False, on_event=both)
    found = EventAccumulator(str(tmp_path / "board"))
    found.Reload()
    looks = found.Scalars("solve/chi2")
    assert [look.step for look in looks] == [look.samples for look in solution.history]
    assert [look.value for look in looks] == pytest.approx([look.chi2 for look in solution.history], rel=1e-6)
    checks = [event["time"] for event in told if event["event"] == "check"]
    assert [look.wall_time for look in looks] == pytest.approx(checks, abs=1e-3)
    (chi2,) = found.Scalars("certificate/chi2")
    assert chi2.value == pytest.approx(solution.certificate.chi2, rel=1e-6)
    assert chi2.step == solution.samples
    assert len(found.Scalars("speed/samples_per_second")) == sum(event["event"] == "step" for event in told)
    assert "stop/text_summary" in found.Tags()["tensors"]


def test_without_tensorboardx_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "tensorboardX":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(distot.InputError, match=r"pip install 'distot\[tensorboard\]'"):
        distot.live.TensorBoard(tmp_path / "board")


def test_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(distot.InputError, match="cannot be made for TensorBoard"):
        distot.live.TensorBoard(tmp_path / "file" / "board")
