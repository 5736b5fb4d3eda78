"""What happens between blocks and steps: signals, the deadline, progress, the log, checkpoints."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch

from distot.errors import DistotWarning, StoreError
from distot.grid import Axis
from distot.store import Part, Run, TakenOver

Event = dict[str, Any]
LOG_SECONDS = 1.0  # step events are logged at most this often


class Stop(Exception):
    """Raised by ``Watch.poll`` to leave the loop: "max_seconds" or "interrupted"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Watch:
    """Told of everything that happens in a run; raises Stop when it is time to go.

    ``listen`` gets every event as a dict with the key "event"; a run gets them in its log as well. Of the processes of
    ``world`` the first one speaks for all. ``asked`` gives the number of a signal that came some other way; ``spent``
    seconds of ``max_seconds`` are gone already.
    """

    def __init__(
        self,
        run: Run | None = None,
        listen: Callable[[Event], None] | None = None,
        max_seconds: float | None = None,
        checkpoint_seconds: float = 60.0,
        world: Axis | None = None,
        asked: Callable[[], int | None] = lambda: None,
        spent: float = 0.0,
    ) -> None:
        self.run, self.listen, self.world, self.asked = run, listen, world or Axis(), asked
        self.began = time.monotonic()
        self.deadline = None if max_seconds is None else self.began + max_seconds - spent
        self.checkpoint_seconds = checkpoint_seconds
        self.signal: int | None = None
        self.seconds_per_sample = 0.0  # of the search, averaged over the last steps; 0 before the first
        self._saved = self._logged = self.began
        self._log_fails = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def poll(self, reserve: float = 0.0) -> None:
        """Raises Stop after a signal, or when fewer than ``reserve`` seconds are left, in all processes or none."""
        if asked := self.asked():  # a signal may come at any moment, and must not be written over
            self.signal = asked
        late = self.deadline is not None and time.monotonic() > self.deadline - reserve
        number, late = self.world.max(torch.tensor([self.signal or 0, int(late)])).tolist()
        if number:
            self.signal = number
            raise Stop("interrupted")
        if late:
            raise Stop("max_seconds")

    @contextmanager
    def timed(self, samples: int) -> Iterator[None]:
        """Measures what a sample costs."""
        began = time.monotonic()
        yield
        now = (time.monotonic() - began) / samples
        self.seconds_per_sample = 0.8 * self.seconds_per_sample + 0.2 * now if self.seconds_per_sample else now

    def tell(self, event: str, **fields: Any) -> None:
        """Passes an event on to the listener and to the log (steps: at most one a second)."""
        if self.world.rank:
            return
        record = {"event": event, "time": time.time(), "seconds": round(self.seconds, 3)} | fields
        if self.listen is not None:
            self.listen(record)
        now = time.monotonic()
        if self.run is not None and (event != "step" or now - self._logged >= LOG_SECONDS):
            self._logged = now
            try:
                self.run.log(record)
                self._log_fails = False
            except StoreError as error:
                if not self._log_fails:
                    self._log_fails = True
                    self.warn(f"{error}; the run goes on without its log")

    def warn(self, text: str) -> None:
        """Says that something failed which the run can do without."""
        if not self.world.rank:
            warnings.warn(text, DistotWarning, stacklevel=2)
            self.tell("warning", text=text)

    def due(self) -> bool:
        """Whether a checkpoint is due."""
        return self.run is not None and self.world.any(time.monotonic() - self._saved >= self.checkpoint_seconds)

    def save(self, step: int, part: Part, scalars: dict[str, Any], must: bool = False) -> None:
        """Writes a checkpoint, of which this process has one part.

        If that fails the run goes on and tries again later, unless it ``must`` succeed. Raises TakenOver if another
        writer has come.
        """
        if self.run is None:
            return
        began = time.monotonic()
        try:
            name = self.run.save_checkpoint(step, part, scalars, self.world)
        except StoreError as error:
            if must or isinstance(error, TakenOver):
                raise
            self.warn(f"{error}; the run goes on and will try again")
        else:
            self.tell("checkpoint", name=name, step=step, took=round(time.monotonic() - began, 4))
        self._saved = time.monotonic()


class Stoppable(Protocol):
    """Something that looks at ``signal`` now and then, and stops if it is set."""

    signal: int | None
    listen: Callable[[Event], None] | None


@contextmanager
def signals(to: Stoppable) -> Iterator[None]:
    """Ctrl-C and SIGTERM are noted in ``to``; a second Ctrl-C raises KeyboardInterrupt at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def caught(number: int, frame: FrameType | None) -> None:
        if to.signal is not None:
            raise KeyboardInterrupt
        to.signal = number
        if to.listen is not None:
            to.listen({"event": "signal", "signal": signal.Signals(number).name})

    before = {number: signal.signal(number, caught) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
