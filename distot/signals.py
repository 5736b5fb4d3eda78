"""Signals that ask a process to end: which they are, and what they do where no run listens to them.

Nothing is imported here that takes time, so that a command hears them from its first moment on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

ALWAYS = (signal.SIGINT, signal.SIGTERM)
# of a closed terminal and of batch systems: only where they would end the process, not where they are ignored (nohup)
# or mean something to the program that this is a part of
ELSE = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))

Handler = Callable[[int, FrameType | None], object]
_ours: list[Handler] = []
_asked: list[int] = []  # what was raised as Stopped, and might have been swallowed


class Stopped(KeyboardInterrupt):
    """One of these signals came where no run listens: what was begun is cleared away, and all ends."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """These signals go to ``handler``, and afterwards to whoever had them before."""
    before = {}
    _ours.append(handler)
    try:
        for number in (*ALWAYS, *ELSE):
            now = signal.getsignal(number)
            if number in ALWAYS or now is signal.SIG_DFL or now in _ours:
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, its in before.items():
            signal.signal(number, signal.SIG_DFL if its is None else its)
        _ours.remove(handler)


@contextmanager
def raised() -> Iterator[None]:
    """These signals raise Stopped."""
    _asked.clear()
    with handled(_raise):
        yield


def check() -> None:
    """Raises Stopped if it was raised before and went lost, in a library that catches everything."""
    if _asked:
        raise Stopped(_asked[-1])


def command() -> bool:
    """Whether this process was started to be a command: as ``distot``, or by ``python -m`` and one of our modules."""
    if os.path.basename(sys.argv[0]).removesuffix(".exe") == "distot":
        return True
    words = iter(sys.orig_argv[1:])
    for word in words:
        if not word.startswith("-") or word.startswith("--") or word in ("-", "-c"):
            return False
        if word.endswith("m"):
            return next(words, "").split(".")[0] in ("distot", "jobs")
        if word in ("-X", "-W"):
            next(words, None)
    return False


def quit_at_once() -> None:
    """From now on these signals end the process in the moment: for the time before a command has begun anything."""
    _ours.append(_quit)
    for number in (*ALWAYS, *ELSE):
        if number in ALWAYS or signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _quit)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    _asked.append(number)
    raise Stopped(number)


def _quit(number: int, frame: FrameType | None) -> NoReturn:
    with suppress(OSError):  # nobody may be there to read it
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)
