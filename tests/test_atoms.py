"""Atoms in memory as float32, in memory as stored, or on disk: the same bits, and no more memory than was promised."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grids import Grid, on_grid
from numpy.typing import NDArray

import distot
from distot import assign, atoms, descent, optim, start, tree
from distot import problem as problem_module
from distot.assign.native import Native
from distot.assign.tiled import Tiled
from distot.atoms import Framed, Reader, Whole, blocks, into_frame, tile_rows
from distot.certify import certify
from distot.entropic import Soft
from distot.errors import DistotWarning, InputError, StoreError
from distot.orbit import Orbit
from distot.power import Frame
from distot.problem import build_problem
from distot.solution import Solution
from distot.source import Stream
from distot.store import latents as latents_module
from distot.store import new_latents, open_latents

N, D = 1000, 16
TINY, ROOM = 1e-6, 24e3 / 2**30  # GiB: nothing fits; 24 of the 32 KB of halves do not, of 1,000 rows of 16
HALVES = 40e3 / 2**30  # the halves do, their float32 form does not
FRAME = Frame(np.zeros(D), 1.0, np.linspace(-1, 1, D), 0.37)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 atoms a tile and 1,024 samples a portion, so that small problems have many."""
    monkeypatch.setattr(atoms, "TILE", 64 * D)
    monkeypatch.setattr(problem_module, "SEARCH_NUMBERS", 1024 * D)


def rows_of(dtype: str) -> NDArray[Any]:
    """Rows of two dtypes' precision, some of them equal, in clusters; float32 if dtype is bfloat16."""
    rng = np.random.default_rng(7)
    y = 3 * rng.standard_normal((20, D))[rng.integers(20, size=N)] + rng.standard_normal((N, D))
    y[[40, 700, 999]], y[500] = y[3], y[501]
    half = torch.from_numpy(y).to(torch.bfloat16).float().numpy() if dtype == "bfloat16" else y.astype(dtype)
    return half


def masses() -> NDArray[np.float64]:
    mass = np.full(N, 1 / (N - 2))
    mass[[5, 700]] = 0  # one of the equal ones, too
    return mass


def store(path: Path, dtype: str, rows: NDArray[Any] | None = None, mass: bool = True) -> Path:
    y = rows_of(dtype) if rows is None else rows
    with new_latents(path, (y.shape[0], y.shape[1]), dtype, "drawn for a test") as writer:
        writer.write(y)
        if mass:
            writer.write_mass(masses())
    return path


def solve(latents: object, memory: float | None, **options: Any) -> tuple[Solution, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    given = {"until_chi2": None, "max_samples": 3 * N, "certificate_samples": 1500} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistotWarning)  # of merged duplicates and masses of zero
        found = distot.solve(latents, memory=memory, progress=False, on_event=events.append, **given)  # type: ignore[arg-type]
    return found, events


def framed(y: NDArray[Any], which: NDArray[np.int64] | None = None) -> Framed:
    return Framed(y, y, FRAME, np.arange(len(y)) if which is None else which, "disk")


# ------------------------------------------------------------------------------------------ the same answer


KINDS = [
    ("float16", HALVES, "float16"),
    ("float16", ROOM, "disk"),
    ("bfloat16", HALVES, "bfloat16"),
    ("bfloat16", ROOM, "disk"),
    ("float32", ROOM, "disk"),
    ("float64", ROOM, "disk"),
]
PLAIN: dict[str, Any] = {"source": np.random.default_rng(3).standard_normal((5000, D))}
SOFT: dict[str, Any] = {"epsilon": 0.5, "top_k": 70, "max_samples": 2 * N}  # more winners than a tile has atoms


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("dtype", "memory", "kept", "options"),
    [
        *(pytest.param(*kind, {}, id=f"{kind[0]} {kind[2]} orbits") for kind in KINDS),
        *(pytest.param(*kind, PLAIN, id=f"{kind[0]} {kind[2]} plain") for kind in KINDS[:2]),
        *(pytest.param(*kind, SOFT, id=f"{kind[0]} {kind[2]} soft") for kind in KINDS[1:3]),
    ],
)
def test_heights_and_certificate_are_the_same_bit_for_bit(
    tmp_path: Path, dtype: str, memory: float, kept: str, options: dict[str, Any]
) -> None:
    """With duplicates, masses of zero, the multilevel start, and lifts; by samples with and without orbits."""
    path = store(tmp_path / "z.zarr", dtype)
    (whole, first), (other, events) = solve(path, None, **options), solve(path, memory, **options)
    assert (first[0]["kept"], events[0]["kept"]) == ("float32", kept)
    assert whole.problem.target.n == N - 5
    assert any(event["event"] == "start" for event in events)
    assert np.array_equal(whole.heights, other.heights)
    assert whole.certificate == other.certificate
    assert whole.samples == other.samples
    (note,) = (event["text"] for event in events if event["event"] == "note" and "GiB" in event["text"])
    assert ("in memory as" if memory == HALVES else "on disk") in note
    x = np.random.default_rng(4).standard_normal((5000, D))
    assert np.array_equal(whole.assign(x), other.assign(x))
    assert np.array_equal(whole.map(x), other.map(x))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", ["float16", "int16", ">f4"])
def test_an_array_in_memory_is_not_copied_where_there_is_no_room(dtype: str) -> None:
    y = (100 * rows_of("float64")).astype(dtype)
    (whole, _), (other, events) = solve(y, None), solve(y, TINY)
    assert events[0]["kept"] == {"int16": "float64", ">f4": "float32"}.get(dtype, dtype)
    assert np.array_equal(whole.heights, other.heights)
    held = other.problem.target.atoms
    assert isinstance(held, Framed)
    assert dtype != "float16" or np.shares_memory(held.rows[0:1], y)


def test_framing_is_that_of_the_frame() -> None:
    y = rows_of("float16")
    y[0] = -FRAME.target_centre
    y[1], y[2] = 6e4, -6e-8
    out = np.empty(y.shape, dtype=np.float32)
    into_frame(y, FRAME, out)
    wanted = FRAME.target_in(y.astype(np.float64)) + np.float32(0)
    assert np.array_equal(out.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threads", [1, 2])
def test_one_tile_or_many_give_the_same_scores(threads: int) -> None:
    """Plain samples and orbits; the turned atoms are made tile by tile in the one case, and kept in the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = rows_of("float16")
        other = framed(y)
        heights = torch.randn(N, generator=torch.Generator().manual_seed(1)).double()
        z, orbit = torch.randn(300, D, generator=torch.Generator().manual_seed(2)), Orbit(D, "rotations", 0)
        for x in (z, orbit.of(z.double(), orbit.axes().float())):
            for k in (1, 2, 100):
                found, truth = Tiled(other, "native")(x, heights, k), Native(other[:])(x, heights, k)
                assert torch.equal(found.index, truth.index)
                assert torch.equal(found.score, truth.score)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["dense", "triton"])
def test_winners_of_tiles_are_merged(name: str) -> None:
    """Ties go to the lowest index, across tiles as well."""
    y = np.random.default_rng(0).integers(-1, 2, (300, D)).astype(np.float16)
    plain = Framed(y, y, Frame(np.zeros(D), 1.0, np.zeros(D), 1.0), np.arange(300), "disk")
    x, heights = torch.from_numpy(y[:40].astype(np.float32)), torch.zeros(300)
    for k in (1, 2, 5):
        found = Tiled(plain, name)(x, heights, k)
        order = (x.double() @ plain[:].double().T).sort(dim=1, descending=True, stable=True)
        assert torch.equal(found.index, order.indices[:, :k])
        assert torch.equal(found.score.double(), order.values[:, :k])


@pytest.mark.usefixtures("small_tiles")
def test_portions_searched_together_are_those_searched_alone() -> None:
    y = rows_of("float16")
    problem, other = (build_problem(y, "gaussian", memory=memory) for memory in (None, TINY))
    for stream in (Stream.STEP, Stream.CERTIFY):
        alone = [list(p.groups(stream, 3, 100_000, 2)) for p in (problem, other)]
        assert all(len(group) == 1 for group in alone[0])
        assert max(len(group) for group in alone[1]) > 1
        for (first, x), (second, z) in zip(
            *([part for group in groups for part in group] for groups in alone), strict=True
        ):
            assert first == second
            assert torch.equal(x.z, z.z)


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.usefixtures("small_tiles")
def test_atoms_answer_alike_whatever_they_are(tmp_path: Path) -> None:
    y = rows_of("float16")
    some = np.flatnonzero(np.random.default_rng(0).random(N) < 0.7)
    latents = open_latents(store(tmp_path / "z.zarr", "float16"))
    truth = framed(y, some)[:]
    held = Framed(latents.held(slice(0, N)), latents, FRAME, some, "float16")
    index = torch.tensor([[5, 3], [600, 5]])
    for found in (Whole(truth), framed(y, some), Framed(latents, latents, FRAME, some, "disk"), held):
        assert len(found) == found.shape[0] == len(some)
        assert torch.equal(found[:], truth)
        assert torch.equal(found[7:300], truth[7:300])
        assert torch.equal(found[index], truth[index])
        assert found[index[:0, 0]].shape == (0, D)
        assert torch.equal(found.some(index)(index[1]), truth[index[1]])
        first, tiles = zip(*found.tiles(), strict=True)
        assert first == tuple(range(0, len(some), 64))
        assert torch.equal(torch.cat(tiles), truth)
        assert torch.equal(found.moved(lambda tile: 2 * tile)[:], 2 * truth)


class Counted:
    """Rows in pieces of ten, which remembers the ranges that were asked for."""

    grains = (100, 10)

    def __init__(self, y: NDArray[Any]) -> None:
        self.y, self.shape, self.dtype = y, y.shape, y.dtype
        self.asked: list[tuple[int, int]] = []

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        self.asked.append((rows.start, rows.stop))
        return self.y[rows]


def test_no_piece_is_read_twice_by_ranges_in_a_row() -> None:
    y = np.arange(300.0).reshape(-1, 2)
    counted = Counted(y)
    read = Reader(counted)
    for first, end in pairwise([0, 7, 9, 10, 34, 35, 77, 149, 150]):
        assert np.array_equal(read(first, end), y[first:end])
    assert all(first % 10 == 0 for first, _ in counted.asked)
    assert sum(end - first for first, end in counted.asked) == len(y)
    assert np.array_equal(read(20, 26), y[20:26])  # and back


@pytest.mark.parametrize(("d", "rows"), [(1, 65536), (16, 65536), (64, 16384), (100, 8192), (4096, 256), (10**7, 1)])
def test_a_tile_is_a_power_of_two_of_rows(d: int, rows: int) -> None:
    assert tile_rows(d) == rows
    assert [part.stop - part.start for part in blocks(rows + 1, d)] == [rows, 1]


@pytest.mark.usefixtures("small_tiles")
def test_the_thread_ends_with_its_tiles() -> None:
    before = threading.active_count()
    for stop in (1, 3):
        tiles = framed(rows_of("float16")).tiles()
        for _ in range(stop):
            next(tiles)
        assert threading.active_count() == before + 1
        tiles.close()
        assert threading.active_count() == before


@pytest.mark.usefixtures("small_tiles")
def test_what_reading_raises_reaches_the_caller() -> None:
    y = rows_of("float16")

    class Torn(Counted):
        def __getitem__(self, rows: slice) -> NDArray[Any]:
            if rows.stop > 500:
                raise StoreError("row 500 is torn")
            return super().__getitem__(rows)

    torn, seen, before = Torn(y), 0, threading.active_count()
    tiles = Framed(torn, torn, FRAME, np.arange(N), "disk").tiles()
    while seen < 384:  # the tiles before it come
        seen, _ = next(tiles)
    with pytest.raises(StoreError, match="row 500 is torn"):
        next(tiles)
    assert threading.active_count() == before


@pytest.mark.usefixtures("small_tiles")
def test_stopping_between_tiles() -> None:
    """One process looks for signals at every tile, and leaves no thread behind."""
    problem = build_problem(rows_of("float16"), "gaussian", memory=TINY)
    search, polls, before = assign.over(problem, "auto"), 0, threading.active_count()

    def poll() -> None:
        nonlocal polls
        polls += 1
        if polls == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(assign.searches(problem, search, Stream.STEP, 0, 1000, torch.zeros(problem.target.n), 2, poll))
    assert polls == 5 < len(list(problem.target.atoms.tiles()))
    assert threading.active_count() == before


# ------------------------------------------------------------------------------------------ choices


@pytest.mark.parametrize("name", ["lists", "faiss"])
def test_assigners_that_need_all_atoms_say_so(name: str) -> None:
    message = f"assigner '{name}' keeps all latents in memory as float32, for which there is no room; allow more"
    with pytest.raises(InputError, match=message):
        distot.solve(rows_of("float16"), memory=TINY, assigner=name, max_samples=1000, progress=False)


def test_memory_that_makes_no_sense() -> None:
    with pytest.raises(InputError, match="memory must be positive, or None; it is -1"):
        distot.solve(rows_of("float16"), memory=-1, progress=False)


def test_auto_is_the_plain_search() -> None:
    _, events = solve(rows_of("float16"), TINY, max_samples=1000, recall=0.9)
    assert events[0]["assigner"] == "native"


# ------------------------------------------------------------------------------------------ run folders


@pytest.mark.usefixtures("small_tiles")
def test_a_run_keeps_its_limit_and_resume_changes_it(tmp_path: Path) -> None:
    path = store(tmp_path / "z.zarr", "float16", mass=False, rows=rows_of("float16")[:400])
    options: dict[str, Any] = {"until_chi2": None, "max_samples": 4000, "certificate_samples": 1000, "seed": 3}
    quiet: dict[str, Any] = {"progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistotWarning)
        distot.solve(path, run=tmp_path / "a.zarr", **options, **quiet)
        distot.solve(path, run=tmp_path / "b.zarr", memory=TINY, **options, **quiet)
        loaded = distot.load(tmp_path / "b.zarr")
        assert loaded.problem.target.atoms.kept == "disk"
        assert np.array_equal(loaded.heights, distot.load(tmp_path / "a.zarr").heights)
        one, two = (distot.certify(tmp_path / f"{name}.zarr", 5000, 1) for name in "ab")
        assert one.certificate == two.certificate
        x = np.random.default_rng(0).standard_normal((300, D))
        for name in "ab":
            distot.assign_file(tmp_path / f"{name}.zarr", x, tmp_path / f"{name}.npy")
        assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
        more = distot.resume(tmp_path / "a.zarr", max_samples=6000, **quiet)
        other = distot.resume(tmp_path / "b.zarr", max_samples=6000, memory=1.0, **quiet)
    assert other.problem.target.atoms.kept == "float32"
    assert other.options.memory == 1.0
    assert np.array_equal(more.heights, other.heights)


@pytest.mark.usefixtures("small_tiles")
def test_warm_start_from_latents_on_disk(tmp_path: Path) -> None:
    path, y = store(tmp_path / "z.zarr", "float16", mass=False), rows_of("float16").astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistotWarning)
        distot.solve(path, until_chi2=None, max_samples=5000, run=tmp_path / "run.zarr", progress=False)
    moved = np.concatenate([y[:-5] * 1.01 + 0.02, y[:3] + 0.1])
    found = [solve(moved, memory, init=tmp_path / "run.zarr", max_samples=6000)[0] for memory in (None, TINY)]
    assert np.array_equal(found[0].heights, found[1].heights)


@pytest.mark.usefixtures("small_tiles")
def test_a_shard_damaged_while_it_streams_is_named_and_the_run_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A solve meets it on its way; after it was restored the run goes on to the heights of an unbroken one."""
    monkeypatch.setattr(latents_module, "CHUNK_BYTES", 64 * D * 2)
    monkeypatch.setattr(latents_module, "CHUNKS_PER_SHARD", 4)
    path = store(tmp_path / "z.zarr", "float16", mass=False)
    shard = path / "z" / "c" / "2" / "0"
    whole = shard.read_bytes()

    def damage(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            shard.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])

    options: dict[str, Any] = {"until_chi2": None, "max_samples": 2500, "memory": TINY, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistotWarning)
        truth = distot.solve(path, run=tmp_path / "unbroken.zarr", **options)
        with pytest.raises(StoreError, match=f"{shard} is damaged or cut short; restore it from a copy"):
            distot.solve(path, run=tmp_path / "run.zarr", checkpoint_seconds=1e6, on_event=damage, **options)
        shard.write_bytes(whole)
        assert distot.load(tmp_path / "run.zarr").held.progress.state.step == 3
        found = distot.resume(tmp_path / "run.zarr", progress=False)
    assert np.array_equal(found.heights, truth.heights)


def test_ctrl_c_between_tiles_keeps_the_run(tmp_path: Path) -> None:
    """The process itself: exit code 130, a checkpoint, no thread that keeps it alive."""
    rows = np.random.default_rng(0).standard_normal((20_000, 512)).astype(np.float16)
    path, run = store(tmp_path / "z.zarr", "float16", rows=rows, mass=False), tmp_path / "run.zarr"
    command = [sys.executable, "-m", "distot.cli", "solve", str(path), str(run), "--memory", "0.001"]
    with subprocess.Popen([*command, "--until-chi2", "1e-9"], stderr=subprocess.PIPE, text=True) as child:
        log = run / "log.jsonl"
        while not (log.exists() and '"start"' in log.read_text()):
            assert child.poll() is None, child.stderr.read()  # type: ignore[union-attr]
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=60)[1]
    assert child.returncode == 130, said
    assert "on disk and are read again for every search" in said
    assert f"distot resume {run}" in said


# ------------------------------------------------------------------------------------------ grids


def phases(grid: Grid, path: Path, memory: float | None) -> dict[str, Any]:
    """The start, a few steps, a transfer and a certificate on a grid, as if the problem were large."""
    atoms.TILE, problem_module.SEARCH_NUMBERS, optim.SMALL, tree.WHOLE = 64 * D, 1024 * D, 100, 50
    problem = build_problem(open_latents(path), mass=masses(), device="cpu", grid=grid, memory=memory)
    target = problem.target
    heights, _ = start.multilevel(problem, "native", lambda: None)
    search, mass = assign.over(problem, "auto"), torch.from_numpy(target.mass)
    state = optim.begin(heights, 0, target.split)
    for step in range(4):
        state = descent.advance(problem, search, state, mass, Stream.STEP, step, lambda: None)
    soft = Soft(0.3, 70)
    return {
        "kept": target.atoms.kept,
        "original": target.split.gather(torch.from_numpy(target.original)).numpy(),
        "start": target.split.gather(heights).numpy(),
        "heights": target.split.gather(state.heights).numpy(),
        "transfer": target.split.gather(start.transfer(problem, problem, heights, "native")).numpy(),
        "certificate": certify(problem, search, state.heights, 3000),
        "soft": certify(problem, search, state.heights, 300, soft=soft),
    }


def every_kind(grid: Grid, path: Path) -> list[dict[str, Any]]:
    """The phases with latents in memory as float32, as stored, and on disk; the last as the others wish it."""
    limits = None, HALVES / 2, (1.0 if grid.target.rank else TINY)
    return [phases(grid, path, memory) for memory in limits]


def test_shares_that_are_not_in_memory_on_a_grid(tmp_path: Path) -> None:
    """The same bits. All processes keep latents alike, else some would search more samples at once than others."""
    (whole, *others), second = on_grid((2, 1), every_kind, store(tmp_path / "z.zarr", "float16", mass=False))
    assert [its["kept"] for its in second] == ["float32", "float16", "disk"]
    assert [its.pop("kept") for its in (whole, *others)] == ["float32", "float16", "disk"]
    for other in others:
        for name in whole:
            assert np.array_equal(whole[name], other[name]), name


# ------------------------------------------------------------------------------------------ memory

MEASURED = """
import sys
import numpy as np, torch
import distot
from distot.store import open_latents
torch.set_num_threads(1)
small = np.random.default_rng(0).standard_normal((300, 128)).astype(np.float16)
distot.solve(small, max_samples=100, certificate_samples=100, progress=False)  # all that is loaded late is there now

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
before = status("VmRSS")
distot.solve(sys.argv[1], max_samples=100, certificate_samples=500, memory=float(sys.argv[2]), progress=False)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are Linux's to tell")
def test_memory_is_what_was_promised(tmp_path: Path) -> None:
    """Reading, checking, merging, the Gaussian heights and a certificate of 150,000 latents, 77 MB as float32:
    those in memory as stored take 38 MB more than those on disk. What malloc keeps of freed blocks is not counted."""
    n, d = 150_000, 128
    path, environment = tmp_path / "z.zarr", os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    with new_latents(path, (n, d), "float16", "drawn for a test") as writer:
        for number in range(10):
            writer.write(np.random.default_rng(number).standard_normal((n // 10, d), dtype=np.float32))
    peaks = {}
    for kept, memory in (("stored", 0.05), ("disk", 0.01)):
        command = [sys.executable, "-c", MEASURED, str(path), str(memory)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peaks[kept] = int(done.stdout)
    print(peaks)
    assert 0.6 < (peaks["stored"] - peaks["disk"]) / (2 * n * d) < 1.4
    assert peaks["disk"] < 4 * n * d
