"""The command line: what it prints and where, exit codes, and one sentence for every mistake."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from processes import LIMIT, Child, Launcher, Normal, quick_folder, wait_for

import distot
from distot.store import Run, copy_latents

COMMANDS = ("ingest", "solve", "resume", "certify", "assign", "submit", "plan", "inspect", "report")
FOREVER = ("--until-chi2", "none", "--max-samples", "1e12")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
Z = np.random.default_rng(5).standard_normal((100, 3)).astype(np.float32)


@pytest.fixture
def tmp_path(launcher: Launcher) -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder
        launcher.stop_all()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with Launcher(tmp_path_factory.mktemp("processes")) as started:
        yield started


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "z.zarr"
    copy_latents(Z, None, path, "drawn for a test")
    return path


@pytest.fixture(scope="module")
def finished(launcher: Launcher, latents: Path) -> Path:
    run = latents.parent / "finished.zarr"
    assert launcher.run("solve", latents, run, "--until-chi2", "0.1").returncode == 0
    return run


def distot_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A Python of its own from start to end, as a user has it."""
    words = [sys.executable, "-m", "distot.cli", *map(str, arguments)]
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT)


def assert_one_sentence(child: Child, *parts: str) -> None:
    """Exit code 1, nothing on standard output, and one line on standard error, with these parts."""
    assert child.wait() == 1, child.stderr()
    assert child.stdout() == ""
    lines = child.stderr().splitlines()
    assert len(lines) == 1, child.stderr()
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


# ------------------------------------------------------------------------------------ from one end to the other


@pytest.mark.slow
def test_every_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    source, latents, run = tmp_path / "z.npy", tmp_path / "z.zarr", tmp_path / "run.zarr"
    np.save(source, Z)

    done = distot_command("ingest", source, latents)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{latents}: 100 latents of dimension 3, float32",
        f"next: distot solve {latents} run.zarr",
    ]
    assert done.stderr == ""

    done = distot_command("solve", latents, run, "--until-chi2", "none", "--max-samples", "3e3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reason"] == "max_samples"
    assert done.stdout.count("\n") == 1

    done = distot_command("resume", run, "--until-chi2", "0.1", "--max-samples", "1_000_000")
    assert done.returncode == 0, done.stderr
    assert f"{run}: the goal was reached: chi2 is below 0.1 with 95 % confidence" in done.stdout
    assert "go on:" not in done.stdout

    done = distot_command("certify", run, "--samples", "2000")
    assert done.returncode == 0, done.stderr
    assert "2,000 fresh samples" in done.stdout
    assert done.stderr == ""

    done = distot_command("inspect", run)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^state +until_chi2$", done.stdout, re.MULTILINE)
    assert done.stderr == ""


def test_json_is_all_there_is_on_standard_output(launcher: Launcher, tmp_path: Path) -> None:
    source, latents, run = tmp_path / "z.npy", tmp_path / "z.zarr", tmp_path / "run.zarr"
    np.save(source, Z)

    def answer(*arguments: object, code: int = 0) -> dict[str, Any]:
        child = launcher.run(*arguments, "--json")
        assert child.returncode == code, child.stderr()
        return dict(json.loads(child.stdout()))

    written = answer("ingest", source, latents)
    assert written["shape"] == [100, 3]
    assert written["dtype"] == "float32"
    assert written["path"] == str(latents)
    shown = answer("inspect", latents)
    assert shown["kind"] == "latents"
    assert shown["fingerprint"] == written["fingerprint"]
    solved = answer("solve", latents, run, "--max-samples", 2500, "--seed", 3, code=3)
    assert solved["reason"] == "max_samples"
    assert solved["samples"] <= 2500
    assert set(solved["certificate"]) >= {"chi2", "chi2_error", "w2_squared_bound", "empty", "samples"}
    resumed = answer("resume", run, "--max-samples", 1e6, "--until-chi2", 0.1)
    assert resumed["reason"] == "until_chi2"
    assert resumed["history"][-1]["upper"] <= 0.1
    certified = answer("certify", run, "--samples", 3000, "--seed-step", 1)
    assert certified["certificate"]["samples"] == 3000
    assert certified["certificate"]["stream_step"] == 1
    shown = answer("inspect", run)
    assert shown["kind"] == "run"
    assert shown["state"] == "until_chi2"
    assert f"chi2 {certified['certificate']['chi2']:.4f}" in shown["certificate"]
    assert distot.load(run).certificate.to_dict() == certified["certificate"]


def test_every_line_of_the_log_is_an_event(finished: Path) -> None:
    text = (finished / "log.jsonl").read_text()
    assert text.endswith("\n")
    events = [json.loads(line) for line in text.splitlines()]
    names = [event["event"] for event in events]
    assert names[0] == "begin"
    assert names[-3:] == ["stop", "certify", "certificate"]
    assert {"start", "check", "checkpoint"} <= set(names)
    assert all(event["time"] > 1.6e9 and event["seconds"] >= 0 for event in events)
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


# ---------------------------------------------------------------------------------------------- exit codes


def test_spent_budget_says_how_to_go_on(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    child = launcher.run("solve", latents, run, "--max-samples", "1500")
    assert child.returncode == 3
    assert f"{run}: the budget of 1,500 samples is spent" in child.stdout()
    [line] = [line for line in child.stdout().splitlines() if line.startswith("go on: distot ")]
    child = launcher.run(*line.removeprefix("go on: distot ").split())
    assert child.returncode in (0, 3), child.stderr()
    assert distot.load(run).samples > 1500


def test_spent_budget_without_a_goal_is_what_was_asked_for(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    options = ["--until-chi2", "none", "--max-samples", "1500"]
    assert launcher.run("solve", latents, tmp_path / "run.zarr", *options).returncode == 0


def test_max_time_is_kept(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    words = ["solve", latents, run, "--until-chi2", "1e-6", "--max-time", "2s"]
    child = launcher.start("clocked", [str(word) for word in words])
    child.wait()
    assert child.returncode == 3, child.stderr()
    assert "the time of 2 s is up" in child.stdout()
    assert f"go on: distot resume {run}" in child.stdout().splitlines()
    seconds = {record["event"]: record["seconds"] for record in Run(run).records()}
    assert 1.5 < seconds["stop"] < 2.5
    assert seconds["certificate"] < 3.0


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        *((signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGHUP", 129)),
        *((signal.SIGUSR1, "SIGUSR1", 138), (signal.SIGXCPU, "SIGXCPU", 152)),
    ],
)
def test_signals_save_and_say_how_to_go_on(
    launcher: Launcher, latents: Path, tmp_path: Path, number: int, name: str, code: int
) -> None:
    run = tmp_path / "run.zarr"
    child = launcher.command("solve", latents, run, *FOREVER, "--json")
    wait_for("a look at chi2", lambda: "samples: chi2" in child.stderr(), child)
    child.kill(number)
    assert child.wait() == code
    assert child.stdout() == ""
    last = child.stderr().splitlines()[-1]
    assert last == f"stopped by {name}; everything is saved, go on with: distot resume {run}"
    assert "Traceback" not in child.stderr()
    solution = distot.load(run)
    assert solution.reason == "interrupted"
    records = Run(run).records()
    assert records[-1]["event"] == "stop"
    assert records[-1]["samples"] == solution.samples


def test_interrupt_of_a_real_command(latents: Path, tmp_path: Path) -> None:
    """The same for an interpreter that ends by itself."""
    words = [sys.executable, "-m", "distot.cli", "solve", str(latents), str(tmp_path / "run.zarr"), *FOREVER]
    with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "samples: chi2" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.endswith(f"go on with: distot resume {tmp_path}/run.zarr\n")
    assert "Traceback" not in rest


def test_second_interrupt_quits_at_once(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    """Both signals are delivered while the process stands still, so it sees them before it can save."""
    run = tmp_path / "run.zarr"
    child = launcher.command("solve", latents, run, *FOREVER)
    wait_for("a look at chi2", lambda: "samples: chi2" in child.stderr(), child)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        child.kill(number)
    assert child.wait() == 130
    assert child.stderr().splitlines()[-1] == "stopped at once; the run, if it has begun, is as of its last checkpoint"
    assert "Traceback" not in child.stderr()
    assert Run(run).load_checkpoint() is None
    with Run(run).lock():
        pass


def test_a_signal_that_is_ignored_ends_nothing(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    child = launcher.start("ignoring", int(signal.SIGHUP), [str(word) for word in ("solve", latents, run, *FOREVER)])
    wait_for("a look at chi2", lambda: "samples: chi2" in child.stderr(), child)
    child.kill(signal.SIGHUP)
    seen = child.stderr()
    wait_for("another look", lambda: child.stderr() != seen, child)
    child.kill(signal.SIGTERM)
    assert child.wait() == 143
    assert "stopped by SIGTERM; everything is saved" in child.stderr()


def test_signals_that_come_together_save_all_the_same(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    """As where a terminal is closed, or a batch system sends one to the process and one to its group."""
    run = tmp_path / "run.zarr"
    child = launcher.command("solve", latents, run, *FOREVER)
    wait_for("a look at chi2", lambda: "samples: chi2" in child.stderr(), child)
    for number in (signal.SIGSTOP, signal.SIGHUP, signal.SIGTERM, signal.SIGCONT):
        child.kill(number)
    assert child.wait() in (129, 143)  # whichever its threads took first
    assert distot.load(run).reason == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_ingest_had_begun_is_cleared_away(launcher: Launcher, tmp_path: Path, number: int) -> None:
    np.save(tmp_path / "z.npy", np.zeros((4000, 3)))
    child = launcher.start("struck", number, ["ingest", str(tmp_path / "z.npy"), str(tmp_path / "z.zarr")])
    assert child.wait() == 128 + number
    assert "Traceback" not in child.stderr()
    assert [file.name for file in tmp_path.iterdir()] == ["z.npy"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_just_before_a_command_begins(launcher: Launcher, latents: Path, number: int) -> None:
    child = launcher.start("early", number, ["inspect", str(latents)])
    assert child.wait() == 128 + number
    assert child.stderr().count("\n") == 1
    assert "stopped at once" in child.stderr()


@pytest.mark.parametrize("words", [("-m", "distot.cli"), ("-m", "jobs.solve"), ("distot",)], ids=" ".join)
def test_an_interrupt_while_it_starts_ends_it_without_a_traceback(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Sent by a module that is imported, and that catches everything."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    if words == ("distot",):
        (tmp_path / "distot").write_text("from distot.cli import main\nmain()\n")
        words = (str(tmp_path / "distot"),)
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parent.parent}"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 130
    assert done.stderr == "stopped by SIGINT\n"


def test_a_run_goes_on_when_nobody_reads_what_it_says(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    child = launcher.start("unheard", ["solve", str(latents), str(run), "--until-chi2", "0.1"])
    assert child.wait() == 0
    assert "the goal was reached" in child.stdout()
    (warning,) = [record["text"] for record in Run(run).records() if record["event"] == "warning"]
    assert warning.startswith("standard error is lost ([Errno 32] Broken pipe); the run goes on without it")
    assert Run(run).load_json("certificate.json") is not None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_what_cannot_be_printed_is_one_sentence(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    child = launcher.start("onto", "/dev/full", ["solve", str(latents), str(run), "--until-chi2", "0.1", "--json"])
    assert child.wait() == 1
    assert child.stderr().splitlines()[-1].startswith("error: not all that was printed could be written: ")
    assert Run(run).load_json("certificate.json") is not None


def test_interrupt_before_the_run_begins(launcher: Launcher, tmp_path: Path) -> None:
    """A pipe in place of the latents' file holds the process in reading until it is interrupted."""
    pipe = tmp_path / "z.npy"
    os.mkfifo(pipe)
    child = launcher.command("ingest", pipe, tmp_path / "z.zarr")
    with pipe.open("wb", buffering=0) as file:  # returns when the child has opened it, too
        file.write(b"\x93NUMPY")
        child.kill(signal.SIGINT)
    assert child.wait() == 130  # at the latest at the end of the file: Python cannot break off a read about to begin
    assert "Traceback" not in child.stderr()
    assert list(tmp_path.iterdir()) == [pipe]


def test_python_catches_an_interrupt_with_the_solution(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    rows = tmp_path / "z.npy"
    np.save(rows, Z)
    for run in (None, str(tmp_path / "run.zarr")):
        found = launcher.call("solve", str(rows), run, {"until_chi2": 1e-3}, 60, [signal.SIGTERM])
        assert found["reason"] == "interrupted"
        assert len(found["heights"]) == 100
        assert np.isfinite(found["heights"]).all()
        assert np.ptp(found["heights"]) > 0
        assert found["certificate"]["chi2"] < 1.0
        where = "in this exception's .solution" if run is None else f"distot resume {run}"
        assert found["caught"].startswith("Interrupted: stopped by SIGTERM")
        assert where in found["caught"]
    assert run is not None
    assert distot.load(run, source=Normal(3)).samples == found["samples"]


def test_python_second_interrupt(launcher: Launcher, tmp_path: Path) -> None:
    rows = tmp_path / "z.npy"
    np.save(rows, Z)
    found = launcher.call("solve", str(rows), None, {"until_chi2": 1e-3}, 60, [signal.SIGINT, signal.SIGINT])
    assert found == {"caught": "KeyboardInterrupt: "}


# ------------------------------------------------------------------------------------------------ mistakes


MISTAKES = [
    (["solve", "Z", "RUN", "--max-time", "10x"], "'10x' is not a time above zero; write 90s, 10m or 1h30m"),
    (["solve", "Z", "RUN", "--max-time", "-5"], "'-5' is not a time above zero"),
    (["solve", "Z", "RUN", "--max-time", "nan"], "'nan' is not a time above zero"),
    (["solve", "Z", "RUN", "--max-time", "1m30"], "'1m30' is not a time above zero"),
    (["solve", "Z", "RUN", "--max-samples", "many"], "'many' is not a number of samples; write 250000 or 2e6"),
    (["solve", "Z", "RUN", "--max-samples", "-3"], "'-3' must be a whole number of at least 1"),
    (["solve", "Z", "RUN", "--max-samples", "2.5"], "'2.5' must be a whole number of at least 1"),
    (["solve", "Z", "RUN", "--max-samples", "inf"], "'inf' must be a whole number of at least 1"),
    (["solve", "Z", "RUN", "--until-chi2", "small"], "'small' is not a number above zero; write 0.05, or none"),
    (["solve", "Z", "RUN", "--until-chi2", "-0.1"], "'-0.1' is not a number above zero"),
    (["solve", "Z", "RUN", "--until-chi2", "none"], "nothing would ever stop this run"),
    (["solve", "Z", "RUN", "--seed", "-1"], "seed must be between 0 and 2^63 - 1, it is -1"),
    (["solve", "Z", "RUN", "--seed", "one"], "Invalid value for '--seed'"),
    (["solve", "Z", "RUN", "--checkpoint-seconds", "-1"], "checkpoint_seconds must be 0 or more, it is -1"),
    (["solve", "Z", "RUN", "--certificate-samples", "1"], "certificate_samples must be at least 2"),
    (["solve", "Z", "RUN", "--device", "tpu"], "unknown device 'tpu'; choose auto, cpu or cuda"),
    (["solve", "Z", "RUN", "--source", "torus"], "--source torus: not one of gaussian, cube, ball, sphere"),
    (["solve", "Z", "RUN", "--source", "ball", "--radius", "-1"], "radius must be positive, not -1"),
    (["solve", "Z", "RUN", "--source", "cube", "--low", "2"], "low 2.0 must be below high 1.0"),
    (["solve", "Z", "RUN", "--mean", "NONE"], "cannot be read as an npy file"),
    (["solve", "NONE", "RUN"], "does not exist; make one with: distot ingest"),
    (["solve", "NPY", "RUN"], "z.npy is not a zarr store; make one with: distot ingest"),
    (["solve", "Z", "RUN", "--qqq"], "No such option: --qqq; see distot solve --help"),
    (["solve"], "Missing argument 'LATENTS.zarr'; see distot solve --help"),
    (["solve", "Z", "RUN", "extra"], "extra"),
    (["sovle", "Z", "RUN"], "No such command 'sovle'"),
    (["resume", "NONE"], "does not exist; start one with: distot solve LATENTS.zarr"),
    (["resume", "Z"], "is not a run folder"),
    (["resume", "DONE", "--until-chi2", "none"], "give a tiny one, --until-chi2 1e-9"),
    (["resume", "DONE", "--max-time", "soon"], "'soon' is not a time above zero"),
    (["certify", "DONE", "--samples", "0"], "'0' must be a whole number of at least 1"),
    (["certify", "DONE", "--seed-step", "-1"], "Invalid value for '--seed-step'"),
    (["certify", "NONE"], "does not exist"),
    (["inspect", "NONE"], "does not exist"),
    (["inspect", "NPY"], "is not a zarr store"),
    (["ingest", "NONE", "RUN"], "NONE"),
    (["ingest", "NPY", "Z"], "exists already"),
    (["ingest", "NPY", "RUN", "--dtype", "int3"], "int3"),
    (["solve", "Z", "RUN", "--assigner", "magic"], "magic"),
    (["certify", "DONE", "--samples", "1"], "at least 2"),
    (["certify", "DONE", "--samples", "1e308"], "'1e308' is too large; give a number below 2^63"),
    (["solve", "Z", "RUN", "--max-samples", "1e30"], "'1e30' is too large"),
    (["solve", "Z", "RUN", "--certificate-samples", "9223372036854775808"], "'9223372036854775808' is too large"),
    (["certify", "DONE", "--seed-step", "99999999999999999999"], "seed_step must be a whole number below 2^63"),
    (["generate", "DONE", "RUN", "-n", "9", "--seed", "99999999999999999999"], "seed must be between 0 and 2^63 - 1"),
    (["plan", "--n", "1e6", "--d", "8", "--on", "2x cpu", "--until-chi2", "1e-300"], "no such problem"),
    (["plan", "--n", "1e6", "--d", "99999999999999999999", "--on", "2x cpu"], "no such problem"),
    (["solve", "Z", "RUN", "--workers", "99999999999"], "give 100,000 at most"),
    (["solve", "Z", "RUN", "--source", "ball", "--radius", "1e308"], "may be 1e+150 at most, not 1e+308"),
    (["solve", "Z", "RUN", "--source", "cube", "--low", "-1e308"], "may be 1e+150 at most"),
    (["solve", "Z", "RUN", "--replicas", "2"], "replicas=2 is for work on workers; say how many"),
    (["solve", "Z", "RUN", "--ray", "auto"], "ray='auto' is for work on workers"),
    (["resume", "DONE", "--replicas", "2"], "replicas=2 is for work on workers"),
    (["certify", "DONE", "--ray", "auto"], "ray='auto' is for work on workers"),
    (["assign", "DONE", "NPY", "RUN", "--replicas", "2"], "replicas=2 is for work on workers"),
    (["generate", "DONE", "RUN", "-n", "9", "--ray", "auto"], "ray='auto' is for work on workers"),
    (["generate", "DONE", "RUN", "-n", "9", "--threshold", "1", "--quantile", "0.5"], "the quantile 0.5 not"),
    (["solve", "Z", "RUN", "--low", "0"], "--low is for --source cube alone, not for gaussian; leave it out"),
    (["solve", "Z", "RUN", "--source", "cube", "--radius", "2"], "--radius is for --source ball or sphere alone"),
    (["solve", "Z", "RUN", "--source", "ball", "--mean", "NPY"], "--mean is for --source gaussian alone"),
    (["solve", "Z", "RUN", "--source", "Z", "--cov", "NPY"], "--cov is for --source gaussian alone"),
    (["solve", "Z", "RUN", "--top-k", "8"], "--top-k is for the entropic problem alone"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), [pytest.param(words, message, id=" ".join(words)) for words, message in MISTAKES]
)
def test_mistakes_get_one_sentence(
    launcher: Launcher, latents: Path, finished: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    source = tmp_path / "z.npy"
    np.save(source, Z)
    names = {"Z": latents, "RUN": tmp_path / "run.zarr", "NONE": tmp_path / "NONE", "NPY": source, "DONE": finished}
    child = launcher.run(*(names.get(word, word) for word in arguments))
    assert_one_sentence(child, message)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_without_mathematics(launcher: Launcher, finished: Path, encoding: str) -> None:
    for words in (["inspect", str(finished)], ["certify", str(finished)]):
        child = launcher.start("encoded", encoding, words)
        assert child.wait() == 0, child.stderr()
        text = (child.folder / "stdout").read_text(encoding)
        assert ("+-" if encoding == "ascii" else "±") in text
    assert ("W2^2" if encoding == "ascii" else "W2²") in text


def test_a_path_that_is_no_text(launcher: Launcher, finished: Path, latents: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    shutil.copytree(finished, folder / "run.zarr")
    for words in (
        ("inspect", folder / "run.zarr"),
        ("certify", folder / "run.zarr", "--latents", latents),
        ("report", folder / "run.zarr", "--latents", latents, "-o", folder / "page.html"),
    ):
        child = launcher.run(*words)
        assert child.returncode == 0, child.stderr()
        assert b"caf\xe9" in (child.folder / "stdout").read_bytes()


@pytest.mark.parametrize("source", ["gaussian", "cube"])
def test_a_line(launcher: Launcher, tmp_path: Path, source: str) -> None:
    """All masses are exact there, by a formula and without cells."""
    latents = tmp_path / "z.zarr"
    copy_latents(Z[:, :1], 1.0 + np.arange(100), latents, "drawn for a test")
    child = launcher.run("solve", latents, tmp_path / "run.zarr", "--source", source)
    assert child.returncode == 0, child.stderr()
    assert "all masses are exact" in child.stdout()
    child = launcher.run("certify", tmp_path / "run.zarr", "--json")
    assert child.returncode == 0, child.stderr()
    assert json.loads(child.stdout())["exact"] is None
    child = launcher.run("report", tmp_path / "run.zarr", "-o", tmp_path / "page.html")
    assert child.returncode == 0, child.stderr()
    assert facts(launcher.run("inspect", tmp_path / "run.zarr"))["state"] == "exact"


# ---------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_contains_an_example(launcher: Launcher, command: str) -> None:
    child = launcher.run(command, "--help")
    assert child.returncode == 0
    assert re.search(rf"Examples?:\s+distot {command} ", child.stdout())
    assert child.stderr() == ""


def test_version(launcher: Launcher) -> None:
    child = launcher.run("--version")
    assert child.returncode == 0
    assert child.stdout() == f"distot {version('distot')}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "--help", "-h"])
def test_overview(launcher: Launcher, arguments: list[str]) -> None:
    child = launcher.run(*arguments)
    assert child.returncode == 0
    assert all(command in child.stdout() for command in COMMANDS)
    assert "distot solve latents.zarr run.zarr" in child.stdout()
    assert child.stderr() == ""


# ------------------------------------------------------------------------------------------------- inspect


def facts(child: Child) -> dict[str, str]:
    assert child.returncode == 0, child.stderr()
    return {line[:18].strip(): line[18:].strip() for line in child.stdout().splitlines()}


def test_assign_writes_the_latent_of_each_sample(launcher: Launcher, finished: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", Z[:7])
    done = launcher.run("assign", finished, tmp_path / "x.npy", tmp_path / "out.npy")
    assert done.returncode == 0, done.stderr()
    assert done.stdout() == f"{tmp_path / 'out.npy'}: the latents of 7 samples\n"
    assert np.array_equal(np.load(tmp_path / "out.npy"), distot.load(finished).assign(Z[:7]))
    np.save(tmp_path / "flat.npy", Z[:, 0])
    for file, part in (
        ("flat.npy", "must be real and of shape (B, d), not float32 (100,)"),
        ("none.npy", "cannot be read"),
    ):
        assert_one_sentence(launcher.run("assign", finished, tmp_path / file, tmp_path / "no.npy"), part)
        assert not (tmp_path / "no.npy").exists()


def test_assign_says_what_samples_from_elsewhere_lack(launcher: Launcher, finished: Path, tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "x.zarr", shape=Z.shape, dtype="f4", chunks=(50, 3))[:] = Z
    (tmp_path / "x.zarr/c/1/0").unlink()
    done = launcher.run("assign", finished, tmp_path / "x.zarr", tmp_path / "out.npy")
    assert done.returncode == 0
    assert done.stderr().startswith(f"note: 1 chunks of {tmp_path / 'x.zarr'} are not stored")
    with pytest.warns(distot.DistotWarning, match="1 chunks of"):
        distot.assign_file(finished, tmp_path / "x.zarr", tmp_path / "again.npy")


def test_plan_prints_a_table_and_what_is_assumed(launcher: Launcher) -> None:
    done = launcher.run("plan", "--n", "1e9", "--d", "64", "--gpus", "8x h200", "--gpus", "64x H200")
    assert done.returncode == 0, done.stderr()
    assert len(done.stdout().splitlines()) == 4
    assert "the rates of H200 are assumed, not measured" in done.stderr()
    assert "8 shards do not fit into H200; use more workers" in done.stderr()
    assert_one_sentence(
        launcher.run("plan", "--n", "1e9", "--d", "64", "--gpus", "a pony"), "'a pony' names no machines"
    )


def test_inspect_latents(launcher: Launcher, latents: Path) -> None:
    shown = facts(launcher.run("inspect", latents))
    assert shown["kind"] == "latents"
    assert shown["shape"] == "[100, 3]"
    assert shown["dtype"] == "float32"
    assert shown["origin"] == "drawn for a test"
    assert shown["next"] == f"distot solve {latents} run.zarr"


def test_inspect_every_state_of_a_run(launcher: Launcher, latents: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    child = launcher.command("solve", latents, run, *FOREVER)  # the first checkpoint would come after a minute
    wait_for("a look at chi2", lambda: "samples: chi2" in child.stderr(), child)
    shown = facts(launcher.run("inspect", run))
    assert shown["kind"] == "run"
    assert shown["state"] == "no checkpoint yet"
    assert shown["max samples"] == "1,000,000,000,000"
    child.kill(signal.SIGINT)
    assert child.wait() == 130
    shown = facts(launcher.run("inspect", run))
    assert shown["state"] == "interrupted"
    assert shown["samples"] == f"{distot.load(run).samples:,}"
    assert shown["last look"].startswith("chi2 ")
    assert shown["next"] == f"distot resume {run}"
    assert "certificate" not in shown

    shown = facts(launcher.run("inspect", finished))
    assert shown["state"] == "until_chi2"
    assert shown["certificate"].startswith("chi2 ")
    assert shown["w2 squared bound"]
    assert shown["next"] == f"distot.load({str(finished)!r})"
    other = tmp_path / "other.zarr"
    shutil.copytree(finished, other)
    (other / "certificate.json").unlink()
    assert facts(launcher.run("inspect", other))["next"] == f"distot certify {other}"


# ----------------------------------------------------------------------------------------------- rendering


BRACKETS = "a [bold]odd[/bold] :smile: name [x]"  # all of it would mean something to rich


def test_paths_are_printed_as_they_are(launcher: Launcher, tmp_path: Path) -> None:
    folder = tmp_path / BRACKETS / ("long" * 20)
    folder.mkdir(parents=True)
    latents, run = folder / "z.zarr", folder / "run.zarr"
    np.save(folder / "z.npy", Z)
    typed = shlex.quote(str(latents)), shlex.quote(str(run))  # in commands, so that they can be pasted
    for child, text in (
        (launcher.run("ingest", folder / "z.npy", latents), f"next: distot solve {typed[0]} run.zarr"),
        (launcher.run("solve", latents, run, "--max-samples", 1500), f"\n{run}: the budget"),
        (launcher.run("certify", run), f"go on: distot resume {typed[1]} --max-samples "),
        (launcher.run("inspect", latents), f"distot solve {typed[0]} run.zarr\n"),
        (launcher.run("inspect", run), f"distot.load('{run}')\n"),
    ):
        assert child.returncode in (0, 3), child.stderr()
        assert text in child.stdout()
    assert_one_sentence(launcher.run("solve", latents, run), f"error: {run} exists already")
    assert_one_sentence(launcher.run("inspect", folder / "none"), f"error: {folder}/none does not exist")
    child = launcher.command("resume", run, "--max-samples", "1e12", "--until-chi2", "1e-6")
    wait_for("a look at chi2", lambda: "samples: chi2" in child.stderr(), child)
    child.kill(signal.SIGINT)
    assert child.wait() == 130
    assert child.stderr().endswith(f"go on with: distot resume {typed[1]}\n")


def test_progress_in_a_terminal(tmp_path: Path) -> None:
    folder = tmp_path / BRACKETS
    folder.mkdir(parents=True)
    latents, run = folder / "z.zarr", folder / "run.zarr"
    copy_latents(Z, 1.0 + np.arange(100), latents, "drawn for a test")
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("NO_COLOR", "CI")}
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "distot.cli", "solve", str(latents), str(run), *FOREVER],
        env=environment | {"TERM": "xterm-256color"},
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that the terminal makes a signal of Ctrl-C
    )
    os.close(inside)
    shown = ""
    pressed = False
    try:
        while select.select([terminal], [], [], LIMIT)[0]:
            try:
                shown += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the process has closed its side
                break
            if not pressed and "samples/atom" in shown and "samples per atom   chi2" in shown:
                os.write(terminal, b"\x03")
                pressed = True
        process.wait(LIMIT)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert process.returncode == 130
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "")
    assert "\x1b[2K" in shown  # a line that is drawn anew
    assert "100 latents of dimension 3, source gaussian; search by" in plain
    assert "note: the masses sum to 5050; they were divided by that sum" in plain
    assert re.search(r"solve .* samples/atom, [\d,]+/s", plain)
    assert "SIGINT: saving; press Ctrl-C again to quit without" in plain
    assert "stopped: it was interrupted" in plain
    assert plain.rstrip().endswith(
        f"stopped by SIGINT; everything is saved, go on with: distot resume {shlex.quote(str(run))}"
    )
    assert "Traceback" not in plain
