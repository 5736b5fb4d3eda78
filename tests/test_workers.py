"""Real Ray workers: the answer of one process, whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster

import distot
from cluster import workers
from cluster.workers import Shape, WorkersLost
from distot.errors import InputError, StoreError
from distot.schedule import Options
from distot.solution import Interrupted, Solution
from distot.store import Run, copy_latents

CLOUD = np.random.default_rng(3).standard_normal((3000, 5)) * np.linspace(2, 0.4, 5)
WORK = 24_000
OPTIONS = Options(
    until_chi2=None, max_samples=WORK, assigner="native", certificate_samples=20_000, checkpoint_seconds=0.1
)
WHOLE: dict[str, Any] = {"until_chi2": None, "max_samples": WORK, "assigner": "native", "certificate_samples": 20_000}


@pytest.fixture(autouse=True)
def no_ray_left() -> Iterator[None]:
    yield
    assert not ray.is_initialized()  # a local Ray ends with the verb that started it


@pytest.fixture(scope="module")
def reference() -> Solution:
    """The same problem in this process."""
    return distot.solve(CLOUD, progress=False, **WHOLE)


def assert_same(found: Solution, expected: Solution) -> None:
    assert found.samples == expected.samples
    assert np.allclose(found.heights, expected.heights, rtol=0, atol=1e-8 * np.abs(expected.heights).max())
    assert found.certificate.chi2 == pytest.approx(expected.certificate.chi2, rel=1e-8)
    assert found.certificate.w2_squared_bound == pytest.approx(expected.certificate.w2_squared_bound, rel=1e-8)


class Saboteur:
    """Hears events, and does something to one worker, once, after the second checkpoint."""

    def __init__(self, number: int, rank: int = 1, times: int = 1) -> None:
        self.number, self.rank, self.left = number, rank, times
        self.pids: list[int] = []
        self.events: list[dict[str, Any]] = []
        self.checkpoints = 0

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["event"] == "workers":
            self.pids = event["pids"]
            self.checkpoints = 0
        self.checkpoints += event["event"] == "checkpoint"
        if self.left and self.checkpoints == 2:
            self.left -= 1
            self.checkpoints = 3
            os.kill(self.pids[self.rank], self.number)

    def said(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.events if record["event"] == event]


def on_workers(shape: Shape, run: Path, listen: Any = None, options: Options = OPTIONS) -> Solution:
    return workers.solve(CLOUD, "gaussian", None, options, run, None, shape, False, listen)


def test_workers_and_replicas_give_the_answer_of_one_process(reference: Solution, tmp_path: Path) -> None:
    for number, replicas in ((2, 1), (2, 2)):
        events: list[dict[str, Any]] = []
        found = distot.solve(CLOUD, workers=number, replicas=replicas, progress=False, on_event=events.append, **WHOLE)
        assert_same(found, reference)
        assert np.array_equal(found.assign(CLOUD[:50]), reference.assign(CLOUD[:50]))
        (begin,) = (event for event in events if event["event"] == "begin")
        assert begin["grid"] == [number // replicas, replicas]
        assert max(event["sent"] for event in events if event["event"] == "step") > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_replaced(reference: Solution, tmp_path: Path, rank: int) -> None:
    saboteur = Saboteur(signal.SIGKILL, rank)
    found = on_workers(Shape(2), tmp_path / "run.zarr", saboteur)
    assert_same(found, reference)
    (first, second) = saboteur.said("workers")
    assert second["pids"][1 - rank] == first["pids"][1 - rank]  # the other one lived on
    (warning,) = saboteur.said("warning")
    assert f"worker {rank}" in warning["text"]
    assert saboteur.said("resume")


def test_a_hung_worker_is_replaced(reference: Solution, tmp_path: Path) -> None:
    saboteur = Saboteur(signal.SIGSTOP)
    found = on_workers(Shape(2, silence=8.0), tmp_path / "run.zarr", saboteur)
    assert_same(found, reference)
    assert len(saboteur.said("workers")) == 2


def test_losses_without_progress_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Solution
) -> None:
    monkeypatch.setattr(workers, "FAILURES", 1)

    class Fiend(Saboteur):
        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            if event["event"] == "resume":
                os.kill(self.pids[1], signal.SIGKILL)

    run = tmp_path / "run.zarr"
    rare = Options(**(OPTIONS.to_dict() | {"checkpoint_seconds": 1.0}))
    with pytest.raises(WorkersLost, match=rf"2 losses in a row without progress.*distot resume {run}"):
        on_workers(Shape(2), run, Fiend(signal.SIGKILL), rare)
    assert_same(distot.resume(run, progress=False), reference)


def test_resumes_on_any_grid(reference: Solution, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    half = WHOLE | {"max_samples": WORK // 3}
    distot.solve(CLOUD, run=run, progress=False, **half)
    distot.resume(run, max_samples=WORK // 2, workers=3, progress=False)
    distot.resume(run, max_samples=2 * WORK // 3, workers=2, replicas=2, progress=False)
    assert_same(distot.resume(run, max_samples=WORK, progress=False), reference)
    np.save(tmp_path / "x.npy", CLOUD[:1000] + 0.1)
    assert distot.assign_file(run, tmp_path / "x.npy", tmp_path / "there.npy", workers=2) == 1000
    assert distot.assign_file(run, CLOUD[:1000] + 0.1, tmp_path / "here.npy") == 1000
    here, there = np.load(tmp_path / "here.npy"), np.load(tmp_path / "there.npy")
    assert np.array_equal(here, there)
    assert np.array_equal(here, distot.load(run).assign(CLOUD[:1000] + 0.1))
    again = distot.certify(run, 30_000, seed_step=1, workers=2)
    alone = distot.certify(run, 30_000, seed_step=1)
    assert again.certificate.chi2 == pytest.approx(alone.certificate.chi2, rel=1e-8)


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 workers cannot hold 2 replicas"):
        distot.solve(CLOUD, workers=3, replicas=2)
    bad = CLOUD.copy()
    bad[2000, 1] = np.nan
    with pytest.raises(InputError, match="1 of 3,000 latents contain NaN or Inf, the first is row 2,000"):
        distot.solve(bad, workers=2)
    with pytest.raises(InputError, match="give latents and run as paths"):
        distot.solve(CLOUD, workers=2, ray="auto")
    distot_store = tmp_path / "none.zarr"
    with pytest.raises(InputError, match="no Ray at"):
        distot.resume(distot_store, workers=2, ray="127.0.0.1:1")


def test_a_lost_node_is_left(reference: Solution, tmp_path: Path) -> None:
    """Workers on two of three nodes; one node dies, its worker starts anew on the third."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        others = [nodes.add_node(num_cpus=1) for _ in range(3)]
        nodes.wait_for_nodes()
        latents = tmp_path / "latents.zarr"
        copy_latents(CLOUD, None, latents, "test")

        class Fate(Saboteur):
            def __call__(self, event: dict[str, Any]) -> None:
                super().__call__(event)
                if self.checkpoints and self.left:
                    self.left = 0
                    (victim,) = (node for node in others if node.node_id == self.said("workers")[0]["nodes"][1])
                    victim.kill_raylet()

        fate = Fate(0, times=3)
        shape = Shape(2, ray=nodes.address)
        found = workers.solve(latents, "gaussian", None, OPTIONS, tmp_path / "run.zarr", None, shape, False, fate)
        assert_same(found, reference)
        first, second = fate.said("workers")
        assert second["nodes"][1] not in first["nodes"]
        assert second["pids"][0] == first["pids"][0]
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_the_signal_reaches_all(tmp_path: Path, reference: Solution) -> None:
    run = tmp_path / "run.zarr"

    class Hand(Saboteur):
        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            if event["event"] == "checkpoint" and self.left:
                self.left = 0
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="distot resume") as caught:
        on_workers(Shape(2), run, Hand(0, times=1))
    assert 0 < caught.value.solution.samples < WORK
    began = time.monotonic()
    assert_same(distot.resume(run, progress=False), reference)
    assert time.monotonic() - began < 120


def test_a_run_outlives_its_driver(tmp_path: Path, reference: Solution) -> None:
    """The driver is killed, and takes its workers with it; others go on."""
    latents, run = tmp_path / "latents.zarr", tmp_path / "run.zarr"
    copy_latents(CLOUD, None, latents, "test")
    options = [
        "--until-chi2",
        "none",
        "--max-samples",
        str(WORK),
        "--assigner",
        "native",
        "--checkpoint-seconds",
        "0.1",
    ]
    options += ["--certificate-samples", "20000", "--workers", "2"]
    command = [sys.executable, "-m", "distot.cli", "solve", str(latents), str(run), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        deadline = time.monotonic() + 100
        while not (run / "LATEST").exists():
            assert time.monotonic() < deadline
            assert driver.poll() is None, driver.stdout.read() if driver.stdout else ""
            time.sleep(0.05)
        driver.kill()
    deadline = time.monotonic() + 30
    while (run / "owner.json").exists() and time.monotonic() < deadline:
        with suppress(StoreError), Run(run).lock():
            break
        time.sleep(0.2)
    command = [sys.executable, "-m", "distot.cli", "resume", str(run), "--workers", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == reference.samples
    assert_same(distot.load(run), reference)


def test_workers_leave_a_node_that_gets_notice(tmp_path: Path, reference: Solution) -> None:
    """Ray is told that a node will go, as on a spot market: the run saves a checkpoint, and goes on elsewhere."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(3):
            nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        latents = tmp_path / "latents.zarr"
        copy_latents(CLOUD, None, latents, "test")

        class Market(Saboteur):
            def __call__(self, event: dict[str, Any]) -> None:
                super().__call__(event)
                if event["event"] == "step" and self.left:
                    self.left = 0
                    node = self.said("workers")[0]["nodes"][1]
                    soon = int(1000 * (time.time() + 600))
                    GcsClient(address=nodes.address).drain_node(node, 2, "the market took it", soon)  # 2: preemption

        market = Market(0)
        shape = Shape(2, ray=nodes.address)
        found = workers.solve(latents, "gaussian", None, OPTIONS, tmp_path / "run.zarr", None, shape, False, market)
        assert_same(found, reference)
        first, second = market.said("workers")
        assert second["nodes"][1] not in first["nodes"]
        assert second["pids"][0] == first["pids"][0]
        (warning,) = market.said("warning")
        assert "workers [1] are on nodes that will go" in warning["text"]
    finally:
        ray.shutdown()
        nodes.shutdown()
