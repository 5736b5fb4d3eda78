"""Loaders of pairs among ranks, in workers, in other processes: what decides a batch is fixed where they are made."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import distot
from cluster.workers import Found
from distot.errors import DistotWarning, InputError, StoreError
from distot.ingest import ingest
from distot.pairs.loader import Loader
from distot.source import Sampler
from distot.store import copy_latents
from distot.work import Load

set_forkserver_preload(["distot"])
CLOUD = np.random.default_rng(3).standard_normal((300, 4)).astype(np.float32) ** 3
LABELS = np.arange(300) % 3
OPTIONS: dict[str, Any] = {"until_chi2": 0.5, "progress": False, "assigner": "native"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, runs of classes, and a file of pairs."""
    folder = tmp_path_factory.mktemp("loaders")
    distot.solve(CLOUD, run=folder / "run.zarr", **OPTIONS)
    distot.solve_classes(CLOUD, LABELS, run=folder / "classes", **OPTIONS)
    distot.write_pairs(folder / "run.zarr", folder / "pairs.zarr", 300)
    return folder


KINDS: dict[str, Callable[..., Loader]] = {
    "Pairs": lambda place, **more: distot.Pairs(place / "run.zarr", 20, samples=300, **more),
    "balanced": lambda place, **more: distot.Pairs(place / "run.zarr", 20, samples=300, balance=True, **more),
    "ClassPairs": lambda place, **more: distot.ClassPairs(place / "classes", 20, samples=300, **more),
    "balanced classes": lambda place, **more: distot.ClassPairs(
        place / "classes", 20, samples=300, balance=True, **more
    ),
    "PairFile": lambda place, **more: distot.PairFile(place / "pairs.zarr", CLOUD, 20, **more),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def whole(loader: Any) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def same(a: Any, b: Any) -> bool:
    """Whether two loaders have the same batches, in the same order."""
    return all(torch.equal(x, y) for x, y in zip(whole(a), whole(b), strict=True))


def samples(loader: Any) -> bytes:
    """All that a loader hands out, whatever the order."""
    parts = [part.double().reshape(len(part), -1) for part in whole(loader)]
    rows = torch.cat(parts, dim=1).numpy()
    return rows[np.lexsort(rows.T)].tobytes()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DataLoader that failed does not wait for its workers."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)


def in_group(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    """This process is one of a process group from here on."""
    for name, value in (("is_initialized", True), ("get_rank", rank), ("get_world_size", world)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)


# -------------------------------------------------------------------------------------- other processes


@every_kind
def test_a_copy_elsewhere_is_the_same_loader(place: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pickle once and twice, as an attribute, by copy; made by a relative path, used in another folder."""
    monkeypatch.chdir(place)
    loader = KINDS[kind](Path())
    expected = whole(copy.deepcopy(loader))
    monkeypatch.chdir("/")
    module: Any = torch.nn.Linear(1, 1)
    module.loader = loader
    for twin in (
        pickle.loads(pickle.dumps(loader)),
        pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(loader)))),
        pickle.loads(pickle.dumps(module)).loader,
        copy.copy(loader),
        loader,
    ):
        assert all(torch.equal(a, b) for a, b in zip(whole(twin), expected, strict=True))


@pytest.mark.parametrize("kind", ["Pairs", "PairFile", "ClassPairs"])
def test_workers_have_the_rank_of_their_loader(place: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as ranks:
        in_group(ranks, 1, 3)
        mine = KINDS[kind](place)
        other = pickle.loads(pickle.dumps(mine))
        loader = DataLoader(copy.copy(mine), batch_size=None, num_workers=2, multiprocessing_context="forkserver")
        far = samples(loader)  # whose processes know of no group
    assert len(mine) == len(other) == 5
    assert far == samples(mine) == samples(other)


def test_a_run_that_goes_on_changes_no_loader(place: Path, tmp_path: Path) -> None:
    """Not where it was made, and not where it is unpickled later; without its latents it says so."""
    run = tmp_path / "run.zarr"
    distot.solve(CLOUD, run=run, max_samples=3000, until_chi2=None, progress=False)
    pairs = distot.Pairs(run, 100)
    sent, before = pickle.dumps(pairs), samples(copy.copy(pairs))
    found = Found(Load(run), pairs.coupling.solution.facts, False)
    assert np.array_equal(found().progress.state.average, pairs.coupling.solution.held.progress.state.average)
    distot.resume(run, max_samples=20_000, progress=False)
    assert samples(pickle.loads(sent)) == before != samples(distot.Pairs(run, 100))
    with pytest.raises(StoreError, match="has gone on since this solution was found"):
        Found(Load(run), pairs.coupling.solution.facts, False)()
    run.rename(tmp_path / "moved.zarr")
    assert samples(copy.copy(pairs)) == before
    with pytest.raises(StoreError, match="does not exist"):
        samples(pickle.loads(sent))
    copy_latents(CLOUD + 1, None, run / "latents.zarr", "others")
    with pytest.raises(StoreError, match="fingerprint differs"):
        samples(pickle.loads(sent))


def test_latents_that_were_given_go_along(place: Path, tmp_path: Path) -> None:
    """The place that replaces one that is gone; an array, where there is no place."""
    ingest(place / "run.zarr" / "latents.zarr", tmp_path / "y.zarr")
    distot.solve(tmp_path / "y.zarr", run=tmp_path / "run.zarr", **OPTIONS)
    (tmp_path / "y.zarr").rename(tmp_path / "moved.zarr")
    expected = samples(distot.Pairs(place / "run.zarr", 100))
    for latents in (tmp_path / "moved.zarr", CLOUD):
        pairs = distot.Pairs(distot.load(tmp_path / "run.zarr", latents=latents), 100)
        assert samples(pickle.loads(pickle.dumps(pairs))) == samples(pairs) == expected


def normal(generator: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
    return generator.standard_normal((count, 4))


@pytest.mark.parametrize("source", ["gaussian", normal])
def test_a_solution_in_memory_goes_into_other_processes(source: Any, tmp_path: Path) -> None:
    found = distot.solve(CLOUD, source, **OPTIONS)
    x = torch.randn(50, 4)
    for twin in (pickle.loads(pickle.dumps(found)), pickle.loads(pickle.dumps(found.slim())), copy.deepcopy(found)):
        assert np.array_equal(twin.assign(x), found.assign(x))
        assert np.array_equal(twin.heights, found.heights)
        assert twin.certificate == found.certificate
    given = None if source == "gaussian" else normal
    states = [
        distot.load(its.save(tmp_path / name), source=given).held.progress.state
        for name, its in (("a.zarr", found), ("b.zarr", pickle.loads(pickle.dumps(found))))
    ]
    assert states[0].samples == states[1].samples
    assert all(torch.equal(a, b) for a, b in zip(states[0].pairs, states[1].pairs, strict=True))
    with pytest.raises(InputError, match="with heights alone"):
        pickle.loads(pickle.dumps(found.slim())).save(tmp_path / "c.zarr")
    sampler = pickle.loads(pickle.dumps(distot.PlanSampler(found)))
    assert np.array_equal(sampler.sample_plan(x)[1], found.map(x))
    with pytest.raises(InputError, match="hand on the solution"):
        pickle.dumps(found.generator(distot.Mixing()))


def test_a_function_without_a_name() -> None:
    source = Sampler(lambda generator, count: generator.standard_normal((count, 4)), 4)
    with pytest.raises(InputError, match="define it at the top of a module"):
        pickle.dumps(source)
    assert cloudpickle.loads(cloudpickle.dumps(source)).dim == 4
    assert copy.deepcopy(source) is source


def test_classes_in_memory(place: Path) -> None:
    found = distot.load_classes(place / "classes")
    twin = pickle.loads(pickle.dumps(found))
    assert twin.labels == [0, 1, 2]
    assert np.array_equal(twin[1].heights, found[1].heights)
    kept = distot.solve_classes(CLOUD[:60], LABELS[:60], **OPTIONS)
    with pytest.raises(InputError, match=r"keep it \(solve_classes"):
        pickle.dumps(distot.ClassPairs(kept))


def test_other_pairs_in_the_place_of_those(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.zarr"
    distot.write_pairs(place / "run.zarr", out, 300)
    sent = pickle.dumps(distot.PairFile(out, None, 20))
    out.rename(tmp_path / "old.zarr")
    distot.write_pairs(place / "run.zarr", out, 300, epoch=1)
    with pytest.raises(StoreError, match="holds other pairs than when this loader was made"):
        whole(pickle.loads(sent))


def test_pairs_are_known_by_all_that_decides_them(tmp_path: Path) -> None:
    """Heights that are equal are not enough: also masses of equal latents, and how many latents share a sample."""
    repeated, heights = np.concatenate([CLOUD[:50], CLOUD[:50]]), np.zeros(50)
    options: dict[str, Any] = {"until_chi2": None, "max_samples": 1, "progress": False}
    with pytest.warns(DistotWarning, match="repeat"):
        one, other = (
            distot.solve(repeated, mass=np.repeat(m, 50) / 50, init=np.tile(heights, 2), **options)
            for m in ([0.5, 0.5], [0.3, 0.7])
        )
    assert torch.equal(one.held.progress.state.average, other.held.progress.state.average)
    distot.write_pairs(one, tmp_path / "mass.zarr", 100)
    with pytest.raises(InputError, match="begun with masses"):
        distot.write_pairs(other, tmp_path / "mass.zarr", 100)
    few, many = (distot.solve(CLOUD[:50], epsilon=0.3, top_k=k, init=heights, **options) for k in (4, 8))
    distot.write_pairs(few, tmp_path / "soft.zarr", 100)
    with pytest.raises(InputError, match="begun with top_k = 4, and not 8"):
        distot.write_pairs(many, tmp_path / "soft.zarr", 100)


def test_noise_of_another_callable_is_not_that_of_the_file(tmp_path: Path) -> None:
    distot.write_pairs(distot.solve(CLOUD, normal, **OPTIONS), tmp_path / "pairs.zarr", 300)

    def other(generator: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
        return 2 * normal(generator, count)

    other.__qualname__ = normal.__qualname__
    with pytest.raises(InputError, match="draws from another source"):
        distot.PairFile(tmp_path / "pairs.zarr", source=other)


def test_the_default_dtype_of_torch_has_no_say(place: Path) -> None:
    expected = [whole(KINDS[kind](place)) for kind in ("balanced", "ClassPairs")]
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            got = [whole(KINDS[kind](place)) for kind in ("balanced", "ClassPairs")]
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_no_room_for_what_workers_share(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared numbers need no /dev/shm, and are missed in a sentence where there is no memory."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("torch.Tensor.share_memory_", full)
    assert len(whole(KINDS["balanced"](place))[0]) == 300
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InputError, match=r"no room for .* bytes that the workers of a loader share"):
        KINDS["balanced"](place)


# -------------------------------------------------------------------------------------- epochs


@pytest.mark.parametrize(
    ("kind", "start", "persistent"),
    [
        *((kind, start, False) for kind in KINDS for start in (None, "fork")),
        *((kind, "fork", True) for kind in ("Pairs", "balanced")),
        *(("balanced", "forkserver", persistent) for persistent in (False, True)),
    ],
)
def test_every_iteration_is_an_epoch(place: Path, kind: str, start: str | None, persistent: bool) -> None:
    """Whoever iterates, whether it came to its end or not; also where somebody seeds torch anew each time."""
    loader = KINDS[kind](place)
    many = DataLoader(
        loader,
        batch_size=None,
        num_workers=2 if start else 0,
        multiprocessing_context=start,
        persistent_workers=persistent,
    )

    def order(its: Any) -> bytes:  # of workers' batches
        return samples(its) if kind != "PairFile" else b"".join(sorted(b[0].numpy().tobytes() for b in its))

    def epoch(number: int) -> bytes:
        fresh = KINDS[kind](place, epoch=number)
        return order(DataLoader(fresh, batch_size=None, num_workers=2 if start else 0))

    for number in range(2):
        torch.manual_seed(0)
        assert order(many) == epoch(number)
    next(iter(many))  # epoch 2, which is left early
    assert loader.epoch == 3
    assert order(many) == epoch(3)
    loader.set_epoch(1)
    assert order(many) == epoch(1)
    assert order(many) == epoch(2)


def test_iterations_side_by_side(place: Path) -> None:
    """They have epochs of their own, in which their workers agree; of balanced ones there is one at a time."""
    both = DataLoader(KINDS["Pairs"](place), batch_size=None, num_workers=2)
    first, second = (list(its) for its in zip(*zip(both, both, strict=True), strict=True))
    expected = {samples(KINDS["Pairs"](place, epoch=number)) for number in range(2)}
    assert {samples(first), samples(second)} == expected
    balanced = KINDS["balanced"](place, epoch=0)
    left = iter(balanced)
    next(iter(balanced))
    with pytest.raises(InputError, match="one epoch at a time, and epoch 0 has given way"):
        next(left)


def test_an_endless_loader_never_comes_back(place: Path) -> None:
    pairs = distot.Pairs(place / "run.zarr", 100, samples=200, endless=True)
    seen = []
    for _ in range(2):
        seen += [batch[0] for _, batch in zip(range(6), pairs, strict=False)]
    assert len(torch.unique(torch.cat(seen), dim=0)) == 1200
    assert pairs.epoch % 2**32 == 0


def test_set_epoch_keeps_where_to_begin(place: Path) -> None:
    def loader(**more: Any) -> distot.Pairs:
        return distot.Pairs(place / "run.zarr", 20, samples=300, **more)

    rest = list(loader(epoch=2))[4:]
    resumed, loaded = loader(epoch=2, start=4), loader()
    loaded.load_state_dict({"epoch": 2, "batch": 4, "part": 0})
    for pairs in (resumed, loaded):
        pairs.set_epoch(2)
        assert same(pairs, rest)
        pairs.set_epoch(2)
        assert len(list(pairs)) == 15


def test_a_state_is_of_so_many_workers_and_ranks(place: Path, impatient: None) -> None:
    """Others have the samples in another order, and would repeat some and miss some."""
    pairs = KINDS["Pairs"](place)
    done = [batch for _, batch in zip(range(5), pairs, strict=False)]
    other = KINDS["Pairs"](place, epoch=9)
    other.load_state_dict(pairs.state_dict())
    with pytest.raises(InputError, match="state of one without workers, and 2 workers"):
        list(DataLoader(copy.copy(other), batch_size=None, num_workers=2))
    rest = list(DataLoader(copy.copy(other), batch_size=None, num_workers=1))
    assert len(done) + len(rest) == 15
    assert len(torch.unique(torch.cat([b[0] for b in done + rest]), dim=0)) == 300
    with pytest.raises(InputError, match="this state is of 2 workers, and there are 1 now"):
        other.load_state_dict({"epoch": 0, "batch": 1, "part": 1, "workers": 2})
    with pytest.raises(InputError, match="has 99 batches behind it"):
        other.load_state_dict({"epoch": 0, "batch": 99, "part": 0})
    two = KINDS["Pairs"](place, rank=0, world=3)
    with pytest.raises(InputError, match="this state is of 3 ranks, and there are 1 now"):
        other.load_state_dict(two.state_dict())


# -------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(("count", "batch", "world"), [(1000, 256, 3), (1050, 100, 2), (300, 20, 4)])
@pytest.mark.parametrize("balanced", [False, True])
def test_ranks_have_equally_many_batches(place: Path, count: int, batch: int, world: int, balanced: bool) -> None:
    """What is left out is said; what is handed out is balanced, for all that the ranks have together."""
    used = count // (batch * world) * batch * world
    with pytest.warns(DistotWarning, match=rf"{count - used:,} of {count:,} samples are left out .* samples={used} or"):
        ranks = [
            distot.Pairs(place / "run.zarr", batch, samples=count, rank=r, world=world, balance=balanced)
            for r in range(world)
        ]
    assert [len(its) for its in ranks] == [count // (batch * world)] * world
    index = torch.cat([whole(its)[2] for its in ranks])
    assert len(index) == used
    if balanced:
        assert np.ptp(np.bincount(index, minlength=300)) <= 1
    for_all = distot.Pairs(place / "run.zarr", batch, samples=used, balance=balanced)
    assert torch.equal(index.sort()[0], whole(for_all)[2].sort()[0])
    with_workers = DataLoader(copy.copy(ranks[1]), batch_size=None, num_workers=2)
    ranks[1].set_epoch(0)
    with_workers.dataset.set_epoch(0)  # type: ignore[attr-defined]
    assert samples(with_workers) == samples(ranks[1])


def test_classes_among_ranks_have_their_shares(place: Path) -> None:
    with pytest.warns(DistotWarning, match="100 of 1,000 samples are left out"):
        ranks = [distot.ClassPairs(place / "classes", 100, samples=1000, rank=r, world=3) for r in range(3)]
    assert np.bincount(torch.cat([whole(its)[3] for its in ranks])).tolist() == [300, 300, 300]


def test_nothing_is_left_out_without_a_need(place: Path) -> None:
    """With one rank, or if all comes out even: no warning, which is an error in these tests."""
    assert len(distot.Pairs(place / "run.zarr", 256, samples=1000)) == 4
    assert len(distot.Pairs(place / "run.zarr", 50, samples=300, rank=0, world=2)) == 3


def test_ranks_of_a_file_that_is_being_written(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distot.store.rows.LEAST_BYTES", 8 * 8192)

    def stop(done: int, total: int) -> None:
        if done > 10_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distot.write_pairs(place / "run.zarr", tmp_path / "pairs.zarr", 20_000, on_rows=stop)
    assert len(distot.PairFile(tmp_path / "pairs.zarr", batch=8192, partial=True)) == 2
    with pytest.warns(DistotWarning, match="ranks may find different numbers"):
        distot.PairFile(tmp_path / "pairs.zarr", batch=4096, partial=True, rank=0, world=2)


@pytest.mark.parametrize("more", [{"rank": 1, "world": 3}, {"drop_last": True}, {"rank": 0, "world": 2}])
def test_fewer_samples_than_a_round_of_batches(place: Path, more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"has no batch of 200.*give samples=\d+ or more, or a smaller batch"):
        distot.Pairs(place / "run.zarr", 200, samples=150, **more)


def test_a_process_group_that_begins_later(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is heard of before the first batch; later it is said; the place of another rank is nobody else's."""
    early, used = (distot.Pairs(place / "run.zarr", 50, samples=300) for _ in range(2))
    assert len(used) == 6
    sent = pickle.dumps(early)
    in_group(monkeypatch, 1, 2)
    mine = samples(distot.Pairs(place / "run.zarr", 50, samples=300))
    forked = DataLoader(pickle.loads(sent), batch_size=None, num_workers=2)
    assert samples(forked) == samples(early) == samples(pickle.loads(sent)) == mine
    with pytest.warns(DistotWarning, match="share 1 of 2 of the batches, where it handed out all"):
        assert samples(used) == mine
    sent = pickle.dumps(early)
    in_group(monkeypatch, 0, 2)
    for loader in (early, pickle.loads(sent)):
        with pytest.raises(InputError, match="made by rank 1 of 2, and this is rank 0 of 2"):
            next(iter(loader))


def test_a_launcher_without_a_process_group(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(DistotWarning, match="RANK=1 and WORLD_SIZE=2 are set, but .* every process has all batches"):
        assert len(distot.Pairs(place / "run.zarr", 50, samples=300)) == 6
    assert len(distot.Pairs(place / "run.zarr", 50, samples=300, rank=1, world=2)) == 3


PREPARED = """
from torch.utils.data import DataLoader, IterableDataset

class IterableDatasetShard(IterableDataset):
    num_processes = 2
    def __init__(self, dataset):
        self.dataset = dataset
    def __iter__(self):
        yield from (x for number, x in enumerate(self.dataset) if number % 2 == 0)

class DataLoaderDispatcher:
    def __init__(self, loader, state):
        self.loader, self.state = loader, state
    def __iter__(self):
        yield from self.loader
"""


@pytest.fixture
def accelerate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The two classes of accelerate that deal batches out, as far as a loader sees them."""
    module = types.ModuleType("accelerate.data_loader")
    exec(PREPARED, module.__dict__)
    monkeypatch.setitem(sys.modules, "accelerate.data_loader", module)
    return module


class Inside(IterableDataset[Any]):
    """A user's own data set around a loader."""

    def __init__(self, pairs: Loader) -> None:
        self.pairs = pairs

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pairs)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("around", [lambda its: its, Inside])
def test_batches_are_not_dealt_out_twice(
    place: Path, accelerate: Any, impatient: None, workers: int, around: Any
) -> None:
    """accelerate shares all iterable data sets out among its processes: ranks of a loader would lose most of theirs."""

    def prepared(loader: Loader) -> Iterator[Any]:
        state = types.SimpleNamespace(num_processes=2)
        own = around(loader)
        yield accelerate.DataLoaderDispatcher(DataLoader(own, batch_size=None, num_workers=workers), state)
        yield DataLoader(accelerate.IterableDatasetShard(own), batch_size=None, num_workers=workers)

    for its in prepared(distot.Pairs(place / "run.zarr", 50, samples=300, rank=0, world=2)):
        with pytest.raises(InputError, match=r"accelerate deals them out among 2 processes once more.*rank=0, world=1"):
            list(its)
    for its in prepared(distot.Pairs(place / "run.zarr", 50, samples=300, rank=0, world=1)):
        assert list(its)


# -------------------------------------------------------------------------------------- in the place of torchcfm's


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat"] * 300, "not <U3; np.unique"),
        ([None] * 300, "labels must be numbers"),
        ([1, None] * 150, "labels must be numbers"),
        ([[1], [1, 2]] * 150, "labels"),
        (np.zeros((300, 77)), r"shape \(300,\)"),
        (np.zeros(299), r"shape \(300,\)"),
        (np.where(LABELS, 1.0, np.nan), "100 labels are NaN"),
        (np.array(["2020-01-01"] * 300, "datetime64[D]"), "labels must be numbers"),
    ],
)
def test_labels_of_a_plan_sampler(place: Path, labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        distot.PlanSampler(place / "run.zarr", labels=labels)


@pytest.mark.parametrize("text", [False, True])
def test_noise_does_not_tell_the_label(text: bool) -> None:
    """By the map of a class noise has the law of the source within each label; by one map for all it has not."""
    latents = CLOUD + 4 * np.eye(4, dtype=np.float32)[LABELS]
    names: Any = np.array(["a", "b/c", "d"]) if text else np.array([3, 7, 8])
    classes = distot.solve_classes(latents, names[LABELS], **OPTIONS)
    x0, y0 = torch.randn(3000, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(3000)
    number = torch.arange(3000) % 3
    y1: Any = names[number] if text else torch.from_numpy(names)[number]
    sampler = pickle.loads(pickle.dumps(distot.PlanSampler(classes)))
    same_x0, latent, same_y0, same_y1 = sampler.sample_plan_with_labels(x0, torch.zeros_like(x0), y0, y1)
    assert same_x0 is x0
    assert same_y0 is y0
    assert same_y1 is y1
    for place, name in enumerate(names.tolist()):
        own = (number == place).numpy()
        assert np.array_equal(latent[own].flatten(1), classes[name].map(x0[own].flatten(1)))
        assert torch.equal(x0[own].flatten(1).mean(0).abs() < 5 / 1000**0.5, torch.ones(4, dtype=torch.bool))
    if text:
        assert torch.equal(sampler.sample_plan_with_labels(x0, y1=number)[1], latent)
    guess = _guessed(x0, number)
    with pytest.warns(DistotWarning, match="pairs noise with labels"):
        one = distot.PlanSampler(distot.solve(latents, **OPTIONS), labels=LABELS)
    leaks = _guessed(x0, one.sample_plan_with_labels(x0)[3])
    assert guess < 0.4 < 0.7 < leaks  # chance is a third
    with pytest.raises(InputError, match="call sample_plan_with_labels"):
        sampler.sample_plan(x0)
    with pytest.raises(InputError, match="give y1"):
        sampler.sample_plan_with_labels(x0)
    with pytest.raises(InputError, match="no class has the label 99"):
        sampler.sample_plan_with_labels(x0[:2], y1=[99, 0 if text else 3])
    with pytest.raises(InputError, match=r"y1 must have shape \(2,\)"):
        sampler.sample_plan_with_labels(x0[:2], y1=[0])
    with pytest.raises(InputError, match="leave labels out"):
        distot.PlanSampler(classes, labels=LABELS)


def _guessed(x0: Tensor, label: Any) -> float:
    """How often the nearest mean of noise by label, of the other half, says the label."""
    x, half = x0.flatten(1), len(x0) // 2
    label = torch.as_tensor(label)
    means = torch.stack([x[:half][label[:half] == name].mean(0) for name in range(3)])
    return float((torch.cdist(x[half:], means).argmin(1) == label[half:]).double().mean())
