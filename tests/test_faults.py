"""Killed processes, damaged files, full disks, forbidden folders: a run keeps what it has, and says what to do."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Child, Launcher, quick_folder, wait_for

import distot
from distot.errors import DistotWarning, InputError, StoreError
from distot.store import Run, copy_latents

FOREVER = ("--until-chi2", "none", "--max-samples", "1e12", "--checkpoint-seconds", "0.02")


@pytest.fixture
def tmp_path(launcher: Launcher) -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder
        launcher.stop_all()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with Launcher(tmp_path_factory.mktemp("processes")) as started:
        yield started


MASS = (1.0 + np.arange(200)) / 20100


def draw(n: int = 200, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "z.zarr"
    copy_latents(draw(), None, path, "drawn for a test")
    return path


@pytest.fixture
def own_latents(tmp_path: Path) -> Path:
    """Latents that a test may damage."""
    copy_latents(draw(), MASS, tmp_path / "z.zarr", "drawn for a test")
    return tmp_path / "z.zarr"


def committed(run: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first."""
    manifests = list(run.glob("checkpoints/*/MANIFEST.json"))
    return sorted((m.parent for m in manifests), key=lambda folder: folder.name[:14])


def newest_step(run: Path) -> int:
    return max((int(folder.name[5:14]) for folder in committed(run)), default=-1)


def arrays(run: Path) -> dict[str, bytes]:
    checkpoint = Run(run).load_checkpoint()
    assert checkpoint is not None
    assert checkpoint.remarks == ()
    names = checkpoint.written[0]["arrays"]
    return dict(zip(names, (values.tobytes() for values in next(checkpoint.parts(*names))), strict=True))


def start_forever(launcher: Launcher, latents: Path, run: Path, seen: Path | None = None) -> Child:
    """A run that would go on for ever, once it has two checkpoints. ``seen``: the run as this process sees it."""
    child = launcher.command("solve", latents, run, *FOREVER)
    wait_for("two checkpoints", lambda: len(committed(seen or run)) == 2, child)
    return child


def assert_one_sentence(child: Child, *parts: str) -> None:
    """It ended with exit code 1 and one line that says error, with these parts."""
    assert child.wait() == 1, child.stderr()
    errors = [line for line in child.stderr().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, child.stderr()
    assert "Traceback" not in child.stderr()
    for part in parts:
        assert part in errors[0]


# ---------------------------------------------------------------------------------------------- kill -9


@pytest.mark.slow
def test_killed_at_random_again_and_again(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    """A checkpoint follows every step, so most kills fall into the writing of one."""
    options = ["--until-chi2", "none", "--max-samples", "9000"]
    reference, run = tmp_path / "reference.zarr", tmp_path / "run.zarr"
    assert launcher.run("solve", latents, reference, *options).returncode == 0
    chance = random.Random(3)
    kills = torn = partial = 0
    while True:
        before = newest_step(run)
        begun = len(Run(run).records()) if run.exists() else 0
        if run.exists():
            child = launcher.command("resume", run)
        else:
            child = launcher.command("solve", latents, run, *options, "--checkpoint-seconds", 0)
        if kills % 4 == 3:  # at any moment of the life, reading and locking included
            time.sleep(chance.uniform(0.0, 0.4))
        else:
            wanted = before + chance.randint(1, 12)
            while newest_step(run) < wanted and child.poll() is None:
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.04))
        if child.poll() is None:
            child.kill(signal.SIGKILL)
        code = child.wait()
        records = Run(run).records() if run.exists() else []
        starts = [record for record in records[begun:] if record["event"] in ("begin", "resume")]
        assert all(start["step"] >= before for start in starts if before >= 0)
        assert all(record["event"] not in ("note", "warning") for record in records[begun:])
        if code == 0:
            break
        assert code == -signal.SIGKILL, child.stderr()
        kills += 1
        torn += sum(not (folder / "MANIFEST.json").exists() for folder in (run / "checkpoints").glob("*"))
        partial += len(list(run.rglob("*.partial")))
        assert newest_step(run) >= before
        saved = Run(run).load_checkpoint() if run.exists() else None
        if saved is not None and saved.scalars["reason"] is not None:  # killed while it measured the certificate
            assert launcher.run("certify", run).returncode == 0
            break
    print(f"{kills} kills, {torn} of them in the middle of a checkpoint, {partial} in the middle of a small file")
    assert kills >= 20
    assert torn >= 5
    assert arrays(run) == arrays(reference)
    mine, other = distot.load(run), distot.load(reference)
    assert np.array_equal(mine.heights, other.heights)
    assert mine.history == other.history
    with Run(run).lock():  # sweeps up what the last kill has left
        pass
    assert len(committed(run)) == len(list((run / "checkpoints").iterdir())) == 2
    assert list(run.rglob("*.partial")) == []


def test_lock_is_free_after_kill(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    child = start_forever(launcher, latents, run)
    child.kill(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert (run / "owner.json").exists()
    with Run(run).lock():
        assert json.loads((run / "owner.json").read_text())["pid"] == os.getpid()
    assert not (run / "owner.json").exists()


def test_second_process_is_refused(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    child = start_forever(launcher, latents, run)
    for arguments in (["resume", run], ["certify", run, "--samples", 100]):
        assert_one_sentence(
            launcher.run(*arguments), f"{run} is being written by process {child.pid} on host", "wait for it or stop it"
        )
    assert_one_sentence(launcher.run("solve", latents, run), "exists already; continue it with `distot resume")
    shown = launcher.run("inspect", run, "--json")
    assert shown.returncode == 0, shown.stderr()
    assert json.loads(shown.stdout())["state"] == "unfinished"
    samples = launcher.call("load", str(run))
    assert samples == sorted(samples)
    assert samples[0] < samples[-1]  # it was being written all the while
    assert child.poll() is None
    child.kill(signal.SIGINT)
    assert child.wait() == 130


def longer(child: Child, length: int) -> bool:
    """Whether its output has grown by a line."""
    return "\n" in child.stdout()[length:]


def replaced(run: Path, old: list[Path]) -> bool:
    """Whether two checkpoints are there and neither is among the old ones."""
    now = committed(run)
    return len(now) == 2 and not set(now) & set(old)


def test_reader_overtaken_by_the_writer(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    """A reader is held up wherever it may be, until all checkpoints that it can have chosen from are gone."""
    run = tmp_path / "run.zarr"
    writer = start_forever(launcher, latents, run)
    reader = launcher.start("read_for_ever", str(run))

    for _ in range(12):
        wait_for("another line", partial(longer, reader, len(reader.stdout())), reader)
        reader.kill(signal.SIGSTOP)
        wait_for("new checkpoints", partial(replaced, run, committed(run)), writer)
        reader.kill(signal.SIGCONT)
    for child in (reader, writer):
        assert child.poll() is None, child.stderr()
        child.kill(signal.SIGKILL)
        child.wait()
    found = [json.loads(line) for line in reader.stdout().splitlines(keepends=True) if line.endswith("\n")]
    assert all(remarks == [] for _, remarks in found)
    steps = [step for step, _ in found]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 12


# ------------------------------------------------------------------------------------------ damaged files


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


DAMAGE = [flip, cut, empty, Path.unlink]


@pytest.fixture(scope="module")
def stopped(launcher: Launcher, latents: Path) -> Path:
    """A run with two checkpoints, of different steps."""
    run = latents.parent / "stopped.zarr"
    child = start_forever(launcher, latents, run)
    child.kill(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    with Run(run).lock():  # which sweeps up what the kill has left
        older, newer = committed(run)
    assert older.name[:14] < newer.name[:14]
    return run


@pytest.fixture
def run(stopped: Path, latents: Path, tmp_path: Path) -> Path:
    """A copy of that run which a test may damage."""
    shutil.copytree(latents, tmp_path / "z.zarr")
    shutil.copytree(stopped, tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", [f"part-00000/{file}" for file in ("average/c/0", "heights/zarr.json", "pairs/c/0/0", "zarr.json")]
)
def test_damaged_checkpoint_falls_back(run: Path, damage: Callable[[Path], None], name: str) -> None:
    older, newer = committed(run)
    assert int(older.name[5:14]) <= int(newer.name[5:14])
    intact = distot.load(run)
    assert intact.notes == ()
    damage(newer / name)
    solution = distot.load(run)
    assert solution.samples < intact.samples
    assert len(solution.notes) == 2
    assert str(newer / name) in solution.notes[0]
    assert solution.notes[1] == f"using the checkpoint before it, {older.name}"


@pytest.mark.parametrize("position", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_damaged_manifest_falls_back(run: Path, position: float) -> None:
    """Also where a changed digit would still be JSON that makes sense."""
    older, newer = committed(run)
    manifest = newer / "MANIFEST.json"
    content = bytearray(manifest.read_bytes())
    content[round(position * (len(content) - 1))] ^= 0x01
    manifest.write_bytes(content)
    notes = distot.load(run).notes
    assert str(manifest) in notes[0]
    assert older.name in notes[1]


@pytest.mark.parametrize("damage", [cut, empty])
def test_cut_manifest_falls_back(run: Path, damage: Callable[[Path], None]) -> None:
    _, newer = committed(run)
    damage(newer / "MANIFEST.json")
    assert str(newer / "MANIFEST.json") in distot.load(run).notes[0]


def test_resume_after_damage_says_so_and_repairs(launcher: Launcher, run: Path) -> None:
    older, newer = committed(run)
    flip(newer / "part-00000" / "average" / "c" / "0")
    shown = launcher.run("inspect", run)
    assert shown.returncode == 0
    assert str(newer / "part-00000" / "average") in shown.stdout()
    child = launcher.command("resume", run)
    wait_for("two new checkpoints", lambda: not {older, newer} & set(committed(run)), child)
    child.kill(signal.SIGINT)
    assert child.wait() == 130
    assert f"{newer / 'part-00000' / 'average' / 'c' / '0'} fails its checksum" in child.stderr()
    assert f"using the checkpoint before it, {older.name}" in child.stderr()
    records = Run(run).records()
    assert [r["step"] for r in records if r["event"] == "resume"] == [int(older.name[5:14])]
    assert distot.load(run).notes == ()


def test_all_checkpoints_damaged(launcher: Launcher, run: Path) -> None:
    for checkpoint in committed(run):
        flip(checkpoint / "part-00000" / "average" / "c" / "0")
    parts = [str(checkpoint / "part-00000" / "average" / "c" / "0") for checkpoint in committed(run)]
    for command in ("resume", "certify", "inspect"):
        child = launcher.run(command, run)
        assert_one_sentence(child, *parts, f"no checkpoint of {run} is left, start a new run")
    with pytest.raises(StoreError, match="no checkpoint"):
        distot.load(run)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["z/c/0/0", "mass/c/0", "z/zarr.json"])
@pytest.mark.filterwarnings("ignore:Object at z is not recognized")
def test_damaged_latents_name_the_file(own_latents: Path, damage: Callable[[Path], None], name: str) -> None:
    damage(own_latents / name)
    with pytest.raises(StoreError) as caught:
        distot.solve(own_latents, max_samples=1000)
    expected = str(own_latents if name.endswith("json") else own_latents / name)
    assert expected in str(caught.value)
    assert "restore" in str(caught.value)


def test_latents_damaged_after_the_solve(own_latents: Path) -> None:
    solution = distot.solve(own_latents, max_samples=1000)
    flip(own_latents / "z" / "c" / "0" / "0")
    with pytest.raises(StoreError, match=f"{own_latents}/z/c/0/0 is damaged"):
        solution.map(np.zeros((2, 3)))


def test_latents_damaged_before_resume(launcher: Launcher, run: Path) -> None:
    flip(run.with_name("z.zarr") / "z" / "c" / "0" / "0")
    assert_one_sentence(launcher.run("resume", run), "z.zarr/z/c/0/0 is damaged or cut short; restore it")


def test_latents_changed(launcher: Launcher, run: Path) -> None:
    latents = run.with_name("z.zarr")
    shutil.rmtree(latents)
    copy_latents(draw(seed=6), None, latents, "others of the same shape")
    assert_one_sentence(
        launcher.run("resume", run), "solved for other latents (their fingerprint differs)", "--latents"
    )
    shutil.rmtree(latents)
    copy_latents(draw(n=100), None, latents, "others of another shape")
    assert_one_sentence(launcher.run("resume", run), "for latents of shape (200, 3), these are (100, 3)")


def test_latents_rewritten_under_the_fingerprint(own_latents: Path) -> None:
    """Somebody wrote into the store with another program, which keeps the checksums of zarr right."""
    import zarr

    array = zarr.open(str(own_latents / "z"), mode="r+")
    assert isinstance(array, zarr.Array)
    array[3, 1] = 7.0
    with pytest.raises(StoreError, match="has changed since it was written"):
        distot.solve(own_latents, max_samples=1000)


def test_latents_moved(launcher: Launcher, run: Path) -> None:
    latents, moved = run.with_name("z.zarr"), run.with_name("moved.zarr")
    latents.rename(moved)
    assert_one_sentence(launcher.run("certify", run), "/z.zarr any more; say where they are (--latents)")
    child = launcher.run("certify", run, "--latents", moved, "--json")
    assert child.returncode == 0, child.stderr()
    assert distot.load(run, latents=moved).certificate.to_dict() == json.loads(child.stdout())["certificate"]


def test_given_masses_are_needed_again(tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    distot.solve(draw(50), mass=np.full(50, 0.02), max_samples=1000, run=run)
    flip(run / "mass" / "c" / "0")
    with pytest.raises(StoreError, match=f"{run}/mass/c/0 is damaged"):
        distot.load(run)


@pytest.mark.parametrize("damage", [cut, empty])
def test_damaged_configuration(launcher: Launcher, run: Path, damage: Callable[[Path], None]) -> None:
    damage(run / "config.json")
    assert_one_sentence(launcher.run("resume", run), f"{run}/config.json is damaged", "start a new one")


def test_damaged_certificate(launcher: Launcher, run: Path) -> None:
    assert launcher.run("certify", run, "--samples", 1000).returncode == 0
    cut(run / "certificate.json")
    assert_one_sentence(launcher.run("inspect", run), f"{run}/certificate.json is damaged", "delete it")


def test_log_cut_off_in_the_middle_of_a_line(launcher: Launcher, run: Path) -> None:
    log = run / "log.jsonl"
    os.truncate(log, log.stat().st_size - 7)
    lines = len(Run(run).records())
    child = launcher.run("resume", run, "--max-samples", distot.load(run).samples + 2000)
    assert child.returncode == 0, child.stderr()
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()][lines:][0] == "resume"


# -------------------------------------------------------------------------------------------- full disks


@pytest.fixture(scope="module")
def mounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts processes that see small disks of their own."""
    prefix = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]
    probe = ["sh", "-c", "mount -t tmpfs -o size=64k none /tmp"]
    try:
        subprocess.run([*prefix, *probe], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no private mounts here: {error}")
    with Launcher(tmp_path_factory.mktemp("mounting"), prefix) as started:
        yield started


def small_disk(mounting: Launcher, folder: Path, options: str) -> Path:
    """Mounts a disk at ``folder`` for the processes of the launcher; gives the path by which this one sees it."""
    folder.mkdir()
    mounting.call("mount", str(folder), options)
    return Path(f"/proc/{mounting.server.pid}/root{folder}")


def fill(folder: Path) -> Path:
    """Takes all space that is left."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def test_full_disk_during_checkpoints(mounting: Launcher, latents: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    outside = small_disk(mounting, disk, "size=2m")
    run, seen = disk / "run.zarr", outside / "run.zarr"
    child = start_forever(mounting, latents, run, seen)

    filler = fill(outside)
    wait_for("a warning", lambda: "the run goes on and will try again" in child.stderr(), child)
    assert "the disk is full; free some space or choose another disk" in child.stderr()
    kept = newest_step(seen)
    filler.unlink()
    wait_for("new checkpoints", lambda: newest_step(seen) > kept and len(committed(seen)) == 2, child)

    fill(outside)
    warnings = child.stderr().count("will try again")
    wait_for("a new warning", lambda: child.stderr().count("will try again") > warnings, child)
    kept_files = {file: file.read_bytes() for folder in committed(seen) for file in folder.rglob("*") if file.is_file()}
    assert kept_files
    child.kill(signal.SIGTERM)
    assert_one_sentence(child, "cannot write the checkpoint", "the disk is full; free some space")
    assert all(file.read_bytes() == content for file, content in kept_files.items())
    kept = newest_step(seen)
    assert mounting.run("inspect", run).returncode == 0

    filler.unlink()
    child = mounting.command("resume", run)
    wait_for("new checkpoints", lambda: newest_step(seen) > kept, child)
    child.kill(signal.SIGINT)
    assert child.wait() == 130
    log = [json.loads(line) for line in (seen / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log if record["event"] == "resume"][-1] == kept
    for file in seen.rglob("*"):
        assert not file.name.endswith(".partial")
    assert len(list((seen / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size=32k", "run.zarr needs about 0.1 MiB and its disk has 0.0 MiB free; free some space"),
        ("size=1m,nr_inodes=8", "run.zarr: the disk is full; free some space or choose another disk"),
        ("size=1m,nr_inodes=18", "cannot write the checkpoint"),
    ],
    ids=["by the estimate", "while the folder is made", "at the first checkpoint"],
)
def test_disk_too_small_for_a_run(
    mounting: Launcher, latents: Path, tmp_path: Path, options: str, message: str
) -> None:
    disk = tmp_path / "disk"
    outside = small_disk(mounting, disk, options)
    child = mounting.run("solve", latents, disk / "run.zarr", "--until-chi2", "none", "--max-samples", 2000)
    assert_one_sentence(child, message, "free some space or choose another disk")
    if "checkpoint" in message:
        assert list((outside / "run.zarr" / "checkpoints").iterdir()) == []
    else:
        assert list(outside.iterdir()) == []


def test_read_only_disk(mounting: Launcher, run: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    outside = small_disk(mounting, disk, "size=4m")
    shutil.copytree(run, outside / "run.zarr")
    shutil.copytree(run.with_name("z.zarr"), outside / "z.zarr")
    mounting.call("make_read_only", str(disk))
    assert_one_sentence(
        mounting.run("resume", disk / "run.zarr"), "the file system is read-only; choose another folder"
    )
    assert_one_sentence(mounting.run("solve", disk / "z.zarr", disk / "new.zarr"), "the file system is read-only")
    assert mounting.run("inspect", disk / "run.zarr").returncode == 0
    assert mounting.call("load", str(disk / "run.zarr"))[0] == distot.load(run).samples


def test_file_size_limit(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    """No file may grow beyond 1,500 bytes, which the vectors of 200 latents do: every checkpoint fails."""
    options = ["--until-chi2", "none", "--max-samples", "8000"]
    reference, run = tmp_path / "reference.zarr", tmp_path / "run.zarr"
    assert launcher.run("solve", latents, reference, *options).returncode == 0
    child = launcher.command("solve", latents, run, *options, "--checkpoint-seconds", 0.02)
    wait_for("two checkpoints", lambda: len(committed(run)) == 2, child)
    child.kill(signal.SIGINT)
    assert child.wait() == 130
    kept = arrays(run)
    limited = subprocess.run(
        [sys.executable, "-m", "distot.cli", "resume", str(run)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)),
        capture_output=True,
        text=True,
    )
    assert limited.returncode == 1
    assert "the run goes on and will try again" in limited.stderr
    assert "the run goes on without its log" in limited.stderr
    last = limited.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write the checkpoint")
    assert last.endswith("the file would grow past the size limit of this process (ulimit -f); raise it")
    assert "Traceback" not in limited.stderr
    assert arrays(run) == kept
    assert launcher.run("resume", run).returncode == 0
    assert arrays(run) == arrays(reference)
    assert all(json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())


def test_failing_checkpoints_warn_in_python(tmp_path: Path) -> None:
    """The folder of the checkpoints is replaced by a file while the solve runs; then it is put back."""
    run = tmp_path / "run.zarr"
    events: list[dict[str, Any]] = []

    def spoil(event: dict[str, Any]) -> None:
        events.append(event)
        names = [e["event"] for e in events]
        if event["event"] == "step" and names.count("step") == 3:
            (run / "checkpoints").rename(run / "away")
            (run / "checkpoints").touch()
        if event["event"] == "step" and names.count("step") == 6:
            (run / "checkpoints").unlink()
            (run / "away").rename(run / "checkpoints")

    with pytest.warns(DistotWarning, match="a part of that path is a file.*; the run goes on and will try again"):
        solution = distot.solve(draw(50), max_samples=2000, run=run, checkpoint_seconds=0.0, on_event=spoil)
    assert sum(event["event"] == "warning" for event in events) == 3
    assert np.array_equal(distot.load(run).heights, solution.heights)


# ------------------------------------------------------------------------------------- folders and paths


@pytest.fixture(scope="module")
def unprivileged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts processes that obey the permissions of files, as root would not."""
    prefix = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    if prefix and shutil.which(prefix[0]) is None:
        pytest.skip("run by root, and there is no setpriv to give up its rights")
    with Launcher(tmp_path_factory.mktemp("unprivileged"), prefix) as started:
        yield started


def test_unwritable_folder(unprivileged: Launcher, run: Path) -> None:
    folder, latents = run.parent, run.with_name("z.zarr")
    for place in (folder, run):
        place.chmod(0o555)
    try:
        assert_one_sentence(
            unprivileged.run("solve", latents, folder / "new.zarr"),
            f"cannot write {folder}/new.zarr: permission denied; choose a folder you may write to",
        )
        assert_one_sentence(unprivileged.run("resume", run), "permission denied; choose a folder")
        assert unprivileged.run("inspect", run).returncode == 0
        run.chmod(0o000)
        for command in ("resume", "inspect"):
            assert_one_sentence(unprivileged.run(command, run), f"cannot read {run}: permission denied")
    finally:
        for place in (folder, run):
            place.chmod(0o755)


def test_path_through_a_file(launcher: Launcher, latents: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file / "run.zarr", file / "deeper" / "run.zarr"):
        assert_one_sentence(
            launcher.run("solve", latents, path), f"cannot write {path}: a part of that path is a file, not a folder"
        )
    assert file.stat().st_size == 0
    assert list(tmp_path.iterdir()) == [file]


def test_run_folder_exists(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{tmp_path} exists already; continue it with `distot resume {tmp_path}`"):
        distot.solve(latents, run=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_latents_are_not_a_run_and_a_run_not_latents(launcher: Launcher, run: Path) -> None:
    latents = run.with_name("z.zarr")
    assert_one_sentence(
        launcher.run("resume", latents), f"{latents} is not a run folder", "start one with: distot solve"
    )
    assert_one_sentence(launcher.run("solve", run, run.with_name("new.zarr")), f"{run} is a run, not latents")
    assert_one_sentence(launcher.run("resume", run.with_name("none")), "does not exist; start one with: distot solve")


def test_run_of_other_latents_in_python(run: Path) -> None:
    with pytest.raises(InputError, match=r"other latents \(their fingerprint differs\)"):
        distot.resume(run, latents=draw(seed=6))
