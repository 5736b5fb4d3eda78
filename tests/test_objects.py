"""Latents, runs and outputs in an object store: a real S3 protocol server here, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import sabotage
from moto.server import ThreadedMotoServer

import distot
from cluster.workers import Shape
from distot.cli import main as command
from distot.errors import DistotWarning, InputError, StoreError
from distot.ingest import ingest
from distot.inspect import describe
from distot.store import (
    RowFile,
    Run,
    TakenOver,
    Url,
    as_place,
    copy_latents,
    files,
    lock,
    open_latents,
    places,
    reference,
    referred,
)
from jobs.solve import main as solve_or_go_on

CLOUD = np.random.default_rng(3).standard_normal((1500, 4)) * np.linspace(2, 0.4, 4)
WHOLE: dict[str, Any] = {"until_chi2": None, "max_samples": 9000, "assigner": "native", "certificate_samples": 5000}
SECRET = "not-for-the-eyes-of-the-log"


class Wire(socketserver.ThreadingTCPServer):
    """Stands between client and server, and breaks what it is told to: ``fault(head)`` gets the head of each request
    and gives "500", "drop" (no answer), "cut" (half an answer), "slow" (it comes in drips), or None."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.fault: Any = lambda head: None
        self.done: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Wire)
        while (request := self.read()) is not None:
            head, body = request
            what = self.server.fault(head.split(b"\r\n")[0].decode())
            if what is not None:
                self.server.done.append(f"{what} {head.split(b' ')[0].decode()}")
            if what == "drop":
                return
            if what == "500":
                self.request.sendall(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n")
                continue
            with socket.create_connection(self.server.upstream) as there:
                there.sendall(head.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nconnection: close\r\n", 1) + body)
                answer = b"".join(iter(lambda: there.recv(65536), b""))
            answer = answer.replace(b"Connection: close\r\n", b"", 1)
            try:
                if what == "slow":
                    for place in range(0, len(answer), 1 + len(answer) // 20):
                        self.request.sendall(answer[place : place + 1 + len(answer) // 20])
                        time.sleep(0.01)
                elif what == "cut":
                    self.request.sendall(answer[: -1 - len(answer) // 4])
                    return
                else:
                    self.request.sendall(answer)
            except OSError:
                return  # the client has given up

    def read(self) -> tuple[bytes, bytes] | None:
        """Head and body of the next request."""
        data = b""
        while b"\r\n\r\n" not in data:
            if not (piece := self.request.recv(65536)):
                return None
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields.get(b"content-length", 0))
        while len(body) < length:
            if not (piece := self.request.recv(65536)):
                return None
            body += piece
        return head + b"\r\n\r\n", body


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with Wire(server.get_host_and_port()) as wire:
        threading.Thread(target=wire.serve_forever, daemon=True).start()
        yield wire
        wire.shutdown()
    server.stop()


@pytest.fixture
def bucket(wire: Wire, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an empty bucket; the environment says how to reach it."""
    url = f"http://127.0.0.1:{wire.server_address[1]}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a-key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(places, "PATIENCE", timedelta(seconds=6))
    places._bucket.cache_clear()
    name = f"bucket-{abs(hash(request.node.name)):x}"
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket=name)
    wire.fault, wire.done = lambda head: None, []
    yield f"s3://{name}"
    wire.fault = lambda head: None
    places._bucket.cache_clear()


@pytest.fixture(scope="module")
def reference_run() -> distot.Solution:
    return distot.solve(CLOUD, progress=False, **WHOLE)


def assert_same(found: distot.Solution, expected: distot.Solution) -> None:
    assert np.array_equal(found.heights, expected.heights)
    assert found.certificate == expected.certificate


def test_ingest_solve_resume_assign(
    bucket: str, tmp_path: Path, reference_run: distot.Solution, capfd: pytest.CaptureFixture[str]
) -> None:
    """Everything lives in the bucket, and is what it is in a folder."""
    np.save(tmp_path / "z.npy", CLOUD)
    latents, run = f"{bucket}/deep/latents.zarr", f"{bucket}/deep/run.zarr"
    done = ingest(tmp_path / "z.npy", latents)
    assert done.fingerprint == open_latents(latents).fingerprint
    assert np.array_equal(open_latents(latents)[5:900], CLOUD[5:900])
    distot.solve(latents, run=run, progress=False, checkpoint_seconds=0.5, **WHOLE | {"max_samples": 5000})
    found = distot.resume(run, max_samples=9000, progress=False)
    assert_same(found, reference_run)
    assert_same(distot.load(run), reference_run)
    assert describe(run)["state"] == "max_samples"
    assert json.loads((Url(run) / "config.json").read_text())["latents"] == "../latents.zarr"
    events = [record["event"] for record in Run(run).records()]
    assert events.count("begin") == events.count("resume") == 1
    assert events[-1] == "certificate"
    assert len((Url(run) / "checkpoints").files()) > 0
    assert not (Url(run) / "owner.json").exists()
    with pytest.raises(StoreError, match="exists already"):
        distot.solve(latents, run=run, **WHOLE)
    x = CLOUD[:70] + 0.1
    copy_latents(x, None, Url(f"{bucket}/x.zarr"), "test")
    assert distot.assign_file(run, f"{bucket}/x.zarr", f"{bucket}/pairs.npy") == 70
    (tmp_path / "pairs.npy").write_bytes(Url(f"{bucket}/pairs.npy").read_bytes())
    assert np.array_equal(np.load(tmp_path / "pairs.npy"), reference_run.assign(x))
    distot.generate_file(run, f"{bucket}/new.zarr", 3000)
    assert np.array_equal(RowFile(f"{bucket}/new.zarr").read("z"), reference_run.generate(3000).samples)
    written = b"".join((Url(bucket) / name).read_bytes() for name in Url(bucket).files())
    printed = "".join(capfd.readouterr())
    assert SECRET not in printed
    assert SECRET.encode() not in written


def test_latents_in_memory_and_a_saved_solution(bucket: str, reference_run: distot.Solution) -> None:
    kept = distot.solve(CLOUD, run=f"{bucket}/run.zarr", progress=False, **WHOLE)
    assert_same(kept, reference_run)
    assert str(reference_run.save(f"{bucket}/copy.zarr")) == f"{bucket}/copy.zarr"
    assert_same(distot.load(f"{bucket}/copy.zarr"), reference_run)


def test_commands_take_addresses(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "z.npy", CLOUD)
    task = [f"{bucket}/z.zarr", f"{bucket}/run.zarr", "--until-chi2", "0.2"]
    for run, words, code in (
        (command, ["ingest", str(tmp_path / "z.npy"), f"{bucket}/z.zarr"], 0),
        (solve_or_go_on, task, 0),
        (solve_or_go_on, task, 0),
        (command, ["inspect", f"{bucket}/nothing.zarr"], 1),
    ):
        with pytest.raises(SystemExit) as end:
            run(words)
        assert end.value.code == code
    printed = capsys.readouterr()
    assert "the goal was reached" in printed.out
    assert "state              until_chi2" in printed.out  # the second time nothing was left to do
    assert f"error: {bucket}/nothing.zarr does not exist" in printed.err


def test_errors_and_slow_answers_are_waited_out(bucket: str, wire: Wire, reference_run: distot.Solution) -> None:
    """Every seventh request fails, by turns with an error, in the middle of a body, or slowly; the run is the same."""
    seen = [0]

    def fault(head: str) -> str | None:
        seen[0] += 1
        return ("500", "drop", "slow", "cut")[seen[0] // 7 % 4] if seen[0] % 7 == 0 else None

    wire.fault = fault
    found = distot.solve(CLOUD, run=f"{bucket}/run.zarr", progress=False, checkpoint_seconds=0.2, **WHOLE)
    assert_same(found, reference_run)
    assert {what.split()[0] for what in wire.done} == {"500", "drop", "slow", "cut"}
    assert_same(distot.load(f"{bucket}/run.zarr"), reference_run)


def test_a_store_that_is_gone_for_a_while(
    bucket: str, wire: Wire, reference_run: distot.Solution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that cannot be written is given up, in the middle; the run goes on and writes the next one."""
    monkeypatch.setattr(places, "PATIENCE", timedelta(seconds=0.3))
    places._bucket.cache_clear()
    events: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "checkpoint" and len(events) < 10:
            wire.fault = lambda head: "drop" if "part-00000/heights" in head else None
        if event["event"] == "warning":
            wire.fault = lambda head: None

    run = f"{bucket}/run.zarr"
    with pytest.warns(DistotWarning, match="the run goes on and will try again"):
        found = distot.solve(CLOUD, run=run, progress=False, checkpoint_seconds=0.01, on_event=listen, **WHOLE)
    assert_same(found, reference_run)
    kinds = [event["event"] for event in events]
    assert kinds.index("checkpoint") < kinds.index("warning")
    assert "checkpoint" in kinds[kinds.index("warning") :]
    assert_same(distot.load(run), reference_run)


def test_two_that_make_the_same_run(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one, which has looked before the first began to write, is refused and deletes nothing."""
    with files.new_folder(Url(f"{bucket}/new")) as folder:
        (folder / "precious").write_bytes(b"kept")
        monkeypatch.setattr(Url, "exists", lambda self: False)
        with pytest.raises(StoreError, match="another process is making"), files.new_folder(Url(f"{bucket}/new")):
            pytest.fail("two are at it")
    assert list(Url(f"{bucket}/new").files()) == ["precious"]


def test_a_second_writer_is_refused_and_a_dead_one_replaced(
    bucket: str, reference_run: distot.Solution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "RENEWED", 0.1)
    run = f"{bucket}/run.zarr"
    distot.solve(CLOUD, run=run, progress=False, **WHOLE | {"max_samples": 5000})
    with Run(run).lock(), pytest.raises(StoreError, match=f"is being written by process {os.getpid()}"):
        distot.resume(run, max_samples=9000)
    dead = {"pid": 1, "host": "a-machine-that-is-gone", "since": "yesterday", "group": "it"}
    (Url(run) / "owner.json").write_bytes(json.dumps(dead).encode())
    with monkeypatch.context() as forever:
        forever.setattr(lock, "LEASE", 1e9)
        with Run(run).lock("it"):
            pass  # another process of the same group need not wait for the lease
    monkeypatch.setattr(lock, "LEASE", 0.5)
    (Url(run) / "owner.json").write_bytes(json.dumps(dead).encode())
    assert_same(distot.resume(run, max_samples=9000, progress=False), reference_run)


def test_a_writer_that_was_silent_for_too_long_stops(bucket: str, reference_run: distot.Solution) -> None:
    """Somebody else has taken the run over: the first writer commits nothing more, and says so."""
    run = f"{bucket}/run.zarr"

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            owner = Url(run) / "owner.json"
            owner.write_bytes(json.dumps({"pid": 7, "host": "another-machine", "group": "other"}).encode())

    with pytest.raises(TakenOver, match="taken over by process 7 on host another-machine"):
        distot.solve(CLOUD, run=run, progress=False, checkpoint_seconds=0.05, on_event=listen, **WHOLE)
    owner = Url(run) / "owner.json"
    assert json.loads(owner.read_bytes())["pid"] == 7  # it is left to its new owner
    assert describe(run)["checkpoint"]
    owner.unlink()
    assert_same(distot.resume(run, progress=False), reference_run)


def test_workers_share_a_bucket(bucket: str) -> None:
    """The first worker, which holds the lease, is killed, and another one takes it over."""
    latents, run = Url(f"{bucket}/z.zarr"), Url(f"{bucket}/run.zarr")
    copy_latents(sabotage.CLOUD, None, latents, "test")

    class Killer(sabotage.Saboteur):
        def __call__(self, event: dict[str, Any]) -> None:
            super().__call__(event)
            if event["event"] == "checkpoint" and len(self.said("checkpoint")) == 1:
                os.kill(self.pids[0], signal.SIGKILL)

    killer = Killer(0)
    options = replace(sabotage.OPTIONS, checkpoint_seconds=1.0)
    sabotage.assert_right(sabotage.solved(Shape(2), run, killer, options, latents))
    assert killer.said("resume")
    sabotage.assert_right(distot.load(str(run)))


def test_a_killed_writer_leaves_what_it_had_committed(
    bucket: str, tmp_path: Path, reference_run: distot.Solution, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_latents(CLOUD, None, Url(f"{bucket}/z.zarr"), "test")
    run = Url(f"{bucket}/run.zarr")
    command = [sys.executable, "-m", "distot.cli", "solve", f"{bucket}/z.zarr", str(run), "--until-chi2", "none"]
    command += ["--max-samples", "9000000", "--assigner", "native", "--checkpoint-seconds", "0.05"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as solving:
        deadline = time.monotonic() + 60
        while not (run / "LATEST").is_file():
            assert time.monotonic() < deadline
            assert solving.poll() is None
            time.sleep(0.05)
        solving.send_signal(signal.SIGKILL)
    (run / "checkpoints" / "step-000009999-debris" / "part-00000" / "zarr.json").write_bytes(b"{")
    monkeypatch.setattr(lock, "LEASE", 0.5)
    assert describe(run)["checkpoint"]
    found = distot.load(run)
    assert found.samples > 0
    with Run(run).lock():
        assert not any("debris" in name for name in (run / "checkpoints").files())
    assert distot.load(run).samples == found.samples


def test_a_damaged_checkpoint_is_passed_over(bucket: str, reference_run: distot.Solution) -> None:
    run = f"{bucket}/run.zarr"
    distot.solve(CLOUD, run=run, progress=False, **WHOLE | {"max_samples": 5000})
    distot.resume(run, progress=False, max_samples=9000)
    folder = Url(run) / "checkpoints"
    newest = folder / Run(run).checkpoints.committed()[0].name
    name = next(name for name in newest.files() if "/heights/c" in name)
    data = (newest / name).read_bytes()
    (newest / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.warns(DistotWarning) as said:
        assert_same(distot.resume(run, progress=False, max_samples=9000), reference_run)
    assert "fails its checksum" in str(said[0].message)
    assert "using the checkpoint before it" in str(said[1].message)


def test_latents_that_are_not_complete(bucket: str) -> None:
    latents = Url(f"{bucket}/z.zarr")
    copy_latents(CLOUD, None, latents, "test")
    about = (latents / "zarr.json").read_text()
    shard = next(name for name in latents.files() if name.startswith("z/c/"))
    data = (latents / shard).read_bytes()
    (latents / shard).unlink()
    with pytest.raises(StoreError, match=f"{shard} is missing or empty"):
        open_latents(latents)
    (latents / shard).write_bytes(data[:100] + bytes(100) + data[200:])
    with pytest.raises(StoreError, match=f"{shard} is damaged"):
        open_latents(latents)[:]
    (latents / shard).write_bytes(data)
    unfinished = json.loads(about) | {"attributes": {"format": "distot-latents", "unfinished": True}}
    (latents / "zarr.json").write_bytes(json.dumps(unfinished).encode())
    with pytest.raises(StoreError, match="is not complete"):
        open_latents(latents)


def test_bad_addresses_are_refused_in_one_sentence(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="ftp://there/x is no place that distot knows"):
        distot.solve("ftp://there/x")
    with pytest.raises(InputError, match="put no credentials into the address") as caught:
        Url("s3://key:word@bucket/x")
    assert "word@" not in str(caught.value)
    with pytest.raises(StoreError, match=r"s3://nobody-has-this/run\.zarr: there is no such bucket"):
        distot.solve(CLOUD, run="s3://nobody-has-this/run.zarr", **WHOLE)
    Url(f"{bucket}/z.npy").write_bytes(b"")
    with pytest.raises(InputError, match="only zarr is read"):
        ingest(f"{bucket}/z.npy", f"{bucket}/y.zarr")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(places, "PATIENCE", timedelta(seconds=0.5))
    places._bucket.cache_clear()
    with pytest.raises(StoreError, match="check network and address"):
        distot.load(f"{bucket}/run.zarr")


def test_other_providers_are_addressed_as_their_own_tools_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is sent: the client is made from the address and the environment."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    azure, google = as_place("az://box/a/run.zarr"), as_place("gs://box/a/run.zarr")
    assert isinstance(azure, Url)
    assert isinstance(google, Url)
    assert (azure.root, azure.key, azure.name) == ("box", "a/run.zarr", "run.zarr")
    assert azure.bucket.config["container_name"] == "box"
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    assert google.bucket.config["bucket"] == "box"
    assert as_place("file:///tmp/a") == Path("/tmp/a")


def test_references_are_relative_where_both_can_move() -> None:
    a, b, c = (Url(text) for text in ("s3://box/x/z.zarr", "s3://box/y/run.zarr", "s3://other/z.zarr"))
    assert reference(a, b) == "../../x/z.zarr"
    assert referred("../../x/z.zarr", b) == a
    assert reference(c, b) == "s3://other/z.zarr"
    assert referred("s3://other/z.zarr", b) == c
    assert referred(reference(Path("/d/z.zarr"), b), b) == Path("/d/z.zarr")
    assert referred(reference(Path("/d/z.zarr"), Path("/d/run.zarr")), Path("/e/run.zarr")) == Path("/e/z.zarr")
    assert referred(reference(a, Path("/d/run.zarr")), Path("/d/run.zarr")) == a
