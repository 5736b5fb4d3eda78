"""Listeners: TensorBoard's own reader finds in its files what the run has told."""

from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import distot
from distot.store import Run

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


def rows(run: Path, kind: str) -> list[str]:
    """Texts of the events of this kind in the log of a run."""
    return [event["text"] for event in Run(run).records() if event["event"] == kind]


def test_an_error_of_a_listener_loses_no_work(tmp_path: Path) -> None:
    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "check":
            raise ZeroDivisionError("mine")

    whole = distot.solve(LATENTS, until_chi2=0.1, run=tmp_path / "whole.zarr", progress=False)
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        distot.solve(LATENTS, until_chi2=0.1, run=tmp_path / "run.zarr", progress=False, on_event=listen)
    (note,) = caught.value.__notes__
    assert f"go on with: distot resume {tmp_path / 'run.zarr'}" in note
    assert distot.load(tmp_path / "run.zarr").reason == "interrupted"
    resumed = distot.resume(tmp_path / "run.zarr", progress=False)
    np.testing.assert_array_equal(resumed.heights, whole.heights)

    with pytest.raises(ZeroDivisionError) as caught:
        distot.solve(LATENTS, until_chi2=0.1, progress=False, on_event=listen)
    assert np.isfinite(caught.value.solution.heights).all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["begin", "start", "step", "checkpoint", "stop", "certify", "certificate"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_an_error_at_any_event_is_raised_when_all_is_saved(
    tmp_path: Path, name: str, error: type[BaseException]
) -> None:
    def listen(event: dict[str, Any]) -> None:
        if event["event"] == name:
            raise error("mine")

    with pytest.raises(error, match="mine"):
        distot.solve(LATENTS, until_chi2=0.1, run=tmp_path / "run.zarr", progress=False, on_event=listen)
    assert Run(tmp_path / "run.zarr").load_checkpoint() is not None


def test_tensorboard_that_cannot_be_written_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = distot.live.TensorBoard(tmp_path / "board")

    def full(event: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board.file.file, "write_event", full)
    solution = distot.solve(LATENTS, until_chi2=0.02, run=tmp_path / "run.zarr", progress=False, on_event=board)
    assert solution.reason == "until_chi2"
    (text,) = rows(tmp_path / "run.zarr", "warning")
    assert "TensorBoard" in text
    assert "No space left on device" in text
    assert "the run goes on without it" in text


def test_a_terminal_that_is_gone_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    heard: list[str] = []
    with os.fdopen(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        solution = distot.solve(
            LATENTS,
            until_chi2=0.1,
            run=tmp_path / "run.zarr",
            progress=True,
            on_event=lambda e: heard.append(e["event"]),
        )
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    assert solution.reason == "until_chi2"
    (text,) = rows(tmp_path / "run.zarr", "warning")
    assert text == "the terminal is lost ([Errno 32] Broken pipe); the run goes on without it"
    assert heard[0] == "begin"
    assert heard[-1] == "certificate"
