"""One process of a grid, as a Ray actor."""

from __future__ import annotations

import os
import socket
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util import metrics

from distot import grid
from distot.case import Room
from distot.certify import Certificate
from distot.errors import DistotError, DistotWarning
from distot.solution import Facts, Interrupted, Solution
from distot.target import Cache
from distot.work import Task


@dataclass(frozen=True)
class Answer:
    """What a member has to report of a verb."""

    kind: str  # "done", "interrupted", "refused" (an error of the user's making), "broken" (another member was lost)
    facts: Facts | None = None
    certificate: Certificate | None = None
    error: BaseException | None = None
    signal: int = 0
    result: Any = None


class Stopped(Exception):
    """Carries the message of an interruption."""


class Member:
    """One process of the grid. It answers ``place``, ``news`` and ``ask`` also while it works."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.cache: Cache = {}
        self.asked: int | None = None
        self.events: list[dict[str, Any]] = []
        self.gauges: dict[str, metrics.Gauge] = {}
        self.lock = threading.Lock()

    def place(self) -> tuple[str, str, int]:
        """Node, address to meet at if this is the first member, process."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        context = ray.get_runtime_context()
        return context.get_node_id(), f"{ray.util.get_node_ip_address()}:{port}", os.getpid()

    def news(self) -> list[dict[str, Any]]:
        """Events since the last call."""
        with self.lock:
            events, self.events = self.events, []
        return events

    def ask(self, number: int) -> None:
        """Makes the run stop as the signal ``number`` would."""
        self.asked = number

    def work(
        self,
        address: str,
        rank: int,
        shape: tuple[int, int],
        device: str,
        silence: float,
        spent: float,
        group: str,
        task: Task,
    ) -> Answer:
        """Joins the grid and does its part of the task."""
        warnings.simplefilter("ignore", DistotWarning)  # the driver gives them
        self.asked = None
        try:
            place = grid.join(address, rank, shape, device, silence)
            room = Room(
                place, self.cache, show=False, on_event=self._hear, asked=lambda: self.asked, group=group, spent=spent
            )
            found = task(room)
            if isinstance(found, Solution):
                return Answer("done", found.facts, found.kept)
            return Answer("done", result=found)
        except Interrupted as interrupted:
            error = Stopped(str(interrupted))
            return Answer("interrupted", interrupted.solution.facts, error=error, signal=interrupted.signal)
        except (DistotError, OSError) as error:
            return Answer("refused", error=error)
        except RuntimeError as error:  # of torch.distributed
            return Answer("broken", error=error)
        finally:
            grid.leave()

    def _hear(self, event: dict[str, Any]) -> None:
        with self.lock:
            self.events.append(event)
        for name in ("samples", "samples_per_second", "chi2", "margin", "sent", "waited"):
            value = event.get(name)
            if isinstance(value, int | float):
                if name not in self.gauges:
                    self.gauges[name] = metrics.Gauge(
                        f"distot_{name}", description=f"{name} of the last event of a run"
                    )
                self.gauges[name].set(float(value))
