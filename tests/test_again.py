"""What is there already is taken up for the same thing alone: runs, classes, and what a run keeps of its heights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import distot
from distot.again import go_on
from distot.cli import main as command
from distot.errors import DistotError, InputError, StoreError
from distot.inspect import describe
from distot.store import Run, copy_latents
from jobs.solve import main as job

Y = np.random.default_rng(0).standard_normal((60, 2)).astype(np.float32)
ROWS = np.random.default_rng(1).standard_normal((500, 2))
GOAL = ["--until-chi2", "0.5"]


def normal(random: np.random.Generator, n: int) -> NDArray[Any]:
    return random.standard_normal((n, 2))


def wide(random: np.random.Generator, n: int) -> NDArray[Any]:
    return 2 * random.standard_normal((n, 2))


def also_normal(random: np.random.Generator, n: int) -> NDArray[Any]:
    return random.standard_normal((n, 2))


def changed(values: NDArray[Any], row: int) -> NDArray[Any]:
    """The same but for one row."""
    other = values.copy()
    other[row] += 1e-3
    return other


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with latents and two that differ from them: in one row, and in nothing but masses."""
    copy_latents(Y, None, tmp_path / "l.zarr", "test")
    copy_latents(changed(Y, 30), None, tmp_path / "other.zarr", "test")
    copy_latents(Y, np.arange(60) + 1.0, tmp_path / "massive.zarr", "test")
    return tmp_path


def solved(folder: Path, source: Any = "gaussian", **options: Any) -> Path:
    run = folder / "run.zarr"
    distot.solve(folder / "l.zarr", source, run=run, **{"until_chi2": 0.5, "progress": False} | options)
    return run


def code_of(words: list[object]) -> Any:
    with pytest.raises(SystemExit) as ended:
        job([str(word) for word in words])
    return ended.value.code


# --------------------------------------------------------------------------- the same command once more


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "ball"], "its kind is 'gaussian', and not 'ball'"),
        (["--mean", "M"], "another source of the kind 'gaussian': its mean is not the same"),
        (["--seed", "1"], "begun with seed = 0, and not 1"),
        (["--assigner", "dense"], "begun with assigner = 'auto'"),
        (["--epsilon", "0.1"], "begun with epsilon = None"),
        (["--recall", "0.9"], "begun with recall = None"),
        (["--exact"], "begun with exact = False"),
        (["--certificate-samples", "1000"], "begun with certificate_samples = None"),
        (["--init", "RUN"], "begun without init"),
        (["other.zarr"], "solved for other latents"),
        (["massive.zarr"], "solved for other masses"),
        (["none.zarr"], "none.zarr does not exist"),
        (["--nonsense"], "No such option: --nonsense"),
    ],
)
def test_words_that_contradict_a_run(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    run = solved(place)
    np.save(place / "m.npy", np.ones(2))
    before = {file: file.read_bytes() for file in run.rglob("*.json")}
    given = [{"M": str(place / "m.npy"), "RUN": str(run)}.get(word, word) for word in words]
    latents = given.pop(0) if given[0].endswith(".zarr") else "l.zarr"
    capsys.readouterr()
    assert code_of([place / latents, run, *given]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    with pytest.raises(InputError, match=message):
        raise InputError(said)
    assert {file: file.read_bytes() for file in run.rglob("*.json")} == before


def test_a_job_that_is_done_says_so_and_ends_as_it_did(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options may stand before the paths, and a goal that is met is met for a looser one."""
    words = [*GOAL, place / "l.zarr", place / "run.zarr"]
    assert code_of(words) == 0
    log = (place / "run.zarr/log.jsonl").read_bytes()
    for more in ([], ["--until-chi2", "0.9"], ["--max-time", "1h"]):
        capsys.readouterr()
        assert code_of([*words, *more]) == 0
        assert "the goal was reached" in capsys.readouterr().out
    assert (place / "run.zarr/log.jsonl").read_bytes() == log
    assert code_of([place / "l.zarr", place / "run.zarr", "--until-chi2", "0.2"]) == 0
    assert describe(place / "run.zarr")["goal_chi2"] == 0.2


def test_a_spent_budget_ends_with_its_code_and_a_larger_one_goes_on(place: Path) -> None:
    words = [place / "l.zarr", place / "run.zarr", "--until-chi2", "1e-3", "--max-samples"]
    assert code_of([*words, "600"]) == 3
    spent = describe(place / "run.zarr")["samples"]
    assert code_of([*words, "600", "--json"]) == 3
    assert describe(place / "run.zarr")["samples"] == spent
    assert code_of([*words, "2000"]) == 3
    assert 600 < describe(place / "run.zarr")["samples"] <= 2000


def test_a_goal_that_is_taken_away_leaves_the_budget(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [place / "l.zarr", place / "run.zarr", "--until-chi2"]
    assert code_of([*words, "0.5"]) == 0
    spent = describe(place / "run.zarr")["samples"]
    capsys.readouterr()
    assert code_of([*words, "none", "--max-samples", "1"]) == 0
    assert "the budget of 1 samples is spent" in capsys.readouterr().out
    assert code_of([*words, "none", "--max-samples", str(spent + 600)]) == 0
    assert describe(place / "run.zarr")["samples"] > spent


def test_an_exact_run_is_done(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [place / "l.zarr", place / "run.zarr", "--exact"]
    assert code_of(words) == 0
    capsys.readouterr()
    assert code_of(words) == 0
    assert "all masses are exact" in capsys.readouterr().out


def test_a_job_finds_latents_that_have_moved(place: Path) -> None:
    run = solved(place, until_chi2=None, max_samples=300)
    (place / "l.zarr").rename(place / "moved.zarr")
    assert code_of([place / "moved.zarr", run, "--max-samples", "600"]) == 0
    assert distot.load(run).samples > 300


@pytest.mark.parametrize(
    ("source", "other"),
    [
        (ROWS, changed(ROWS, 250)),
        (ROWS, ROWS[:400]),
        (distot.Ball(2, 2.0), distot.Ball(2, 3.0)),
        (distot.Cube(2, 0.0, 2.0), "cube"),
        (distot.Gaussian(0.0, [1.0, 2.0]), "gaussian"),
        (normal, wide),
        (normal, also_normal),
        (normal, "gaussian"),
        ("gaussian", normal),
    ],
)
def test_other_sources_do_not_go_on(place: Path, source: Any, other: Any) -> None:
    run = solved(place, source, seed=2)
    assert go_on(run, place / "l.zarr", source, None, {"seed": 2}).reason == "until_chi2"
    with pytest.raises(InputError, match="draws from another source"):
        go_on(run, place / "l.zarr", other, None, {})
    if not isinstance(other, str | np.ndarray):
        for verb in (distot.resume, distot.load, distot.certify):
            with pytest.raises(InputError, match="draws from another source"):
                verb(run, source=other)


def test_a_callable_of_the_same_name_that_draws_something_else(place: Path) -> None:
    run = solved(place, normal)

    def other(random: np.random.Generator, n: int) -> NDArray[Any]:
        return wide(random, n)

    other.__qualname__ = "normal"
    with pytest.raises(InputError, match="what it draws is not the same"):
        distot.load(run, source=other)


def test_masses_that_were_changed_in_the_store(place: Path) -> None:
    """The fingerprint of latents says nothing of their masses."""
    run = solved(place)
    shutil.rmtree(place / "l.zarr")
    (place / "massive.zarr").rename(place / "l.zarr")
    for verb in (distot.resume, distot.load, distot.certify):
        with pytest.raises(InputError, match="other masses"):
            verb(run)


def test_where_latents_are_now_is_kept(place: Path) -> None:
    run = solved(place, until_chi2=None, max_samples=300)
    (place / "l.zarr").rename(place / "first.zarr")
    with pytest.raises(DistotError, match="say where they are"):
        distot.resume(run, max_samples=600)
    distot.resume(run, max_samples=600, latents=place / "first.zarr", progress=False)
    assert json.loads((run / "config.json").read_bytes())["latents"] == "../first.zarr"
    (place / "first.zarr").rename(place / "second.zarr")
    distot.certify(run, latents=place / "second.zarr")
    assert distot.load(run).reason == "max_samples"


def test_a_run_with_a_copy_of_its_latents_keeps_to_it(place: Path) -> None:
    distot.load(solved(place, until_chi2=None, max_samples=300)).save(place / "whole.zarr")
    distot.resume(place / "whole.zarr", max_samples=600, latents=place / "l.zarr", progress=False)
    assert Run(place / "whole.zarr").config["latents"] == "latents.zarr"


def test_certificate_and_cells_of_other_heights(place: Path) -> None:
    """A step has one number in all runs: heights are known by their hash."""
    runs = []
    for seed in (0, 1):
        runs.append(place / f"{seed}.zarr")
        distot.solve(place / "l.zarr", until_chi2=None, max_samples=600, seed=seed, run=runs[-1], progress=False)
        distot.generate_file(runs[-1], place / f"{seed}.new.zarr", 20)
    first, second = (Run(run).load_checkpoint() for run in runs)
    assert first is not None
    assert second is not None
    assert first.scalars["step"] == second.scalars["step"]
    right = distot.load(runs[1]).cells().cost
    for name in ("certificate.json", "LATEST_CELLS"):
        shutil.copy(runs[0] / name, runs[1] / name)
    shutil.rmtree(runs[1] / "cells")
    shutil.copytree(runs[0] / "cells", runs[1] / "cells")
    facts = describe(runs[1])
    assert "certificate" not in facts
    assert facts["cells"] == "not measured"
    found = distot.load(runs[1])
    assert found.kept is None
    assert np.array_equal(found.cells().cost, right)
    page = distot.report(runs[1], place / "report.html", detail=False)
    assert "of earlier heights" in Path(str(page)).read_text()


# ------------------------------------------------------------------------------------------- classes

LABELS = np.arange(60) % 2


def classes(folder: Path, **changes: Any) -> distot.Classes:
    given: dict[str, Any] = {"latents": Y, "labels": LABELS, "source": "gaussian", "until_chi2": 0.9}
    return distot.solve_classes(**given | {"progress": False, "run": folder / "all"} | changes)


@pytest.mark.parametrize(
    "change",
    [
        {"latents": changed(Y, 59)},
        {"latents": Y.astype(np.float64)},
        {"source": "ball"},
        {"source": distot.Gaussian(0.0, 2.0, 2)},
        {"source": normal},
        {"mass": np.arange(60) + 1.0},
        {"labels": 1 - LABELS},
        {"labels": np.arange(60) % 3},
        {"seed": 1},
        {"epsilon": 0.1},
        {"assigner": "dense"},
        {"certificate_samples": 500},
        {"exact": True},
        {"init": "all/0.run.zarr"},
    ],
)
def test_classes_of_something_else(tmp_path: Path, change: dict[str, Any]) -> None:
    first = classes(tmp_path)
    with pytest.raises(InputError):
        classes(tmp_path, **change)
    assert np.array_equal(classes(tmp_path)[1].heights, first[1].heights)


@pytest.mark.parametrize(
    ("begun", "again"),
    [
        ({"seed": 3}, {}),
        ({"epsilon": 0.1}, {}),
        ({"source": ROWS}, {"source": changed(ROWS, 499)}),
        ({"source": normal}, {"source": wide}),
        ({"mass": np.arange(60) + 1.0}, {}),
        ({"mass": np.arange(60) + 1.0}, {"mass": np.arange(60) + 2.0}),
    ],
)
@pytest.mark.filterwarnings("ignore::distot.DistotWarning")
def test_classes_that_were_begun_otherwise(tmp_path: Path, begun: dict[str, Any], again: dict[str, Any]) -> None:
    classes(tmp_path, **begun)
    classes(tmp_path, **begun)
    with pytest.raises(InputError):
        classes(tmp_path, **again)


@pytest.mark.parametrize("name", ["run.zarr", "l.zarr", "file", "link"])
def test_classes_need_a_folder_of_their_own(place: Path, name: str) -> None:
    solved(place)
    (place / "file").write_text("mine")
    (place / "link").symlink_to("nowhere")
    before = sorted(place.rglob("*"))
    with pytest.raises(StoreError, match=r"choose another (name|path)"):
        classes(place, run=place / name)
    assert sorted(place.rglob("*")) == before


def test_goals_of_classes_may_change(tmp_path: Path) -> None:
    assert classes(tmp_path, until_chi2=None, max_samples=300)[0].reason == "max_samples"
    assert classes(tmp_path, until_chi2=None, max_samples=300)[0].samples <= 300
    assert classes(tmp_path, until_chi2=None, max_samples=900)[0].samples > 300
    flat = classes(tmp_path / "flat", exact=True)
    assert flat[0].reason == "exact"
    assert np.array_equal(classes(tmp_path / "flat", exact=True)[0].heights, flat[0].heights)


def test_latents_of_a_class_that_were_left_by_another_call(tmp_path: Path) -> None:
    """Stopped between the copy of the latents and the run."""
    classes(tmp_path)
    shutil.rmtree(tmp_path / "all/1.run.zarr")
    with pytest.raises(InputError, match=r"1\.latents\.zarr holds other latents"):
        classes(tmp_path, latents=changed(Y, 1))
    assert classes(tmp_path)[1].reason == "until_chi2"


def test_help_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["--help"]) == 0
    assert "--again" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        command(["solve", "a.zarr"])
