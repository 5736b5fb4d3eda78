"""What a run folder tells without its latents: configuration, log, looks at chi2, certificate, and what is damaged."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from distot.certify import Certificate
from distot.errors import StoreError
from distot.identity import belongs
from distot.schedule import Check, options_of
from distot.solution import REASONS, stored_certificate
from distot.store import Checkpoint, Place, Run
from distot.watch import Event

QUIET = 180.0  # seconds without a line in the log, after which a run that has not ended is taken to be dead


@dataclass(frozen=True)
class Session:
    """What one process, or group of workers, has done: events from "begin" or "resume" on."""

    events: tuple[Event, ...]

    def first(self, name: str) -> Event | None:
        return next((event for event in self.events if event["event"] == name), None)

    def last(self, name: str) -> Event | None:
        return next((event for event in reversed(self.events) if event["event"] == name), None)

    @property
    def seconds(self) -> float:
        """From its first event to its last."""
        return float(self.events[-1].get("seconds", 0.0))

    @cached_property
    def phases(self) -> dict[str, float]:
        """Seconds of the start, of steps with their looks, and of the certificate."""
        end = self.seconds
        began = self.first("start")
        steps = next((e["seconds"] for e in self.events if e["event"] in ("step", "check", "stop")), end)
        stop = self.last("stop")
        stopped = end if stop is None else stop["seconds"]
        if began is None:
            steps = min(self.events[0]["seconds"], stopped)
        return {"start": steps, "steps and looks": max(stopped - steps, 0.0), "certificate": end - stopped}


@dataclass(frozen=True)
class Story:
    """Everything that the page says of a run without reading its latents."""

    run: Run
    events: tuple[Event, ...]
    checkpoint: Checkpoint | None
    heights: str  # their hash
    stored: tuple[Certificate, dict[str, Any]] | None  # the certificate in the folder, and of which heights it is
    troubles: tuple[str, ...]  # what is damaged, each a sentence

    @property
    def config(self) -> dict[str, Any]:
        return self.run.config

    @property
    def options(self) -> dict[str, Any]:
        return options_of(self.run).to_dict()

    @property
    def shape(self) -> tuple[int, int]:
        n, d = self.config["shape"]
        return n, d

    @cached_property
    def sessions(self) -> tuple[Session, ...]:
        groups: list[list[Event]] = []
        for event in self.events:
            if event["event"] in ("begin", "resume"):
                groups.append([])
            if groups and "seconds" in event:
                groups[-1].append(event)
        return tuple(Session(tuple(group)) for group in groups)

    @property
    def atoms(self) -> int:
        """Different latents of positive mass; all latents where the log does not say."""
        return int(self.sessions[-1].events[0]["atoms"]) if self.sessions else self.shape[0]

    @cached_property
    def history(self) -> tuple[Check, ...]:
        """The looks at chi2: of the checkpoint, and those that the log has after it."""
        names = [field.name for field in fields(Check)]
        found = [] if self.checkpoint is None else list(self.checkpoint.scalars["history"])
        found += [{name: e[name] for name in names} for e in self.events if e["event"] == "check"]
        return tuple(Check(**look) for _, look in sorted({look["samples"]: look for look in found}.items()))

    @property
    def reason(self) -> str | None:
        """Why the run stopped; None if it has not, or was killed."""
        if self.sessions:
            stop = self.sessions[-1].last("stop")
            return None if stop is None else stop["reason"]
        return None if self.checkpoint is None else self.checkpoint.scalars["reason"]

    @property
    def explanation(self) -> str:
        return REASONS[self.reason].format(**self.options)

    @property
    def spoke(self) -> float | None:
        """When the log was last written to."""
        return max((event["time"] for event in self.events if "time" in event), default=None)

    @property
    def running(self) -> bool:
        """Whether the run may be at work: it has not stopped, and has spoken a moment ago."""
        return self.reason is None and self.spoke is not None and time.time() - self.spoke < QUIET

    @property
    def samples(self) -> int:
        """Search work so far, in plain samples: of the newest event, or the checkpoint."""
        kept = 0 if self.checkpoint is None else self.checkpoint.scalars["samples"]
        told = ("begin", "resume", "step", "check", "stop")
        return int(next((e["samples"] for e in reversed(self.events) if e["event"] in told), kept))

    @property
    def certificate(self) -> Certificate | None:
        """That of the newest heights."""
        if self.stored is None or self.checkpoint is None:
            return None
        certificate, of = self.stored
        return certificate if belongs(of, self.checkpoint.scalars["step"], self.heights) else None

    @cached_property
    def notes(self) -> tuple[tuple[str, str], ...]:
        """(kind, text) of all notes and warnings, once each."""
        found = [(e["event"], e["text"]) for e in self.events if e["event"] in ("note", "warning")]
        return tuple(dict.fromkeys([("damage", text) for text in self.troubles] + found))

    @property
    def environment(self) -> dict[str, Any]:
        first = self.sessions[-1].events[0] if self.sessions else {}
        return {"distot": self.config["distot"]} | first.get("environment", {})


def read(path: Place) -> Story:
    """Raises StoreError if there is no run, or its configuration cannot be read; all else that is damaged is told."""
    run = Run(path)
    options_of(run)  # can be read
    troubles: list[str] = []
    checkpoint, stored, heights = None, None, ""
    try:
        checkpoint = run.load_checkpoint()
        heights = "" if checkpoint is None else checkpoint.heights
        troubles += checkpoint.remarks if checkpoint is not None else ()
    except StoreError as error:
        troubles.append(str(error))
    try:
        stored = stored_certificate(run)
    except StoreError as error:
        troubles.append(str(error))
    events = run.records()
    if lines := [event["line"] for event in events if event["event"] == "damaged"]:
        troubles.append(f"{len(lines):,} lines of log.jsonl are damaged and left out, the first is line {lines[0]:,}")
    return Story(run, tuple(e for e in events if e["event"] != "damaged"), checkpoint, heights, stored, tuple(troubles))
