"""What happens between blocks and steps: signals, the deadline, progress, the log, checkpoints."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, Protocol

import torch

from distot.errors import DistotWarning, StoreError
from distot.grid import Axis
from distot.signals import check, handled
from distot.store import Part, Run, TakenOver

Event = dict[str, Any]
LOG_SECONDS = 1.0  # step events are logged at most this often


class Stop(Exception):
    """Raised by ``Watch.poll`` to leave the loop: "max_seconds" or "interrupted"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Lost(Exception):
    """What a listener of our own says when it fails, once."""


class Ours:
    """A listener of our own, which a run can do without: when it fails it says so once, and hears no more."""

    def __init__(self, name: str, listen: Callable[[Event], None]) -> None:
        self.name, self.listen, self.lost = name, listen, False

    def __call__(self, event: Event) -> None:
        """Raises Lost."""
        if self.lost:
            return
        try:
            self.listen(event)
        except Lost:
            self.lost = True
            raise
        except Exception as error:
            self.lost = True
            why = " ".join(str(error).split())
            raise Lost(f"{self.name} is lost ({why or type(error).__name__}); the run goes on without it") from error


def together(*listeners: Callable[[Event], None] | None) -> Callable[[Event], None]:
    """A listener that passes events on to several, also when one of them is lost."""

    def each(event: Event) -> None:
        lost = []
        for listen in listeners:
            try:
                if listen is not None:
                    listen(event)
            except Lost as one:
                lost.append(str(one))
        if lost:
            raise Lost("; ".join(lost))

    return each


class Stoppable(Protocol):
    """Something that looks at ``signal`` now and then, and stops if it is set."""

    signal: int | None
    listen: Callable[[Event], None] | None
    failure: BaseException | None  # an error of the user's own listener, to be raised when all is saved


def pass_on(event: Event, to: Stoppable) -> str:
    """Tells the listener. Returns a sentence on what is lost by that, if anything is.

    An error of the user's own listener is kept, and stops what goes on as SIGTERM would, so that no work is lost.
    """
    try:
        if to.listen is not None:
            to.listen(event)
    except Lost as lost:
        return str(lost)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and to.signal is not None:
            raise  # a second Ctrl-C
        to.listen, to.failure, to.signal = None, error, to.signal or signal.SIGTERM
    return ""


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
        self.failure: BaseException | None = None
        self.seconds_per_sample = 0.0  # of the search, averaged over the last steps; 0 before the first
        self._saved = self._logged = self.began
        self._log_fails = self._announced = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def poll(self, reserve: float = 0.0) -> None:
        """Raises Stop after a signal, or when fewer than ``reserve`` seconds are left, in all processes or none."""
        if asked := self.asked():  # a signal may come at any moment, and must not be written over
            self.signal = asked
        if self.signal and not self._announced and not self.failure and not asked:
            self._announced = True
            pass_on({"event": "signal", "signal": signal.Signals(self.signal).name}, self)
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
        if lost := pass_on(record, self):
            self.tell("warning", text=lost)
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


@contextmanager
def signals(to: Stoppable) -> Iterator[None]:
    """Signals that ask for the end are noted in ``to``; Ctrl-C after another one raises KeyboardInterrupt at once.

    Raises ``failure`` at the end, with the solution that an interruption carries.
    """
    came: list[int] = []

    def caught(number: int, frame: FrameType | None) -> None:
        came.append(number)
        # a closed terminal and batch systems send several in a row
        if len(came) > 1 and (number == signal.SIGINT or (number, came[0]) == (signal.SIGTERM, signal.SIGINT)):
            raise KeyboardInterrupt
        to.signal = came[0]

    main = threading.current_thread() is threading.main_thread()
    try:
        with handled(caught) if main else nullcontext():
            check()
            yield
    except KeyboardInterrupt as stop:
        if to.failure is None:
            raise
        vars(to.failure)["solution"] = getattr(stop, "solution", None)
        to.failure.add_note(f"the run was stopped by this error of its listener: {str(stop).partition('; ')[2]}")
    if to.failure is not None:
        raise to.failure
