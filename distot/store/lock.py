"""Who may write to a run: one process at a time.

In a folder the operating system keeps the lock, and gives it up when the process ends, however it ends. In an object
store the owner's file is a lease: its writer renews it, every time on the condition that nobody has touched it since.
Who finds it unchanged for LEASE seconds takes it over, on the same condition; a writer that was only slow learns so at
its next commit, and stops.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from filelock import FileLock, Timeout

from distot.errors import StoreError
from distot.store.files import check_plain, content, explained, write_atomically
from distot.store.forms import Form, Malformed, Maybe, check, parsed
from distot.store.places import Place, Tag, Url

RENEWED = 5.0  # seconds
LEASE = 30.0
OWNER: Form = {"pid": Maybe(int), "host": Maybe(str), "since": Maybe(str), "group": Maybe(str)}

Fence = Callable[[], None]
"""Raises TakenOver if another writer has taken the run over."""


class TakenOver(StoreError):
    """Another process has become the writer of this run."""


@contextmanager
def writer(path: Place, group: str | None = None) -> Iterator[Fence]:
    """Holds the lock of the run at ``path``. Raises StoreError if another process holds it.

    group: a name that processes share of which the one is known to be dead when the next one comes.
    """
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    if isinstance(path, Url):
        lease = _Lease(path, me | {"group": group or secrets.token_hex(8)})
        try:
            yield lease.renew
        finally:
            lease.end()
        return
    owner, lock = path / "owner.json", FileLock(path / ".lock")
    check_plain(path / ".lock")
    with explained("lock", path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise _busy(path, _who(content(owner) if owner.exists() else b"{}")) from None
        except NotImplementedError as error:  # of older versions of filelock
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    try:
        with explained("write", owner):
            write_atomically(owner, json.dumps(me))
        yield lambda: None
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _who(text: bytes) -> dict[str, Any]:
    """What an owner's file says; nothing if it is damaged, for it only serves to find the writer."""
    try:
        who = parsed(text)
        check(who, OWNER, others=True)
    except Malformed:
        return {}
    return who


def _busy(path: Place, who: dict[str, Any]) -> StoreError:
    return StoreError(
        f"{path} is being written by process {who.get('pid', 'unknown')} on host {who.get('host', 'unknown')} since "
        f"{who.get('since', 'just now')}; wait for it or stop it"
    )


class _Lease:
    """The owner's file of a run in an object store."""

    def __init__(self, run: Url, me: dict[str, Any]) -> None:
        self.run, self.file, self.me = run, run / "owner.json", me
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.tag = self._take()
        self.beats = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.beats.start()

    def _content(self) -> bytes:
        return json.dumps(self.me | {"renewed": secrets.token_hex(4)}).encode()

    def _take(self) -> Tag:
        """Waits until the file is gone, or has not changed for long enough."""
        seen: Tag | None = None
        while True:
            found = self.file.tagged()
            who = {} if found is None else _who(found[0])
            if found is not None and who.get("group") != self.me["group"]:
                if seen is None:
                    seen, since = found[1], time.monotonic()
                if found[1] != seen:
                    raise _busy(self.run, who)
                if time.monotonic() - since < LEASE:
                    time.sleep(RENEWED / 5)
                    continue
            tag = self.file.swap(self._content(), None if found is None else found[1])
            if tag is None:  # another one was faster
                raise _busy(self.run, _who((self.file.tagged() or (b"{}", {}))[0]))
            return tag

    def renew(self) -> None:
        with self.lock:
            tag = self.file.swap(self._content(), self.tag)
            if tag is None:
                self.ended.set()
                who = _who((self.file.tagged() or (b"{}", {}))[0])
                raise TakenOver(
                    f"{self.run} was taken over by process {who.get('pid', 'unknown')} on host "
                    f"{who.get('host', 'unknown')}, as this one had been silent for too long; nothing more is written"
                )
            self.tag = tag

    def _beat(self) -> None:
        while not self.ended.wait(RENEWED):
            with suppress(StoreError):  # the writer hears of it at its next commit
                self.renew()

    def end(self) -> None:
        lost = self.ended.is_set()
        self.ended.set()
        self.beats.join()
        if not lost:
            with suppress(StoreError):  # it runs out by itself
                self.file.unlink(missing_ok=True)
