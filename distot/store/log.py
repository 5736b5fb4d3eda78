"""The log of a run, a JSON object a line: log.jsonl in a folder; in an object store, where no file can grow, pieces."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

from distot.errors import StoreError
from distot.store.files import check_plain, explained, new_file
from distot.store.forms import MOST, REASON, Count, Form, Malformed, Maybe, Real, Seconds, check, parsed
from distot.store.places import Place, Url

SESSION: Form = {
    **dict.fromkeys(("latents", "atoms", "dim", "step", "samples"), Count),
    **dict.fromkeys(("source", "assigner", "device"), str),
    "kept": Maybe(str),
    "seconds": Seconds,
    "grid": Maybe(Annotated[list[Annotated[int, (1, 1 << 20)]], 2]),
    "environment": Maybe(dict[str, Any]),
}
EVENTS: dict[str, Form] = {
    "begin": SESSION,
    "resume": SESSION,
    "start": {"seconds": Seconds},
    "assigner": {"assigner": str, "why": str},
    "note": {"text": str},
    "warning": {"text": str},
    "step": {"samples": Count, "step": Count, "seconds": Seconds},
    "check": {
        "samples": Annotated[int, (1, MOST - 1)],
        **dict.fromkeys(("looked", "step"), Count),
        **dict.fromkeys(("chi2", "error", "upper"), Real),
        "close": bool,
        "seconds": Seconds,
    },
    "grid": {
        **dict.fromkeys(("search", "update", "store", "waited"), Maybe(list[Seconds])),
        "sent": list[Count],
        "slowest": Count,
    },
    "checkpoint": {"name": str, "took": Seconds},
    "stop": {"reason": REASON, "samples": Count, "seconds": Seconds},
    "certificate": {
        **dict.fromkeys(("w2_squared_bound", "w2_squared_limit", "map_cost"), float),
        **dict.fromkeys(("w2_squared_bound_error", "map_cost_error"), float),
        "level": Annotated[float, (0.0, 1.0)],
        "cost": Maybe(str),
    },
}
"""What a reader of the log finds in events, and nothing else in lines that say they are such."""
ANY: Form = {"event": str, "time": Maybe(Seconds), "seconds": Maybe(Seconds)}
PIECE_SECONDS = 20.0  # between two pieces; what came since the last one is lost if the process is killed


class Log:
    """Takes events of the one writer of the run at ``run``."""

    def __init__(self, run: Place) -> None:
        self.run = run
        self.lines: list[bytes] = []
        self.written = time.monotonic()

    def append(self, record: dict[str, Any]) -> None:
        """Raises StoreError if it cannot be written."""
        line = json.dumps(record).encode() + b"\n"
        if isinstance(self.run, Url):
            self.lines.append(line)
            if time.monotonic() - self.written > PIECE_SECONDS:
                self._write_piece(self.run)
            return
        file = self.run / "log.jsonl"
        check_plain(file)
        _keep_apart(file)
        with explained("write", file), file.open("a+b") as stream:
            size = stream.tell()
            if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":  # a crash or a full disk has cut it off
                stream.truncate(file.read_bytes().rfind(b"\n") + 1)
            stream.write(line)

    def _write_piece(self, run: Url) -> None:
        name = f"{time.time_ns():020d}-{secrets.token_hex(2)}.jsonl"
        self.written = time.monotonic()
        (run / "log" / name).write_bytes(b"".join(self.lines))
        self.lines = []

    def close(self) -> None:
        """Writes what is left, if that is possible."""
        if isinstance(self.run, Url) and self.lines:
            try:
                self._write_piece(self.run)
            except StoreError:
                self.lines = []  # the run goes without it, as it does where an append fails


def _keep_apart(file: Path) -> None:
    """A file that has another name, too, in a backup by hard links say, is copied before it grows: that one stays."""
    if file.exists() and file.stat().st_nlink > 1:
        with new_file(file) as copy:
            shutil.copyfile(file, copy)


def records(run: Place) -> list[dict[str, Any]]:
    """The log of a run; a last line cut off by a crash is left out, a damaged one is an event "damaged"."""
    if isinstance(run, Url):
        text = b"".join((run / "log" / name).read_bytes() for name in sorted((run / "log").files()))
    else:
        file = run / "log.jsonl"
        check_plain(file)
        text = file.read_bytes() if file.exists() else b""
    return [_record(number, line) for number, line in enumerate(text.split(b"\n")[:-1], 1)]


def _record(number: int, line: bytes) -> dict[str, Any]:
    try:
        record = parsed(line)
        check(record, ANY, others=True)
        check(record, EVENTS.get(record["event"], {}), others=True)
    except Malformed:
        return {"event": "damaged", "line": number}
    return record
