"""Watching a run with other tools: listeners for ``on_event``. docs/users.md lists the events and their fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distot.errors import InputError
from distot.watch import Event, Ours

SCALARS = {  # by event: its fields, and what they are called there
    "step": {"samples_per_second": "speed/samples_per_second", "margin": "solve/margin"},
    "check": {"chi2": "solve/chi2", "error": "solve/chi2_error", "upper": "solve/chi2_upper"},
    "certificate": {
        "chi2": "certificate/chi2",
        "chi2_error": "certificate/chi2_error",
        "empty": "certificate/empty",
        "w2_squared_bound": "certificate/w2_squared_bound",
        "w2_squared_limit": "certificate/w2_squared_limit",
        "map_cost": "certificate/map_cost",
    },
    "checkpoint": {"took": "speed/checkpoint_seconds"},
}
TEXTS = {"note": "text", "warning": "text", "stop": "text"}  # by event: its field


class TensorBoard(Ours):
    """Writes the scalars of a run to an event file in ``folder``, over the samples that were searched.

    Another run in the same folder, a resumed one say, adds a file. When it cannot be written any more, the run goes on
    without it. Raises InputError if tensorboardX is not installed, or the folder cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise InputError("TensorBoard files need tensorboardX: pip install 'distot[tensorboard]'") from error
        try:
            self.writer: Any = SummaryWriter(str(folder), flush_secs=5)
        except OSError as error:
            raise InputError(f"{folder} cannot be made for TensorBoard: {error.strerror}") from error
        super().__init__(f"TensorBoard in {folder}", self._write)
        files = self.writer.file_writer.event_writer
        self.file = files._ev_writer = files._worker._record_writer = _File(files._ev_writer)
        self.samples, self.ended = 0, False

    def _write(self, event: Event) -> None:
        if self.file.error is not None:
            raise self.file.error
        name, when = event["event"], event.get("time")
        if name in ("begin", "resume", "step", "check", "stop"):
            self.samples = event["samples"]
        for field, tag in SCALARS.get(name, {}).items():
            self.writer.add_scalar(tag, event[field], self.samples, when)
        if name in TEXTS:
            self.writer.add_text(name, event[TEXTS[name]], self.samples, when)
        self.ended |= name == "certificate" or (name == "stop" and event["reason"] == "interrupted")
        if self.ended:
            self.writer.close()  # flush() would not wait for what is still in the writer's queue


class _File:
    """The event file, written by a thread of tensorboardX: an error would end that, and then hold up the run."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write_event(self, event: Any) -> None:
        self._do(lambda: self.file.write_event(event))

    def flush(self) -> None:
        self._do(self.file.flush)

    def close(self) -> None:
        self._do(self.file.close)

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            self.error = error
