"""Ray actors that form a grid, and the driver that watches over them: started together, mended when one is lost.

The driver holds no data and does no work. It sends every member the same verb with the same arguments, listens to what
the first one has to say, and waits. When a member dies or falls silent the others leave their collectives with an
error and keep the latents they have read; the lost one starts anew, here or on another node, and the run is resumed
from its last checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from numpy.typing import NDArray
from ray._private.state import state
from ray.exceptions import RayError, RayTaskError
from ray.util import metrics
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distot import grid, work
from distot.certify import Certificate
from distot.errors import DistotError, DistotWarning, InputError
from distot.progress import listener
from distot.schedule import Options
from distot.solution import Facts, Interrupted, Solution
from distot.store import copy_latents
from distot.target import Cache
from distot.watch import Event, signals
from distot.work import Listen, Room, as_rows

POLL = 0.2  # seconds between two looks of the driver
SILENCE = 60.0  # seconds without an answer, after which a member counts as hung, and a collective as broken
PLACED = 300.0  # seconds to wait for room in the cluster
FAILURES = 5  # in a row without a new checkpoint, after which the run stops


@dataclass(frozen=True)
class Answer:
    """What a member has to report of a verb."""

    kind: str  # "done", "interrupted", "refused" (an error of the user's making), "broken" (another member was lost)
    facts: Facts | None = None
    certificate: Certificate | None = None
    error: BaseException | None = None
    signal: int = 0
    result: Any = None


class WorkersLost(DistotError):
    """Workers were lost again and again without progress, or there is no room for them; the run can be resumed."""


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
        verb: Callable[..., Any],
        arguments: dict[str, Any],
    ) -> Answer:
        """Joins the grid and does ``verb(**arguments, room=...)``."""
        warnings.simplefilter("ignore", DistotWarning)  # the driver gives them
        self.asked = None
        try:
            place = grid.join(address, rank, shape, device, silence)
            room = Room(place, self.cache, show=False, on_event=self._hear, asked=lambda: self.asked, spent=spent)
            found = verb(**arguments, room=room)
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


class Stopped(Exception):
    """Carries the message of an interruption."""


@dataclass(frozen=True)
class Shape:
    """What to start: ``workers`` processes, of which ``replicas`` each own the same latents."""

    workers: int
    replicas: int = 1
    ray: str | None = None  # address of a cluster, "auto" for the one at hand; None starts one on this machine
    device: str = "auto"
    cpus: float | None = None  # of each worker; None: what this machine has, shared out, or 1 on a cluster
    silence: float = SILENCE

    def __post_init__(self) -> None:
        """Raises InputError if replicas do not divide workers."""
        grid.check(self.workers, self.replicas)

    @property
    def grid(self) -> tuple[int, int]:
        """Processes along the axes target and sample."""
        return grid.check(self.workers, self.replicas)


class Group:
    """The members, placed and watched."""

    def __init__(self, shape: Shape, listen: Listen | None) -> None:
        self.shape = shape
        self.listen: Listen | None = listen
        self.members: list[Any] = [None] * shape.workers
        self.where: list[str] = [""] * shape.workers  # nodes
        self.moved: dict[int, PlacementGroup] = {}  # room of their own for members that had to leave their node
        self.signal: int | None = None
        self.asked: int | None = None  # the signal that was passed on
        self.owns_ray = False

    def __enter__(self) -> Group:
        self._connect()
        try:
            self.room = self._place()
            self.mend()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> None:
        """Joins the cluster, or starts a small one that ends with this group."""
        address = self.shape.ray or os.environ.get("RAY_ADDRESS")
        if ray.is_initialized():
            return
        try:
            if address is not None:
                if (host := address.removeprefix("ray://").rpartition(":"))[0]:
                    socket.create_connection((host[0], int(host[2])), timeout=10).close()  # Ray would try for minutes
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
                return
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            cores = max(os.cpu_count() or 1, self.shape.workers)
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            self.owns_ray = True
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"no Ray at {address or 'this machine'} ({error}); check --ray, or leave it out to start one here"
            ) from error

    def _place(self) -> PlacementGroup:
        """Room for every member. Raises WorkersLost if the cluster has none."""
        shape, total = self.shape, ray.cluster_resources()
        gpus = total.get("GPU", 0)
        self.device = ("cuda" if gpus >= shape.workers else "cpu") if shape.device == "auto" else shape.device
        local = max(1.0, (os.cpu_count() or 1) / shape.workers)
        self.cpus = shape.cpus or (local if self.owns_ray else 1.0)
        bundle = {"CPU": min(self.cpus, total.get("CPU", 1) / shape.workers if self.owns_ray else self.cpus)}
        bundle |= {"GPU": 1.0} if self.device == "cuda" else {}
        room = placement_group([bundle] * shape.workers, strategy="PACK")
        if not room.wait(PLACED):
            remove_placement_group(room)
            raise WorkersLost(
                f"the cluster has no room for {shape.workers} workers with {bundle} each (it has {total}); "
                "start more nodes, or ask for fewer workers"
            )
        return room

    def mend(self) -> None:
        """Starts the members that are missing, and waits until all answer. Raises WorkersLost if they do not."""
        deadline, pids = time.monotonic() + PLACED, []
        for rank, member in enumerate(self.members):
            self.members[rank] = self._start(rank) if member is None else member
        for rank in range(self.shape.workers):
            while True:
                try:
                    left = max(1.0, deadline - time.monotonic())
                    self.where[rank], _, pid = ray.get(self.members[rank].place.remote(), timeout=left)
                    pids.append(pid)
                    break
                except RayError as error:  # its node is gone, and Ray had not noticed; or there is no room
                    self.lose(rank)
                    if time.monotonic() > deadline:
                        raise WorkersLost(
                            f"worker {rank} did not start within {PLACED:.0f} s ({type(error).__name__}); the cluster "
                            "may have no room for it any more: resume with fewer workers, or start more nodes"
                        ) from error
                    time.sleep(1.0)
                    self.members[rank] = self._start(rank)
        self.tell({"event": "workers", "time": time.time(), "pids": pids, "nodes": list(self.where)})

    def _start(self, rank: int) -> Any:
        bundle = self.room.bundle_specs[rank]
        room, number = (self.moved[rank], 0) if rank in self.moved else (self.room, rank)
        remote = ray.remote(Member).options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=number),
            name=f"distot worker {rank} of {self.shape.workers} ({os.getpid()}-{time.time_ns()})",
        )
        return remote.remote(max(1, int(self.cpus)))

    def move(self, rank: int) -> None:
        """Gives a member up and looks for room on another node; a bundle stays on its node until that is gone."""
        self.lose(rank)
        if rank in self.moved:
            remove_placement_group(self.moved[rank])
        self.moved[rank] = placement_group([self.room.bundle_specs[rank]])

    def lose(self, rank: int) -> None:
        """Gives a member up, whatever it does."""
        member = self.members[rank]
        if member is not None:
            ray.kill(member, no_restart=True)
        self.members[rank] = None

    def run(self, verb: Callable[..., Any], arguments: dict[str, Any], spent: float) -> Answer:
        """The first member's answer; one of kind "broken" names who was lost, and ``mend`` brings them back."""
        leader = self.members[0]
        assert leader is not None
        address: str = ray.get(leader.place.remote())[1]
        calls: dict[Any, int] = {}
        for rank, member in enumerate(self.members):
            assert member is not None
            call = member.work.options(name=f"distot {verb.__name__}, worker {rank}").remote(
                address, rank, self.shape.grid, self.device, self.shape.silence, spent, verb, arguments
            )
            calls[call] = rank
        return self._watch(calls)

    def _watch(self, calls: dict[Any, int]) -> Answer:
        """Waits for all members, passing events on; gives up those that die or fall silent."""
        answers: dict[int, Answer] = {}
        lost: list[str] = []
        heard = dict.fromkeys(calls.values(), time.monotonic())  # when each member spoke last
        pings: dict[Any, int] = {}
        self.asked = None

        def gone(rank: int, why: str) -> None:
            if self.members[rank] is not None:
                lost.append(f"worker {rank} on node {self.where[rank][:8]} ({why})")
                self.lose(rank)

        while calls and not any(answer.kind == "refused" for answer in answers.values()):
            self._pass_on_signals()
            for rank, member in enumerate(self.members):
                quiet = time.monotonic() - heard[rank]
                if quiet > self.shape.silence:
                    gone(rank, f"no answer for {self.shape.silence:.0f} s")
                elif member is not None and quiet > POLL and rank not in pings.values():
                    pings[member.news.remote()] = rank
            ready, _ = ray.wait([*calls, *pings], num_returns=1, timeout=POLL)
            for reference in ready:
                rank = calls.pop(reference) if reference in calls else pings.pop(reference)
                try:
                    value = ray.get(reference)
                except RayTaskError:  # no loss but a mistake in the code, which would come again
                    raise
                except RayError as error:
                    gone(rank, type(error).__name__)
                    continue
                heard[rank] = time.monotonic()
                if isinstance(value, Answer):
                    answers[rank] = value
                else:
                    self.tell(*value)
        if self.members[0] is not None:
            with suppress(RayError):  # lost after its last word
                self.tell(*ray.get(self.members[0].news.remote(), timeout=self.shape.silence))
        for answer in answers.values():
            if answer.kind == "refused":
                return answer
        broken = [str(answer.error) for answer in answers.values() if answer.kind == "broken"]
        if lost or broken:  # if none is lost a collective failed although all are alive
            return Answer("broken", error=WorkersLost("; ".join(lost or broken[:1])))
        return answers[0]

    def tell(self, *events: Event) -> None:
        """Passes events on to whoever listens."""
        for event in events:
            if self.listen is not None:
                self.listen(event)

    def _pass_on_signals(self) -> None:
        """Stops the run, with a checkpoint, after a signal to the driver, or when a node is about to be taken away."""
        number = self.signal
        if number is None and self.leaving():
            number = signal.SIGTERM
        if number is not None and self.asked != number:
            self.asked = number
            for member in self.members:
                if member is not None:
                    member.ask.remote(int(number))

    def leaving(self) -> list[int]:
        """Members on nodes that have got notice."""
        draining = {node.hex() if isinstance(node, bytes) else str(node) for node in state.get_draining_nodes()}
        return [rank for rank, node in enumerate(self.where) if node in draining]

    def close(self) -> None:
        """Ends the members, and the Ray that was started for them."""
        if not ray.is_initialized():
            return
        for rank in range(len(self.members)):
            self.lose(rank)
        if hasattr(self, "room"):
            for room in (self.room, *self.moved.values()):
                remove_placement_group(room)
        if self.owns_ray:
            ray.shutdown()


def launch(
    verb: str,
    arguments: dict[str, Any],
    shape: Shape,
    run: Path | None,
    max_seconds: float | None = None,
    show: bool | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """Does ``distot.work.<verb>(**arguments)`` on all members of a new group, as often as members are lost.

    run: the folder that keeps what was done; where it is there, a broken run is resumed from it.
    Raises as the verb does; InputError if there is no such cluster; WorkersLost after FAILURES losses in a row without
    a new checkpoint.
    """
    began, failures, newest = time.monotonic(), 0, _newest(run)
    with listener(show, on_event) as listen, Group(shape, listen) as group, signals(group):
        while True:
            answer = group.run(getattr(work, verb), arguments, time.monotonic() - began)
            if answer.kind == "done":
                return answer
            if answer.kind == "refused":
                assert answer.error is not None
                raise answer.error
            leaving = group.leaving()
            if answer.kind == "interrupted" and (group.signal is not None or not leaving):
                assert answer.facts is not None
                raise Interrupted(str(answer.error), solution(answer, run), answer.signal)
            for rank in leaving:
                group.move(rank)
            text = f"{answer.error}" if answer.kind == "broken" else f"workers {leaving} are on nodes that will go"
            failures = 1 if _newest(run) != newest else failures + 1
            newest = _newest(run)
            if failures > FAILURES:
                more = f"go on with: distot resume {run}" if run is not None and run.exists() else "nothing was kept"
                raise WorkersLost(f"{failures} losses in a row without progress, the last one: {text}; {more}")
            note = f"lost {text}; going on from the last checkpoint"
            group.tell({"event": "warning", "time": time.time(), "seconds": time.monotonic() - began, "text": note})
            group.mend()
            if run is not None and (run / "config.json").exists() and verb in ("solve", "resume"):
                known = {"latents": None, "changes": {}} if verb == "solve" else arguments
                source = arguments["source"] if callable(arguments["source"]) else None
                arguments = dict(known) | {"run": run, "source": source, "again": True}
                verb = "resume"


def solution(answer: Answer, run: Path | None) -> Solution:
    """A solution whose latents and heights are read from the run folder when they are asked for."""
    assert answer.facts is not None
    assert run is not None
    return Solution(answer.facts, answer.certificate, lambda: work.load(run, None, None, {}, Room()).held)


def _newest(run: Path | None) -> str:
    """The newest checkpoint of a run."""
    latest = None if run is None else run / "LATEST"
    return latest.read_text() if latest is not None and latest.exists() else ""


def solve(
    latents: object,
    source: object,
    mass: NDArray[Any] | None,
    options: Options,
    run: Path | None,
    init: object,
    shape: Shape,
    show: bool | None,
    on_event: Listen | None,
) -> Solution:
    """``distot.solve`` on workers. What is in memory goes to a temporary folder, from where they read it."""
    scratch = tempfile.TemporaryDirectory(prefix="distot-")
    folder = Path(scratch.name)
    inside = not isinstance(latents, str | Path)
    if shape.ray is not None and (inside or run is None):
        raise InputError(
            "other nodes do not see what is in memory here: give latents and run as paths that all nodes can reach"
        )
    if inside:
        copy_latents(as_rows(latents), mass, folder / "latents.zarr", "from memory")
        latents, mass = folder / "latents.zarr", None
    if isinstance(init, Solution):
        init = init.run.path if init.run is not None else init.save(folder / "init.zarr")
    where = (run or folder / "run.zarr").resolve()
    arguments = {
        "latents": Path(str(latents)).resolve(),
        "source": source,
        "mass": mass,
        "options": options,
        "run": where,
        "init": Path(init).resolve() if isinstance(init, str | Path) else init,
        "copies": inside,
    }
    answer = launch("solve", arguments, shape, where, options.max_seconds, show, on_event)
    found = solution(answer, where)
    found.scratch = scratch  # lives as long as the solution
    return found


def resume(
    run: Path,
    source: object,
    latents: object,
    changes: dict[str, Any],
    shape: Shape,
    show: bool | None,
    on_event: Listen | None,
) -> Solution:
    """``distot.resume`` on workers, as many as there are now."""
    arguments = {"run": run.resolve(), "source": source, "latents": _found(latents), "changes": changes}
    return solution(launch("resume", arguments, shape, run.resolve(), show=show, on_event=on_event), run)


def certify(
    run: Path,
    samples: int | None,
    seed_step: int,
    source: object,
    latents: object,
    changes: dict[str, Any],
    shape: Shape,
) -> Solution:
    """``distot.certify`` on workers."""
    arguments = {"run": run.resolve(), "samples": samples, "seed_step": seed_step, "source": source}
    return solution(
        launch("certify", arguments | {"latents": _found(latents), "changes": changes}, shape, run.resolve()), run
    )


def assign_file(
    run: Path,
    samples: Path | NDArray[Any],
    out: Path,
    source: object,
    latents: object,
    changes: dict[str, Any],
    shape: Shape,
) -> int:
    """``distot.assign_file`` on workers."""
    given = samples.resolve() if isinstance(samples, Path) else samples
    arguments = {"run": run.resolve(), "samples": given, "out": out.resolve(), "source": source}
    arguments |= {"latents": _found(latents), "changes": changes}
    found: int = launch("assign_file", arguments, shape, run.resolve()).result
    return found


def _found(latents: object) -> object:
    """A path as any process on this machine finds it."""
    return Path(latents).resolve() if isinstance(latents, str | Path) else latents
