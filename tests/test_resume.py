"""A run that was stopped, wherever and however, and resumed equals an unbroken one, bit for bit."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Child, Launcher, Normal, quick_folder, wait_for

import distot
from distot.errors import InputError, StoreError
from distot.store import Dropped, Run, copy_latents

TASK = ("--until-chi2", "0.02", "--max-samples", "90000")  # looks and close looks; whichever comes first ends it
OFTEN = ("--checkpoint-seconds", "0.02")
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
HOW = [pytest.param(INT, 130, id="Ctrl-C"), pytest.param(TERM, 143, id="SIGTERM"), pytest.param(KILL, -9, id="kill -9")]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with Launcher(tmp_path_factory.mktemp("processes")) as started:
        yield started


@pytest.fixture
def tmp_path(launcher: Launcher) -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder
        launcher.stop_all()


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    z = np.random.default_rng(5).standard_normal((200, 3)).astype(np.float32)
    z[0] += 3.0
    np.save(folder / "few.npy", z[:100])
    copy_latents(z, 1.0 + np.arange(200) / 200, folder / "z.zarr", "drawn for a test")
    return folder / "z.zarr"


@pytest.fixture(scope="module")
def unbroken(launcher: Launcher, latents: Path) -> Path:
    run = latents.parent / "unbroken.zarr"
    child = launcher.run("solve", latents, run, *TASK)
    assert child.returncode in (0, 3), child.stderr()
    solution = distot.load(run)
    assert solution.samples > 5000
    assert any(check.close for check in solution.history)
    return run


def state(run: Path) -> dict[str, Any]:
    """All that a run has computed, without the reason it stopped for."""
    checkpoint = Run(run).load_checkpoint()
    assert checkpoint is not None
    (names,) = {tuple(part["arrays"]) for part in checkpoint.written}
    ((values),) = checkpoint.parts(*names)
    arrays = {name: (its.dtype, its.shape, its.tobytes()) for name, its in zip(names, values, strict=True)}
    return arrays | {name: value for name, value in checkpoint.scalars.items() if name != "reason"}


def assert_equal(run: Path, reference: Path) -> None:
    assert state(run) == state(reference)
    mine, other = distot.load(run), distot.load(reference)
    assert np.array_equal(mine.heights, other.heights)
    assert mine.history == other.history
    assert mine.samples == other.samples
    assert mine.certificate == other.certificate
    assert mine.reason == other.reason


def checkpoints(run: Path) -> int:
    """Checkpoints that the log speaks of."""
    return sum(record["event"] == "checkpoint" for record in Run(run).records()) if run.exists() else 0


def stop_after(child: Child, run: Path, wanted: int, how: int) -> int:
    wait_for(f"{wanted} checkpoints", lambda: checkpoints(run) >= wanted, child)
    child.kill(how)
    return child.wait()


# ------------------------------------------------------------------------------- signals from outside


@pytest.mark.parametrize(("how", "code"), HOW)
def test_stopped_in_the_middle(
    launcher: Launcher, latents: Path, unbroken: Path, tmp_path: Path, how: int, code: int
) -> None:
    run = tmp_path / "run.zarr"
    child = launcher.command("solve", latents, run, *TASK, *OFTEN)
    assert stop_after(child, run, 2, how) == code
    first = Run(run).load_checkpoint()
    assert first is not None
    assert first.scalars["reason"] == (None if how == KILL else "interrupted")
    assert stop_after(launcher.command("resume", run), run, checkpoints(run) + 2, how) == code
    second = Run(run).load_checkpoint()
    assert second is not None
    assert 0 < first.scalars["step"] < second.scalars["step"] < state(unbroken)["step"]
    child = launcher.run("resume", run)
    assert child.returncode in (0, 3), child.stderr()
    assert_equal(run, unbroken)


def test_stopped_by_the_clock(launcher: Launcher, latents: Path, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    child = launcher.run("solve", latents, run, *TASK, "--max-time", "0.15s", *OFTEN)
    assert child.returncode == 3, child.stderr()
    stopped = Run(run).load_checkpoint()
    assert stopped is not None
    assert stopped.scalars["reason"] == "max_seconds"
    child = launcher.run("resume", run, "--max-time", "10m")
    assert child.returncode in (0, 3), child.stderr()
    assert_equal(run, unbroken)


def test_another_seed_is_another_answer(launcher: Launcher, latents: Path, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    assert launcher.run("solve", latents, run, *TASK, "--seed", 1).returncode in (0, 3)
    assert not np.array_equal(distot.load(run).heights, distot.load(unbroken).heights)


# ----------------------------------------------- signals at one exact call of the source, from inside


EASY = {"until_chi2": None, "max_samples": 2500, "checkpoint_seconds": 0.0}
MOMENTS = 18  # calls before a run has a folder: moments of the source, whether it is a few points, what it draws
STARTED = MOMENTS + 12  # the last call in the start: 12 steps with the 12 centroids
CALLS = [STARTED - 11, STARTED - 1, STARTED, STARTED + 1, STARTED + 2, STARTED + 7, STARTED + 20]


@pytest.fixture(scope="module")
def straight(launcher: Launcher, latents: Path) -> dict[str, Any]:
    """An unbroken solve for a user's own source, and at how many calls of it."""
    found = launcher.call("solve", str(latents.with_name("few.npy")), None, EASY)
    assert found["reason"] == "max_samples"
    assert found["calls"] > max(CALLS)
    return dict(found)


def compare(found: dict[str, Any], straight: dict[str, Any]) -> None:
    assert found["caught"] == ""
    assert {name: found[name] for name in found if name != "calls"} == {
        name: straight[name] for name in straight if name != "calls"
    }


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [KILL, INT], ids=["kill -9", "Ctrl-C"])
def test_struck_at_one_call(
    launcher: Launcher, latents: Path, straight: dict[str, Any], tmp_path: Path, number: int, call: int
) -> None:
    run, rows = tmp_path / "run.zarr", str(latents.with_name("few.npy"))
    child = launcher.start("solve", rows, str(run), EASY, call, [number])
    if number == KILL:
        assert child.wait() == -KILL
        if call <= STARTED:
            assert Run(run).load_checkpoint() is None
            with pytest.raises(StoreError, match=f"no checkpoint yet; go on with: distot resume {run}"):
                distot.load(run, source=Normal(3))
    else:
        assert child.wait() == 0, child.stderr()
        saved = Run(run).load_checkpoint()
        assert saved is not None
        assert saved.scalars["started"] == (call > STARTED)
        assert saved.scalars["reason"] == "interrupted"
    compare(launcher.call("resume", rows, str(run), {}), straight)


def test_struck_in_the_start_again_and_again(
    launcher: Launcher, latents: Path, straight: dict[str, Any], tmp_path: Path
) -> None:
    run, rows = tmp_path / "run.zarr", str(latents.with_name("few.npy"))
    assert "Interrupted" in launcher.call("solve", rows, str(run), EASY, STARTED, [INT])["caught"]
    assert launcher.start("resume", rows, str(run), {}, STARTED, [KILL]).wait() == -KILL
    assert "Interrupted" in launcher.call("resume", rows, str(run), {}, STARTED, [TERM])["caught"]
    compare(launcher.call("resume", rows, str(run), {}), straight)


def test_killed_before_the_run_has_a_folder(
    launcher: Launcher, latents: Path, straight: dict[str, Any], tmp_path: Path
) -> None:
    run, rows = tmp_path / "run.zarr", str(latents.with_name("few.npy"))
    assert launcher.start("solve", rows, str(run), EASY, MOMENTS, [KILL]).wait() == -KILL
    assert list(tmp_path.iterdir()) == []
    compare(launcher.call("solve", rows, str(run), EASY), straight)


def test_killed_during_the_certificate(
    launcher: Launcher, latents: Path, straight: dict[str, Any], tmp_path: Path
) -> None:
    run, rows = tmp_path / "run.zarr", str(latents.with_name("few.npy"))
    last = straight["calls"]
    assert launcher.start("solve", rows, str(run), EASY, last, [KILL]).wait() == -KILL
    assert Run(run).load_json("certificate.json") is None
    found = launcher.call("certify", rows, str(run))
    compare(found, straight)
    assert Run(run).load_json("certificate.json") is not None


# ---------------------------------------------------------------------------- moved, finished, changed


def test_run_and_latents_move_together(launcher: Launcher, latents: Path, unbroken: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    shutil.copytree(latents, here / "z.zarr")
    child = launcher.command("solve", here / "z.zarr", here / "run.zarr", *TASK, *OFTEN)
    assert stop_after(child, here / "run.zarr", 2, KILL) == -KILL
    here.rename(there)
    child = launcher.run("resume", there / "run.zarr")
    assert child.returncode in (0, 3), child.stderr()
    assert_equal(there / "run.zarr", unbroken)


def test_a_finished_run_says_what_to_change(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    assert launcher.run("solve", latents, run, "--until-chi2", "0.5").returncode == 0
    samples = distot.load(run).samples
    child = launcher.run("resume", run)
    assert child.returncode == 1
    assert "has reached its goal of chi2 <= 0.5; give a smaller --until-chi2 to go on" in child.stderr()
    child = launcher.run("resume", run, "--until-chi2", "0.4")
    assert child.returncode == 0, child.stderr()
    assert distot.load(run).samples > samples


def test_a_larger_budget_goes_on(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    assert launcher.run("solve", latents, run, "--max-samples", "3000").returncode == 3
    spent = distot.load(run)
    assert spent.reason == "max_samples"
    assert spent.samples <= 3000
    child = launcher.run("resume", run)
    assert child.returncode == 1
    assert "has spent its 3,000 samples; give a larger --max-samples to go on" in child.stderr()
    assert launcher.run("resume", run, "--max-samples", "5000").returncode == 3
    assert spent.samples < distot.load(run).samples <= 5000


def test_a_run_from_memory_keeps_its_own_latents(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    rows = np.load(latents.with_name("few.npy"))
    solved = distot.solve(rows, until_chi2=0.5, run=run)
    assert np.array_equal(distot.load(run).heights, solved.heights)
    assert np.array_equal(distot.load(run).map(rows[:5]), solved.map(rows[:5]))
    with pytest.raises(InputError, match="has reached its goal"):
        distot.resume(run)


def test_a_checkpoint_that_goes_while_it_is_read_is_said_to_have_gone(tmp_path: Path) -> None:
    """A writer deletes the manifest first, then the rest; what is missing then is no damage."""
    path = tmp_path / "run.zarr"
    distot.solve(np.random.default_rng(0).standard_normal((50, 3)), run=path, max_samples=2000, progress=False)
    saved = Run(path).checkpoints.load()
    assert saved is not None
    assert len(saved.read("heights", slice(0, 50))) == 50
    (saved.folder / "MANIFEST.json").unlink()
    for gone in (False, True):
        if gone:
            shutil.rmtree(path / "checkpoints" / saved.name / "part-00000")
        with pytest.raises(Dropped, match="deleted while it was read"):
            saved.read("heights", slice(0, 50))
        with pytest.raises(Dropped, match="deleted while it was read"):
            list(saved.parts("pairs"))


@pytest.mark.filterwarnings("ignore::distot.DistotWarning")
@pytest.mark.parametrize(("assigner", "twins"), [("auto", 0), ("auto", 1500), ("lists", 0)])
def test_so_many_latents_that_searches_are_chosen_between(tmp_path: Path, assigner: str, twins: int) -> None:
    """The default search, stopped again and again at any moment, in the start, in steps and in looks."""
    y = np.random.default_rng(3).standard_normal((4500, 3)) * [2, 1, 0.5]
    y[len(y) - twins :] = y[:twins] + 1e-3
    options: dict[str, Any] = {"assigner": assigner, "until_chi2": None, "max_samples": 40_000, "progress": False}
    whole = distot.solve(y, run=tmp_path / "whole.zarr", **options)
    chance, run, stopped = np.random.default_rng(4), tmp_path / "stopped.zarr", 0

    def stop(event: dict[str, Any]) -> None:
        if event["event"] in ("begin", "resume", "start", "step", "check") and chance.random() < 0.25:
            signal.raise_signal(signal.SIGINT)

    while True:
        try:
            if run.exists():
                found = distot.resume(run, progress=False, on_event=stop)
            else:
                found = distot.solve(y, run=run, **options, on_event=stop)
            break
        except distot.Interrupted:
            stopped += 1
    assert stopped > 3
    assert_equal(run, tmp_path / "whole.zarr")
    assert np.array_equal(found.heights, whole.heights)
    groups = whole.problem.target.twins
    assert (groups is not None and int((groups.width > 0).sum()) > 1000) == (twins > 0)
    assert distot.certify(run).certificate == whole.certificate
