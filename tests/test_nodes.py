"""Clusters of several nodes, and runs that bring their own: nodes die, get notice, drivers are killed."""

from __future__ import annotations

import json
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
from sabotage import CLOUD, WHOLE, WORK, Saboteur, alone, assert_right, solved

import distot
from cluster.workers import Shape
from distot.errors import InputError, StoreError
from distot.store import Run, copy_latents


def test_replicas_give_the_answer_of_one_process() -> None:
    events: list[dict[str, Any]] = []
    found = distot.solve(CLOUD, workers=2, replicas=2, progress=False, on_event=events.append, **WHOLE)
    assert_right(found)
    assert np.array_equal(found.assign(CLOUD[:50]), alone().assign(CLOUD[:50]))
    (begin,) = (event for event in events if event["event"] == "begin")
    assert begin["grid"] == [1, 2]
    assert max(event["sent"] for event in events if event["event"] == "step") > 0
    assert not ray.is_initialized()  # it ends with the verb that started it


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Cluster, list[Any]]]:
    """A cluster of three nodes, with room for one worker each, besides its head."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        added = [cluster.add_node(num_cpus=1) for _ in range(3)]
        cluster.wait_for_nodes()
        yield cluster, added
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_lost_node_is_left(nodes: tuple[Cluster, list[Any]], tmp_path: Path) -> None:
    """Workers on two of three nodes; one node dies, its worker starts anew on the third."""
    cluster, others = nodes
    latents = tmp_path / "latents.zarr"
    copy_latents(CLOUD, None, latents, "test")

    class Fate(Saboteur):
        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            if event["event"] == "checkpoint" and len(self.said("checkpoint")) == 1:
                (victim,) = (node for node in others if node.node_id == self.said("workers")[0]["nodes"][1])
                victim.kill_raylet()

    fate = Fate(0)
    found = solved(Shape(2, ray=cluster.address), tmp_path / "run.zarr", fate, latents=latents)
    assert_right(found)
    first, second = fate.said("workers")
    assert second["nodes"][1] not in first["nodes"]
    assert second["pids"][0] == first["pids"][0]


def test_workers_leave_a_node_that_gets_notice(nodes: tuple[Cluster, list[Any]], tmp_path: Path) -> None:
    """Ray is told that a node will go, as on a spot market: the run saves a checkpoint, and goes on elsewhere."""
    cluster, _ = nodes
    latents = tmp_path / "latents.zarr"
    copy_latents(CLOUD, None, latents, "test")

    class Market(Saboteur):
        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            if event["event"] == "step" and len(self.said("step")) == 1:
                node = self.said("workers")[0]["nodes"][1]
                soon = int(1000 * (time.time() + 600))
                GcsClient(address=cluster.address).drain_node(node, 2, "the market took it", soon)  # 2: preemption

    market = Market(0)
    found = solved(Shape(2, ray=cluster.address), tmp_path / "run.zarr", market, latents=latents)
    assert_right(found)
    first, second = market.said("workers")
    assert second["nodes"][1] not in first["nodes"]
    assert second["pids"][0] == first["pids"][0]
    (warning,) = market.said("warning")
    assert "workers [1] are on nodes that will go" in warning["text"]


def test_a_run_outlives_its_driver(tmp_path: Path) -> None:
    """The driver is killed, and takes its workers with it; others go on, even where its work was all but done."""
    latents, run = tmp_path / "latents.zarr", tmp_path / "run.zarr"
    copy_latents(CLOUD, None, latents, "test")
    options = ["--until-chi2", "none", "--max-samples", str(WORK // 2), "--assigner", "native", "--workers", "2"]
    options += ["--certificate-samples", "20000", "--checkpoint-seconds", "0.1"]
    command = [sys.executable, "-m", "distot.cli", "solve", str(latents), str(run), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        deadline = time.monotonic() + 180
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
    command = [sys.executable, "-m", "distot.cli", "resume", str(run), "--max-samples", str(WORK)]
    command += ["--workers", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == alone().samples
    assert_right(distot.load(run))


def test_an_address_where_no_ray_is() -> None:
    with pytest.raises(InputError, match="no Ray at"):
        distot.resume("none.zarr", workers=2, ray="127.0.0.1:1")
