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
from typing import Any

import numpy as np
import pytest
from ray.job_submission import JobSubmissionClient

import distot
from cluster.submit import JobFailed, _check_same, parsed, submit
from distot.cli import main as command
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
    for words in (["--workers", "2"], ["a.zarr"], ["a.zarr", "b.zarr", "c.zarr"], ["a.zarr", "b.zarr", "--nonsense"]):
        with pytest.raises(InputError, match="a job needs LATENTS"):
            submit(words)
    with pytest.raises(InputError, match="must be a dict"):
        submit(["a.zarr", "b.zarr"], runtime_env=[1])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"no Ray dashboard at http://127\.0\.0\.1:9"):
        submit(["a.zarr", "b.zarr"], "http://127.0.0.1:9")


def test_paths_are_found_wherever_they_stand() -> None:
    """As they were written, for a job is named after them."""
    first = parsed(["./a.zarr", "b.zarr", "--workers", "2", "--until-chi2=0.1"])
    assert (first["latents"], first["run"]) == ("./a.zarr", "b.zarr")
    assert parsed(["--until-chi2", "0.1", "./a.zarr", "--workers", "2", "b.zarr"]) == first
    assert parsed(["./a.zarr", "b.zarr", "--workers", "3", "--until-chi2=0.1"]) != first


def test_a_job_of_this_name_at_another_task() -> None:
    """The same words in another order are the same task."""
    task = parsed(["a.zarr", "b.zarr", "--seed", "1"])
    _check_same(task, "job-1", "python -m jobs.solve --seed 1 a.zarr b.zarr")
    for entrypoint in ("python -m jobs.solve a.zarr b.zarr", "python train.py"):
        with pytest.raises(InputError, match="job-1 is at work on something else: python"):
            _check_same(task, "job-1", entrypoint)


@pytest.mark.parametrize(
    "address",
    [
        "nonsense",
        "http://u:secret@127.0.0.1:9",
        "u:secret@127.0.0.1:9",
        "http://u:se/secret@127.0.0.1:9",
        "json://secret@x",
        "http://127.0.0.1:9/?token=secret",
        "http://127.0.0.1:port",
        "http://[::1",
        "a b",
    ],
)
def test_addresses_that_lead_nowhere(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        command(["submit", "--address", address, "a.zarr", "b.zarr"])
    said = capsys.readouterr()
    assert said.err.count("error: ") == 1
    assert "--address" in said.err
    assert "secret" not in said.err + said.out


@pytest.mark.parametrize("content", [b"{bad", b"[1]", b"3", b"", b"\xff\xfe", b"[" * 100_000, None, "folder"])
def test_environments_that_are_none(tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "environment.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.mkdir()
    with pytest.raises(SystemExit, match="1"):
        command(["submit", "--runtime-env", str(file), "a.zarr", "b.zarr"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(file) in said
