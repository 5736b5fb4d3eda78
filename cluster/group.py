"""The members of a grid, placed in a Ray cluster, watched, and mended when one is lost.

The driver holds no data and does no work. It sends every member the same task, listens to what the first one has to
say, and waits. When a member dies or falls silent the others leave their collectives with an error and keep the latents
they have read; the lost one starts anew, here or on another node.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.member import Answer, Member
from distot import grid
from distot.case import Listen
from distot.environment import cores
from distot.errors import DistotError, InputError
from distot.watch import Event, pass_on
from distot.work import Task

POLL = 0.2  # seconds between two looks of the driver
SILENCE = 60.0  # seconds without an answer, after which a member counts as hung, and a collective as broken
PLACED = 300.0  # seconds to wait for room in the cluster


class WorkersLost(DistotError):
    """Workers were lost again and again without progress, or there is no room for them; the run can be resumed."""


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
        self.failure: BaseException | None = None
        self.asked: int | None = None  # the signal that was passed on
        self.owns_ray = False
        self.name = secrets.token_hex(8)

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
            known = ray.get_runtime_context().gcs_address
            if self.shape.ray not in (None, "auto", known):
                raise InputError(
                    f"this process uses the Ray at {known} already, and not that at {self.shape.ray}; "
                    "leave --ray out, or call ray.shutdown() first"
                )
            return
        try:
            if address is not None:
                if (host := address.removeprefix("ray://").rpartition(":"))[0]:
                    socket.create_connection((host[0], int(host[2])), timeout=10).close()  # Ray would try for minutes
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
                return
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            count = max(cores(), self.shape.workers)
            ray.init(
                address="local",
                num_cpus=count,
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
        local = max(1.0, cores() / shape.workers)
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
                    if isinstance(error, ActorDiedError) and error.actor_init_failed:
                        why = str(error).strip().splitlines()[-1].strip()
                        raise WorkersLost(
                            f"worker {rank} cannot start: {why}; install the same distot on every node"
                        ) from error
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

    def run(self, task: Task, spent: float) -> Answer:
        """The first member's answer; one of kind "broken" names who was lost, and ``mend`` brings them back."""
        leader = self.members[0]
        assert leader is not None
        address: str = ray.get(leader.place.remote())[1]
        calls: dict[Any, int] = {}
        for rank, member in enumerate(self.members):
            assert member is not None
            call = member.work.options(name=f"distot {type(task).__name__.lower()}, worker {rank}").remote(
                address, rank, self.shape.grid, self.device, self.shape.silence, spent, self.name, task
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
            if lost := pass_on(event, self):
                self.tell({"event": "warning", "time": time.time(), "text": lost})

    def _pass_on_signals(self) -> None:
        """Stops the run, with a checkpoint, after a signal to the driver, or when a node is about to be taken away."""
        number = self.signal
        if number is None and self.leaving():
            number = signal.SIGTERM
        if number is not None and self.asked != number:
            self.asked = number
            if self.signal is not None and self.failure is None:
                self.tell({"event": "signal", "signal": signal.Signals(number).name})
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
