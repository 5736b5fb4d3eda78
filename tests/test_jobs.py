"""What users copy works: the jobs, and the demo in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distot
from distot.store import copy_latents
from jobs.certify import main as certify
from jobs.demo import begun
from jobs.patches import keep, patches

ROOT = Path(__file__).parent.parent
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*words: str, folder: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *words], cwd=folder, env=QUIET, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr
    return done


def test_demo(tmp_path: Path) -> None:
    first = run("-m", "jobs.demo", "demo", "--count", "600", "--dim", "8", folder=tmp_path)
    assert "the goal was reached" in first.stdout
    assert "Efficiency " in first.stdout
    assert "distot resume demo/run.zarr --until-chi2 0.03" in first.stdout
    solution = distot.load(tmp_path / "demo/run.zarr")
    assert solution.heights.shape == (600,)
    assert solution.certificate.chi2 < 0.05 + 2 * solution.certificate.chi2_error
    assert "is there already" in run("-m", "jobs.demo", "demo", folder=tmp_path).stdout


def test_million_in_small_goes_on(tmp_path: Path) -> None:
    """The job is the same for 500 latents; called again it finds its work done."""
    job = ("-m", "jobs.million", "million", "--count", "500", "--dim", "4")
    first = run(*job, folder=tmp_path)
    assert "most memory of this process" in first.stdout
    assert distot.load(tmp_path / "million/run.zarr").reason == "until_chi2"
    assert "until_chi2" in run(*job, folder=tmp_path).stdout


def test_patches_are_distinct_and_centred() -> None:
    y = patches(500, 8)
    assert y.shape == (500, 8)
    assert y.dtype == np.float32
    assert len(np.unique(y, axis=0)) == 500
    assert np.abs(y.mean(axis=0)).max() < 1e-4
    assert np.allclose(patches(500, 8, whiten=True).std(axis=0), 1, rtol=0.01)
    assert not np.array_equal(patches(500, 8, seed=1), y)
    assert len(np.unique(patches(500, 192, flips=True), axis=0)) == 500


def test_solve_or_go_on(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", np.random.default_rng(0).standard_normal((200, 3)))
    run("-m", "distot.cli", "ingest", "z.npy", "z.zarr", folder=tmp_path)
    job = ("-m", "jobs.solve", "z.zarr", "run.zarr")
    run(*job, "--max-samples", "4000", "--until-chi2", "1e-3", folder=tmp_path, code=3)
    config = tmp_path / "run.zarr/config.json"
    raised = json.loads(config.read_text())
    raised["options"] |= {"max_samples": None, "until_chi2": 0.2}
    del raised["sha256"]  # as it is edited by hand
    config.write_text(json.dumps(raised))
    run(*job, folder=tmp_path)
    assert "until_chi2" in run(*job, folder=tmp_path).stdout
    assert distot.load(tmp_path / "run.zarr").reason == "until_chi2"


def test_classes_go_on(tmp_path: Path) -> None:
    """Each class is a problem of its own; those that are done are left alone."""
    labels = np.arange(300) % 2 + 10
    np.save(tmp_path / "z.npy", np.random.default_rng(0).standard_normal((300, 3)) + labels[:, None])
    np.save(tmp_path / "labels.npy", labels)
    folder = tmp_path / "classes"
    job = ("-m", "jobs.classes", "z.npy", "labels.npy", "classes", "--until-chi2", "0.2")
    first = run(*job, folder=tmp_path)
    assert "class 11: 150 latents" in first.stdout
    runs = [distot.load(folder / f"{label}.run.zarr") for label in (10, 11)]
    assert [found.reason for found in runs] == ["until_chi2"] * 2
    assert [round(found.map(np.zeros((5, 3))).mean()) for found in runs] == [10, 11]
    kept = [(folder / f"{label}.run.zarr/log.jsonl").read_bytes() for label in (10, 11)]
    assert run(*job, folder=tmp_path).stdout == first.stdout
    assert [(folder / f"{label}.run.zarr/log.jsonl").read_bytes() for label in (10, 11)] == kept


def test_flows_of_three_kinds_of_pairs(tmp_path: Path) -> None:
    """Even after a moment's training paths are straighter with better pairs."""
    said = run("-m", "jobs.flow", "--quick", folder=tmp_path).stdout
    curvature = [
        float(line[16:].split()[0]) for line in said.splitlines() if line[:6] in ("indepe", "plan p", "distot")
    ]
    assert len(curvature) == 6
    assert curvature[2] < 0.6 * curvature[0]
    assert curvature[5] < 0.9 * curvature[3]


def test_folders_of_jobs_are_of_one_kind(tmp_path: Path) -> None:
    """What was begun with other options is refused; what is left out is as it was."""
    usual = {"count": 500, "dim": 4}
    said: dict[str, Any] = {"count": 300, "dim": None, "flips": True}
    assert begun(tmp_path / "a", said, usual) == {"count": 300, "dim": 4, "flips": True}
    assert begun(tmp_path / "a", {"count": None, "dim": 4, "flips": True}, usual)["count"] == 300
    for change in ({"count": 301}, {"dim": 5}, {"flips": False}):
        with pytest.raises(distot.InputError, match=r"a was begun with .* instead of"):
            begun(tmp_path / "a", said | change, usual)
    copy_latents(np.eye(3), None, tmp_path / "b/latents.zarr", "by a version that kept no settings")
    with pytest.raises(distot.InputError, match="b was begun with count 3 instead of 300, dim 3 instead of 2"):
        begun(tmp_path / "b", {"count": 300, "dim": 2}, usual, tmp_path / "b/latents.zarr")
    (tmp_path / "a/settings.json").write_text("{")
    with pytest.raises(distot.InputError, match="is damaged"):
        begun(tmp_path / "a", said, usual)


@pytest.mark.parametrize("name", ["run.zarr", "l.zarr", "file", "link"])
def test_jobs_need_a_folder_of_their_own(tmp_path: Path, name: str) -> None:
    for store, about in (("run.zarr", "config.json"), ("l.zarr", "zarr.json")):
        (tmp_path / store).mkdir()
        (tmp_path / store / about).write_text("{}")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(distot.StoreError, match=r"choose another (name|path)"):
        begun(tmp_path / name, {"count": 3})
    assert sorted(tmp_path.rglob("*")) == before


def test_patches_over_nothing(tmp_path: Path) -> None:
    path = tmp_path / "patches.npy"
    keep(path, patches(50, 2))
    keep(path, patches(50, 2))
    with pytest.raises(distot.errors.StoreError, match="exists already"):
        keep(path, patches(50, 2, seed=1))
    assert "exists already" in run("-m", "jobs.patches", str(path), "--count", "50", folder=tmp_path, code=1).stderr
    assert np.array_equal(np.load(path), patches(50, 2))


def test_errors_of_jobs_are_one_sentence(tmp_path: Path) -> None:
    done = run("-m", "jobs.certify", "none.zarr", folder=tmp_path, code=1)
    assert done.stderr.startswith("error: none.zarr does not exist")
    assert "Traceback" not in done.stderr


def test_certify_again_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distot.solve(np.random.default_rng(0).random((200, 2)), until_chi2=0.2, run=tmp_path / "run.zarr", progress=False)
    certify(str(tmp_path / "run.zarr"), 2, None, None)
    assert "mean: chi2 0." in capsys.readouterr().out


@pytest.mark.parametrize(("n", "works"), [(50, True), (500, False)])
def test_without_faiss(tmp_path: Path, n: int, works: bool) -> None:
    """Trees are grown by FAISS; a problem too small for one needs none, a larger one says what to install."""
    code = f"""
import sys
sys.modules["faiss"] = None
import distot, numpy
try:
    distot.solve(numpy.random.default_rng(0).random(({n}, 2)), max_samples=20000)
    print("solved")
except distot.InputError as error:
    print(error)
"""
    said = run("-c", code, folder=tmp_path).stdout
    assert said == "solved\n" if works else "pip install 'distot[cpu]'" in said
