"""Jobs on a real Ray with its dashboard: submitted once, followed, taken up again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from ray.job_submission import JobSubmissionClient

import distot
from cluster.submit import JobFailed, submit
from distot.errors import InputError
from distot.inspect import describe
from distot.store import copy_latents


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
    except OSError:
        return False
    return True


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "120")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    ports = [str(free_port()) for _ in range(4)]  # of its own, as other tests have a Ray at the same time
    names = ["--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port"]
    options = [word for pair in zip(names, ports, strict=True) for word in pair]
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        command = ["ray", "start", "--head", "--block", "--num-cpus=3", f"--temp-dir={folder}", *options]
        head = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            address = f"http://127.0.0.1:{ports[1]}"
            wait_for(lambda: answers(address))
            yield address
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def test_a_job_is_submitted_once_and_taken_up_again(dashboard: str, tmp_path: Path) -> None:
    latents, run = tmp_path / "latents.zarr", tmp_path / "run.zarr"
    copy_latents(np.random.default_rng(0).standard_normal((2000, 4)), None, latents, "test")
    task = [str(latents), str(run), "--workers", "2", "--until-chi2", "0.1"]
    said: list[str] = []
    name = submit(task, dashboard, wait=False, show=said.append)
    assert name.endswith("-1")
    assert "submitted: python -m jobs.solve" in said[-1]
    assert submit(task, dashboard, show=said.append) == name  # the same command follows it
    assert any("is there already" in line for line in said)
    assert any("the goal was reached" in line for line in said), said
    assert distot.load(run).certificate.chi2 < 0.15
    # a job that is stopped saves a checkpoint first
    other = tmp_path / "other.zarr"
    task = [str(latents), str(other), "--workers", "2", "--until-chi2", "none", "--max-samples", "1e9"]
    name = submit([*task, "--checkpoint-seconds", "1000"], dashboard, wait=False, show=said.append)
    client = JobSubmissionClient(dashboard)
    wait_for(lambda: (other / "log.jsonl").exists() and '"event": "step"' in (other / "log.jsonl").read_text())
    client.stop_job(name)
    wait_for(lambda: client.get_job_status(name).is_terminal())
    assert describe(other)["state"] == "interrupted"
    assert "distot resume" in client.get_job_logs(name)
    with pytest.raises(JobFailed, match=r"failed.*exit code 1; submit it again"):
        submit([str(tmp_path / "none.zarr"), str(tmp_path / "b.zarr")], dashboard, show=said.append)
    assert any("does not exist" in line for line in said)


def test_what_is_no_task_is_refused() -> None:
    with pytest.raises(InputError, match="a job needs LATENTS"):
        submit(["--workers", "2"])
    with pytest.raises(InputError, match=r"no Ray dashboard at http://127\.0\.0\.1:9"):
        submit(["a.zarr", "b.zarr"], "http://127.0.0.1:9")
