"""Real Ray workers: the answer of one process, whatever happens to them."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from sabotage import CLOUD, OPTIONS, WHOLE, WORK, Saboteur, assert_right, solved

import distot
from cluster import workers
from cluster.workers import Shape, WorkersLost
from distot.errors import InputError
from distot.schedule import Options
from distot.solution import Interrupted
from distot.store import RowFile
from jobs import aeot

pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """One Ray for the tests that do not start their own."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def test_killed_workers_are_replaced(tmp_path: Path) -> None:
    ranks = (1, 0, 1)
    saboteur = Saboteur(signal.SIGKILL, *ranks)
    assert_right(solved(Shape(2), tmp_path / "run.zarr", saboteur))
    groups = saboteur.said("workers")
    assert len(groups) == 4
    assert len(saboteur.said("resume")) == 3
    for rank, before, after, warning in zip(ranks, groups, groups[1:], saboteur.said("warning"), strict=False):
        assert after["pids"][1 - rank] == before["pids"][1 - rank]  # the other one lived on
        assert f"worker {rank}" in warning["text"]


def test_a_hung_worker_is_replaced(tmp_path: Path) -> None:
    saboteur = Saboteur(signal.SIGSTOP, 1)
    assert_right(solved(Shape(2, silence=8.0), tmp_path / "run.zarr", saboteur))
    assert len(saboteur.said("workers")) == 2


def test_losses_without_progress_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FAILURES", 1)

    class Fiend(Saboteur):
        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            if event["event"] == "resume":
                os.kill(self.pids[1], signal.SIGKILL)

    run = tmp_path / "run.zarr"
    rare = Options(**(OPTIONS.to_dict() | {"checkpoint_seconds": 1.0}))
    with pytest.raises(WorkersLost, match=rf"2 losses in a row without progress.*distot resume {run}"):
        solved(Shape(2), run, Fiend(signal.SIGKILL, 1), rare)
    assert_right(distot.resume(run, progress=False))


def test_resumes_on_any_grid(tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    half = WHOLE | {"max_samples": WORK // 3}
    distot.solve(CLOUD, run=run, progress=False, **half)
    distot.resume(run, max_samples=WORK // 2, workers=3, progress=False)
    distot.resume(run, max_samples=2 * WORK // 3, workers=2, replicas=2, progress=False)
    assert_right(distot.resume(run, max_samples=WORK, progress=False))
    np.save(tmp_path / "x.npy", CLOUD[:1000] + 0.1)
    assert distot.assign_file(run, tmp_path / "x.npy", tmp_path / "there.npy", workers=2) == 1000
    assert distot.assign_file(run, CLOUD[:1000] + 0.1, tmp_path / "here.npy") == 1000
    here, there = np.load(tmp_path / "here.npy"), np.load(tmp_path / "there.npy")
    assert np.array_equal(here, there)
    assert np.array_equal(here, distot.load(run).assign(CLOUD[:1000] + 0.1))
    made = distot.generate_file(run, tmp_path / "there.zarr", 6000, workers=2)
    assert made.samples == distot.generate_file(run, tmp_path / "here.zarr", 6000).samples
    near = RowFile(tmp_path / "here.zarr").read("z") - RowFile(tmp_path / "there.zarr").read("z")
    assert np.quantile(np.abs(near), 0.999) < 1e-4
    again = distot.certify(run, 30_000, seed_step=1, workers=2)
    here_again = distot.certify(run, 30_000, seed_step=1)
    assert again.certificate.chi2 == pytest.approx(here_again.certificate.chi2, rel=1e-8)


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 workers cannot hold 2 replicas"):
        distot.solve(CLOUD, workers=3, replicas=2)
    bad = CLOUD.copy()
    bad[2000, 1] = np.nan
    with pytest.raises(InputError, match="1 of 3,000 latents contain NaN or Inf, the first is row 2,000"):
        distot.solve(bad, workers=2)
    with pytest.raises(InputError, match="give latents and run as paths"):
        distot.solve(CLOUD, workers=2, ray="auto")
    with pytest.raises(InputError, match=r"this process uses the Ray at .* already, and not that at 127\.0\.0\.1:1"):
        distot.resume(tmp_path / "none.zarr", workers=2, ray="127.0.0.1:1")


def test_the_signal_reaches_all(tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"

    class Hand(Saboteur):
        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            if event["event"] == "checkpoint" and len(self.said("checkpoint")) == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="distot resume") as caught:
        solved(Shape(2), run, Hand(0))
    assert 0 < caught.value.solution.samples < WORK
    assert_right(distot.resume(run, progress=False))


def test_from_data_to_data(tmp_path: Path) -> None:
    """The AE-OT job, its transport solved and its noise carried by workers: the data of one process."""
    for folder, places in (("here", aeot.Places()), ("there", aeot.Places(workers=2))):
        (tmp_path / folder).mkdir()
        job = aeot.Job(tmp_path / folder, aeot.Settings.of("gaussians8", True, latent=3, epochs=2, size=1000), places)
        for stage in (job.train, job.encode, job.solve, job.generate, job.decode):
            stage()
    here, there = (np.load(tmp_path / folder / "images.npy") for folder in ("here", "there"))
    assert here.shape == there.shape
    assert np.quantile(np.abs(here - there), 0.999) < 1e-3
