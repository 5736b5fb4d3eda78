"""What commands write: never over what is there or what is read, whole or not at all, and again only for the same."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from processes import files_up_to

import distot
from distot.cli import main as command
from distot.errors import DistotError, InputError, StoreError
from distot.ingest import ingest
from distot.store import RowFile, RowWriter, Url, check_out, copy_latents, new_npy, save_npy
from distot.store import rows as room
from jobs.patches import keep

Y = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((3000, 3))
PAIRED = np.concatenate([Y[:30], Y[:30]])  # every latent twice


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("solved")
    copy_latents(Y, None, folder / "l.zarr", "test")
    distot.solve(folder / "l.zarr", until_chi2=None, max_samples=600, run=folder / "run.zarr", progress=False)
    distot.generate_file(folder / "run.zarr", folder / "new.zarr", 20)
    return folder


@pytest.fixture
def place(solved: Path, tmp_path: Path) -> Path:
    """Latents, their run with its cells, samples, and other names of these."""
    for name in ("l.zarr", "run.zarr"):
        shutil.copytree(solved / name, tmp_path / name)
    np.save(tmp_path / "x.npy", X)
    copy_latents(X, None, tmp_path / "x.zarr", "test")
    (tmp_path / "link.npy").symlink_to("x.npy")
    os.link(tmp_path / "x.npy", tmp_path / "hard.npy")
    (tmp_path / "there.npy").write_bytes(b"mine")
    (tmp_path / "there.html").write_text("<title>mine · distot</title>")
    (tmp_path / "nowhere.npy").symlink_to("gone/x.npy")
    (tmp_path / "here").symlink_to(".")
    return tmp_path


def state(folder: Path) -> dict[str, Any]:
    """Every file below, but locks and what a reader may keep in a run."""
    files = [file for file in sorted(folder.rglob("*")) if file.name not in (".lock", "owner.json")]
    return {str(file): file.read_bytes() if file.is_file() else None for file in files}


def refused(*words: object) -> None:
    with pytest.raises(SystemExit, match="1"):
        command([str(word) for word in words])


@pytest.mark.parametrize(
    "words",
    [
        ["assign", "run.zarr", "x.npy", "x.npy"],
        ["assign", "run.zarr", "x.npy", "./x.npy"],
        ["assign", "run.zarr", "x.npy", "run.zarr/../x.npy"],
        ["assign", "run.zarr", "x.npy", "here/x.npy"],
        ["assign", "run.zarr", "x.npy", "link.npy"],
        ["assign", "run.zarr", "link.npy", "x.npy"],
        ["assign", "run.zarr", "x.npy", "hard.npy"],
        ["assign", "run.zarr", "x.npy", "there.npy"],
        ["assign", "run.zarr", "x.npy", "nowhere.npy"],
        ["assign", "run.zarr", "x.npy", "run.zarr"],
        ["assign", "run.zarr", "x.npy", "run.zarr/out.npy"],
        ["assign", "run.zarr", "x.npy", "here/run.zarr/out.zarr"],
        ["assign", "run.zarr", "x.npy", "l.zarr"],
        ["assign", "run.zarr", "x.npy", "l.zarr/z/out.npy"],
        ["assign", "run.zarr", "x.zarr", "x.zarr"],
        ["assign", "run.zarr", "x.zarr", "x.zarr/"],
        ["assign", "run.zarr", "x.zarr", "x.zarr/out.zarr"],
        ["assign", "run.zarr", "x.zarr/z", "x.zarr/out.zarr"],
        ["assign", "run.zarr", "l.zarr", "l.zarr"],
        ["export", "run.zarr", "x.npy"],
        ["export", "run.zarr", "run.zarr"],
        ["export", "run.zarr", "run.zarr/g.npy"],
        ["export", "run.zarr", "l.zarr/g.npy"],
        ["generate", "run.zarr", "l.zarr", "-n", "5"],
        ["generate", "run.zarr", "run.zarr/new.zarr", "-n", "5"],
        ["generate", "run.zarr", "there.npy", "-n", "5"],
        ["pairs", "run.zarr", "run.zarr/pairs.zarr"],
        ["pairs", "run.zarr", "l.zarr/pairs.zarr"],
        ["pairs", "run.zarr", "x.npy"],
        ["report", "run.zarr", "-o", "there.html"],
        ["report", "run.zarr", "-o", "run.zarr/report.html"],
        ["ingest", "x.zarr", "x.zarr"],
        ["ingest", "x.zarr", "x.zarr/l.zarr"],
        ["ingest", "x.npy", "x.npy"],
        ["ingest", "x.npy", "l.zarr"],
        ["solve", "l.zarr", "l.zarr"],
        ["solve", "l.zarr", "l.zarr/run.zarr"],
        ["solve", "l.zarr", "b.zarr/../run.zarr/b.zarr", "--init", "run.zarr"],
        ["solve", "l.zarr", "x.zarr/run.zarr", "--source", "x.zarr"],
    ],
)
def test_nothing_is_written_over_what_is_there(
    place: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = state(place)
    refused(*words)
    assert state(place) == before
    said = capsys.readouterr()
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("error: ")
    assert not said.out


def test_python_writes_over_nothing_either(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    solution, before = distot.load("run.zarr"), state(place)
    calls: list[Callable[[], Any]] = [
        lambda: distot.assign_file("run.zarr", X, "there.npy"),
        lambda: distot.assign_file("run.zarr", "x.npy", place / "x.npy"),
        lambda: distot.assign_file("run.zarr", X, "moved.zarr/out.npy", latents="l.zarr"),
        lambda: solution.save("l.zarr"),
        lambda: solution.save("run.zarr"),
        lambda: solution.save("run.zarr/copy.zarr"),
        lambda: solution.save("l.zarr/copy.zarr"),
        lambda: distot.write_pairs(solution, "run.zarr/pairs.zarr"),
        lambda: distot.write_pairs(solution, "x.zarr"),
        lambda: distot.report("run.zarr", "there.html"),
        lambda: distot.generate_file("run.zarr", "x.zarr", 5),
        lambda: distot.solve_classes("l.zarr", np.arange(60) % 2, run="l.zarr/classes"),
        lambda: ingest("x.npy", "x.zarr"),
        lambda: keep(Path("there.npy"), Y),
    ]
    (place / "moved.zarr").symlink_to("l.zarr")
    before = state(place)
    for call in calls:
        with pytest.raises(DistotError):
            call()
    assert state(place) == before


def test_places_in_object_stores() -> None:
    """By their names alone: nothing is asked of the store."""
    run = Url("s3://box/a/run.zarr")
    for out in ("s3://box/a/run.zarr", "s3://box/a/run.zarr/x.npy", "s3://box/a/b/../run.zarr/"):
        with pytest.raises(InputError, match=r"would change s3://box/a/run\.zarr"):
            check_out(Url(out), run, goes_on=True)
    for out in ("s3://box/a/run.zarr2", "s3://other/a/run.zarr", "gs://box/a/run.zarr", "s3://box/run.zarr"):
        check_out(Url(out), run, Path("run.zarr"), goes_on=True)


def test_a_page_of_report_is_replaced_by_the_next(place: Path) -> None:
    page = place / "report.html"
    for _ in range(2):
        assert distot.report(place / "run.zarr", page, detail=False) == page
    page.write_text(page.read_text().replace("generator", "author"))
    with pytest.raises(StoreError, match="exists already; delete it first"):
        distot.report(place / "run.zarr", page, detail=False)


# ------------------------------------------------------------------------------------------ npy files


def test_rows_of_an_npy(tmp_path: Path) -> None:
    with new_npy(tmp_path / "a.npy", (5, 3), "float32") as write:
        write(np.ones((2, 3)))
        assert not (tmp_path / "a.npy").exists()
        write(np.zeros((3, 3)))
    assert np.array_equal(np.load(tmp_path / "a.npy"), [[1.0] * 3] * 2 + [[0.0] * 3] * 3)
    for shape in ((), (0,), (4,), (0, 3), (2, 3, 4)):
        save_npy(tmp_path / f"{len(shape)}{sum(shape)}.npy", np.ones(shape)) if shape else None
    assert np.load(tmp_path / "39.npy").shape == (2, 3, 4)
    with pytest.raises(ValueError, match="3 rows were announced"), new_npy(tmp_path / "b.npy", (3,), int):
        pass
    assert not (tmp_path / "b.npy").exists()


def test_two_that_write_the_same_file(tmp_path: Path) -> None:
    """The second one to end is refused, and the file is that of the first."""

    def both() -> None:
        with new_npy(tmp_path / "a.npy", (3,), int) as slow:
            with new_npy(tmp_path / "a.npy", (3,), int) as fast:
                fast(np.full(3, 1))
            slow(np.full(3, 2))

    with pytest.raises(StoreError, match="made by another process in the meantime"):
        both()
    assert np.load(tmp_path / "a.npy").tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npy"]


def test_an_interrupted_assign_is_given_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = place / "out.npy"
    with monkeypatch.context() as patched:
        patched.setattr("distot.outputs.ROWS", 1000)
        assign, left = distot.Solution.assign, iter([True, False])
        patched.setattr(distot.Solution, "assign", lambda self, x: assign(self, x) if next(left) else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distot.assign_file(place / "run.zarr", place / "x.npy", out)
    assert not list(place.glob("*out.npy*"))
    assert distot.assign_file(place / "run.zarr", place / "x.npy", out) == 3000
    assert np.array_equal(np.load(out), distot.load(place / "run.zarr").assign(X))


@pytest.mark.parametrize("words", [["assign", "run.zarr", "x.npy", "out.npy"], ["export", "run.zarr", "out.npy"]])
def test_a_file_that_cannot_be_written(
    place: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    with files_up_to(400):
        refused(*words)
    assert "size limit of this process" in capsys.readouterr().err
    assert not list(place.glob("*out.npy*"))


@pytest.mark.parametrize("full", [False, True])
def test_a_full_disk(place: Path, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before the search where the room is known to be too small, and where it goes while one writes."""
    disk = place / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
        if not full:
            monkeypatch.setattr("distot.store.out.need_space", lambda path, wanted: None)
        with pytest.raises(StoreError, match="free some space"):
            distot.assign_file(place / "run.zarr", X, disk / "out.npy")
        assert [file.name for file in disk.iterdir()] == ["other"]
        (disk / "other").unlink()
        assert distot.assign_file(place / "run.zarr", X, disk / "out.npy") == len(X)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ------------------------------------------------------------------------------ stores that are gone on with


def one_changed(x: NDArray[Any]) -> NDArray[Any]:
    other = x.copy()
    other[len(x) // 2] = -other[len(x) // 2]
    return other


@pytest.fixture
def begun(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of which two shards of six are written."""
    monkeypatch.setattr(room, "LEAST_BYTES", 8 * 500)
    flush, left = RowWriter._flush, iter([True, True])

    def full(self: RowWriter, state: Any) -> None:
        if next(left, None) is None:
            raise StoreError("the disk is full")
        flush(self, state)

    with monkeypatch.context() as patched:
        patched.setattr(RowWriter, "_flush", full)
        with pytest.raises(StoreError, match="full"):
            distot.assign_file(place / "run.zarr", place / "x.npy", place / "out.zarr")
    assert RowFile(place / "out.zarr").written == 1000
    return place


def test_assign_goes_on(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any spelling of the paths, from an array as well as from its file, however it is cut into pieces."""
    monkeypatch.chdir(begun)
    right = distot.load("run.zarr").assign(X)
    monkeypatch.setattr("distot.outputs.ROWS", 700)
    for samples in ("here/x.npy", "x.zarr", X):
        assert distot.assign_file("here/run.zarr", samples, "here/out.zarr") == 3000
        assert np.array_equal(RowFile("out.zarr").read("index"), right)
        assert not RowFile("out.zarr").kept.get("unfinished")


@pytest.mark.parametrize("complete", [False, True])
def test_assign_of_other_samples(begun: Path, complete: bool) -> None:
    """Whatever tells them from the first ones, as far as their latents are written; times and sizes say nothing."""
    file, out, run = begun / "x.npy", begun / "out.zarr", begun / "run.zarr"
    if complete:
        distot.assign_file(run, file, out)
    written = RowFile(out).written
    other = X.copy()
    other[written // 2, 1] += 1e-9
    times = file.stat()
    np.save(file, other)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    before = state(out)
    for samples in (file, other, X.astype(np.float32), X[:2999], np.concatenate([X, X[:1]]), X[::-1]):
        with pytest.raises(InputError):
            distot.assign_file(run, samples, out)
    with pytest.raises(InputError, match=r"must have shape \(B, 3\)"):
        distot.assign_file(run, X[:, :2], out)
    assert state(out) == before
    assert distot.assign_file(run, X, out) == 3000


def test_assign_by_another_map(begun: Path) -> None:
    """A run that went on, one of another source, and another one in its place."""
    run, out = begun / "run.zarr", begun / "out.zarr"
    shutil.copytree(run, begun / "further.zarr")
    distot.resume(begun / "further.zarr", max_samples=1200, progress=False)
    options: dict[str, Any] = {"until_chi2": None, "max_samples": 600, "progress": False}
    distot.solve(begun / "l.zarr", seed=1, run=begun / "seed.zarr", **options)
    distot.solve(begun / "l.zarr", "ball", run=begun / "ball.zarr", **options)
    distot.solve(one_changed(Y), run=begun / "latents.zarr", **options)
    for other in ("further", "seed", "ball", "latents"):
        with pytest.raises(InputError, match="was begun with"):
            distot.assign_file(begun / f"{other}.zarr", X, out)
    assert distot.assign_file(run, X, out) == 3000


@pytest.mark.filterwarnings("ignore::distot.DistotWarning")
def test_masses_that_leave_the_heights_alone(tmp_path: Path) -> None:
    """Of equal latents the sum of their masses decides the heights, and each mass the pairs."""
    mass = np.arange(60) + 1.0
    swapped = np.concatenate([mass[30:], mass[:30]])
    for name, weights in (("a", mass), ("b", swapped)):
        distot.solve(PAIRED, "cube", weights, None, 600, run=tmp_path / name, progress=False)
    shutil.rmtree(tmp_path / "b/checkpoints")  # they differ by rounding
    shutil.copytree(tmp_path / "a/checkpoints", tmp_path / "b/checkpoints")
    shutil.copy(tmp_path / "a/LATEST", tmp_path / "b/LATEST")
    first, second = (distot.load(tmp_path / name).decided() for name in "ab")
    assert [name for name in first if first[name] != second[name]] == ["masses"]
    for write in (
        lambda name: distot.write_pairs(tmp_path / name, tmp_path / "pairs.zarr", 500),
        lambda name: distot.assign_file(tmp_path / name, X, tmp_path / "assigned.zarr"),
        lambda name: distot.generate_file(tmp_path / name, tmp_path / "new.zarr", 20, balance=True),
    ):
        write("a")
        write("a")
        with pytest.raises(InputError, match="begun with masses"):
            write("b")


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("lost", [True, False])
def test_rows_of_which_a_file_was_lost(begun: Path, complete: bool, lost: bool) -> None:
    """zarr reads its fill value there, and the store says that all rows are written."""
    out = begun / "out.zarr"
    if complete:
        distot.assign_file(begun / "run.zarr", X, out)
    file = out / "index/c/0"
    if lost:
        file.unlink()
    else:
        file.write_bytes(b"")
    before = state(out)
    for use in (lambda: distot.assign_file(begun / "run.zarr", X, out), lambda: RowFile(out).read("index")):
        with pytest.raises(StoreError, match="index/c/0 is missing or empty; restore it from a copy, or delete"):
            use()
    assert state(out) == before


def test_rows_go_on_beside_files_of_the_user(begun: Path) -> None:
    for name in ("notes.partial", "index/c/0.0123456789abcdef0123456789abcdef.partial", ".zarr.json.01234567.partial"):
        (begun / "out.zarr" / name).write_text("begun")
    distot.assign_file(begun / "run.zarr", X, begun / "out.zarr")
    assert [file.name for file in (begun / "out.zarr").rglob("*.partial")] == ["notes.partial"]


def test_rows_without_the_array_that_is_read(begun: Path) -> None:
    with pytest.raises(StoreError, match=r"out\.zarr has no z for its rows"):
        RowFile(begun / "out.zarr").read("z")


def test_rows_that_do_not_say_of_which_samples_they_are(begun: Path) -> None:
    """As older versions wrote them."""
    out = begun / "out.zarr"
    text = (out / "zarr.json").read_text()
    (out / "zarr.json").write_text(text.replace('"samples":', '"others":'))
    with pytest.raises(InputError, match="these samples are others"):
        distot.assign_file(begun / "run.zarr", X, out)
    (out / "zarr.json").write_text(text.replace('"heights":', '"run":'))
    with pytest.raises(InputError, match="does not say of which heights"):
        distot.assign_file(begun / "run.zarr", X, out)


def test_generate_by_another_map(place: Path) -> None:
    out = place / "new.zarr"
    distot.generate_file(place / "run.zarr", out, 50, seed=5)
    distot.generate_file(place / "run.zarr", out, 50, seed=5)
    distot.resume(place / "run.zarr", max_samples=1200, progress=False)
    with pytest.raises(InputError, match="was begun with"):
        distot.generate_file(place / "run.zarr", out, 50, seed=5)


def test_cells_that_were_measured_otherwise(place: Path) -> None:
    """The mixtures are of the centres of the cells, which other samples put elsewhere."""
    run, out = distot.store.Run(place / "run.zarr"), place / "new.zarr"
    distot.generate_file(run.path, out, 50)
    solution = distot.load(run.path)
    sums, heights = solution.sums(5000), solution.decided()["heights"]
    with run.lock():
        kept = {"step": solution.held.progress.state.step, "samples": sums.samples, "orbits": sums.orbits}
        run.save_cells(kept["step"], sums.part(solution.problem), kept | {"heights": heights}, distot.grid.Axis())
    with pytest.raises(InputError, match="was begun with cells"):
        distot.generate_file(run.path, out, 50)


def test_k_as_the_guide_has_it(place: Path) -> None:
    with pytest.raises(SystemExit, match="0"):
        command(["generate", str(place / "run.zarr"), str(place / "new.zarr"), "-n", "10", "-k", "5"])
    assert RowFile(place / "new.zarr").about["mixing"]["k"] == 5
