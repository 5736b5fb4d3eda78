"""What a loader shares with its workers, forked or not: numbers in memory, and which epoch an iteration has.

A loader may be iterated in this process, or by the workers of a DataLoader, each of which has a copy of it and is told
nothing of the others. The first one to begin an iteration decides its epoch and writes it down, where they find it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import current_process, parent_process, reduction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from distot.errors import InputError
from distot.pairs.noise import check_seed

ROUNDS = 256  # iterations that are remembered
FAR = 1 << 32  # epochs between two iterations of an endless loader, as nobody knows how far the one before has come

Numbered = NDArray[np.int64]


class Numbers:
    """Whole numbers (n,) in memory that a process shares with all it starts; a pickle for others has a copy of them.

    The memory has no name and no place in /dev/shm, which is small in containers. Raises InputError if there is none.
    """

    def __init__(self, count: int, descriptor: int | None = None) -> None:
        self.file: Any = _file() if descriptor is None else os.fdopen(descriptor, "r+b", buffering=0)
        try:
            if descriptor is None:
                _reserve(self.file.fileno(), 8 * count)
            self.values: Numbered = np.frombuffer(mmap.mmap(self.file.fileno(), 8 * count), dtype=np.int64)
        except OSError as error:
            raise InputError(
                f"there is no room for {8 * count:,} bytes that the workers of a loader share ({error.strerror}); take "
                "fewer samples, or leave balance out"
            ) from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process is in such a block meanwhile; one that is killed leaves it."""
        fcntl.lockf(self.file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN)

    def __reduce__(self) -> tuple[Callable[[bytes], Numbers], tuple[bytes]]:
        return _copied, (self.values.tobytes(),)


def _file() -> Any:
    """A file without a name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("distot"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _reserve(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)


def _copied(values: bytes) -> Numbers:
    found = Numbers(len(values) // 8)
    found.values[:] = np.frombuffer(values, dtype=np.int64)
    return found


def _handed_on(its: Numbers) -> tuple[Callable[[Any, int], Numbers], tuple[Any, int]]:
    return _received, (reduction.DupFd(its.file.fileno()), len(its.values))


def _received(handle: Any, count: int) -> Numbers:
    return Numbers(count, handle.detach())


reduction.ForkingPickler.register(Numbers, _handed_on)  # the pickle for processes that this one starts


class Turns:
    """The epochs of iterations: each has the one after that of the iteration before, unless ``set`` says otherwise.

    Workers of one iteration know each other by the seed that the DataLoader gave them, and by their numbers among the
    processes that it has started, as somebody may seed torch anew before each iteration. Workers that stay alive count.
    """

    def __init__(self, epoch: int, start: int, endless: bool) -> None:
        self.endless = endless
        self._first = epoch, start  # of a process that has had no iteration
        self._began = 0  # iterations in this process
        self._log = Numbers(1 + 6 * ROUNDS)  # rows written so far; owner, seed, process, turn, epoch, start

    @property
    def coming(self) -> tuple[int, int]:
        """Epoch of the next iteration, and the batches of it that were had."""
        with self._log.alone():
            return self._coming(_owner())

    def set(self, epoch: int, start: int) -> None:
        """What the next iteration is to be."""
        self._first = epoch, start
        with self._log.alone():
            self._write(_owner(), -1, 0, 0, epoch, start)

    def begin(self, epoch: int | None = None) -> tuple[int, int]:
        """Epoch and start of the iteration that begins here; ``epoch``: it is known."""
        info, owner, key = get_worker_info(), _owner(), (0, 0, 0)
        if info is not None:
            key = info.seed - info.id, _number() - info.id, self._began
        self._began += 1
        with self._log.alone():
            if info is not None:
                for _, seed, process, turn, *known in self._rows(owner).tolist():
                    if (seed, turn) == (key[0], key[2]) and abs(process - key[1]) < info.num_workers:
                        return known[0], known[1]
            found = self._coming(owner) if epoch is None else (epoch, 0)
            check_seed(0, found[0])
            self._write(owner, *key, *found)
        if info is None:
            self._first = self._after(found[0]), 0
        return found

    def _rows(self, owner: int) -> Numbered:
        """Rows of a process and its workers, newest first."""
        count = int(self._log.values[0])
        rows = self._log.values[1:].reshape(ROUNDS, 6)[np.arange(count - 1, max(-1, count - 1 - ROUNDS), -1) % ROUNDS]
        return rows[rows[:, 0] == owner]

    def _write(self, *row: int) -> None:
        count = int(self._log.values[0])
        self._log.values[1:].reshape(ROUNDS, 6)[count % ROUNDS] = row
        self._log.values[0] = count + 1

    def _coming(self, owner: int) -> tuple[int, int]:
        rows = self._rows(owner)
        if not len(rows):
            return self._first
        _, seed, _, _, epoch, start = rows[0].tolist()
        return (epoch, start) if seed < 0 else (self._after(epoch), 0)

    def _after(self, epoch: int) -> int:
        return (epoch // FAR + 1) * FAR if self.endless else epoch + 1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_first": self.coming}


class Ledger:
    """A number for each sample of one epoch, found by the first process that needs them."""

    def __init__(self, count: int) -> None:
        self._numbers = Numbers(2 + count)
        self._numbers.values[0] = -1

    def fill(self, epoch: int, count: int, find: Callable[[], Numbered]) -> None:
        """Those of the ``count`` samples of an epoch, unless they are here already; others wait meanwhile."""
        values = self._numbers.values
        with self._numbers.alone():
            if values[:2].tolist() == [epoch, count]:
                return
            values[0] = -1
            values[2 : 2 + count] = find()
            values[:2] = epoch, count

    def read(self, epoch: int, rows: slice) -> Numbered:
        """Raises InputError if they have made room for those of another epoch."""
        found = self._numbers.values[2:][rows].copy()
        if self._numbers.values[0] != epoch:
            raise InputError(
                f"with balance a loader has one epoch at a time, and epoch {epoch} has given way to another one: end "
                "an iteration before the next one, or make a loader for each"
            )
        return found


def _owner() -> int:
    """The process that iterates: this one, or the one whose DataLoader has started it."""
    parent = None if get_worker_info() is None else parent_process()
    return os.getpid() if parent is None or parent.pid is None else parent.pid


def _number() -> int:
    """Which one this is among the processes that its parent has started."""
    return (0, *current_process()._identity)[-1]
