"""Folders from elsewhere: nothing in them is run, nothing outside of them is written, deleted or read, and what is
damaged is one sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numcodecs.pickles
import numpy as np
import pytest
import zarr
from filelock import FileLock
from rich.text import Text

import distot
from distot.certify import Certificate
from distot.errors import DistotError, DistotWarning, InputError, StoreError
from distot.ingest import ingest
from distot.inspect import describe
from distot.progress import Screen
from distot.schedule import Check, Options
from distot.store import Run, copy_latents, new_file, new_latents, open_latents, read_npy
from distot.store import places as places_module
from distot.store.forms import digest_of, sealed
from distot.store.log import EVENTS
from distot.store.runs import LOOK

Z = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
NOISE = np.random.default_rng(1).standard_normal((20, 3))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, two checkpoints in it, and statistics of cells, and its latents beside it."""
    folder = tmp_path_factory.mktemp("made")
    copy_latents(Z, None, folder / "z.zarr", "drawn for a test")
    budget: dict[str, Any] = {"until_chi2": None, "certificate_samples": 200, "progress": False}
    distot.solve(folder / "z.zarr", run=folder / "run.zarr", max_samples=1000, **budget)
    distot.resume(folder / "run.zarr", max_samples=2000, progress=False)
    distot.generate_file(folder / "run.zarr", folder / "new.zarr", 10)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "run.zarr", tmp_path / "run.zarr")
    shutil.copytree(made / "z.zarr", tmp_path / "z.zarr")
    return tmp_path / "run.zarr"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What is dear to the user, and its state, which no test may change."""
    folder = tmp_path / "outside"
    for name in ("photos/a.jpg", "thesis/chapter.tex", "step-000000001-0123abcd/data.bin"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(name)
    return folder


def state(folder: Path) -> dict[str, Any]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def verbs(run: Path, out: Path) -> dict[str, Callable[[], Any]]:
    return {
        "inspect": lambda: describe(run),
        "report": lambda: distot.report(run, out / "page.html"),
        "load": lambda: distot.load(run).heights,
        "certify": lambda: distot.certify(run, samples=100),
        "resume": lambda: distot.resume(run, max_samples=2500, progress=False),
        "generate": lambda: distot.generate_file(run, out / "new.zarr", 10),
        "assign": lambda: distot.assign_file(run, NOISE, out / "index.npy"),
        "pairs": lambda: distot.Pairs(run, 10, samples=20),
    }


def refused(run: Path, out: Path, *but: str) -> list[str]:
    """What all verbs say of a run; each refuses it, or is among ``but``."""
    said = []
    for name, verb in verbs(run, out).items():
        if (error := failure(verb)) is None:
            assert name in but, name
        else:
            said.append(error)
    return said


def failure(call: Callable[[], Any]) -> str | None:
    """The sentence in which a call ends; None if it is done. Anything else that is raised fails the test."""
    try:
        call()
    except DistotError as error:
        return str(error)
    return None


# ------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize(
    "name",
    [
        "anything",
        "checkpoints",
        "cells",
        "LATEST",
        "LATEST_CELLS",
        "log.jsonl",
        "owner.json",
        ".lock",
        "certificate.json",
        "config.json",
        "latents.zarr",
        "source-mean",
    ],
)
def test_links_in_a_run_are_not_followed(run: Path, outside: Path, tmp_path: Path, name: str) -> None:
    target = outside / "file"
    if (run / name).is_dir():
        shutil.rmtree(run / name)
        target = outside
    elif (run / name).exists():
        (run / name).rename(target)
    (run / name).symlink_to(target)
    before = state(outside)
    said = refused(run, tmp_path)
    assert all("is a symbolic link" in text for text in said)
    assert state(outside) == before


@pytest.mark.parametrize("name", ["", "MANIFEST.json", "part-00000", "part-00000/average", "part-00000/average/c/0"])
def test_links_in_a_checkpoint_are_not_followed(run: Path, outside: Path, tmp_path: Path, name: str) -> None:
    newest = Run(run).checkpoints.committed()[0]
    assert isinstance(newest, Path)
    there = newest / name
    there.rename(outside / "taken")
    there.symlink_to(outside / "taken")
    before = state(outside)
    assert "symbolic link" in describe(run)["damage"]
    with pytest.warns(DistotWarning) as told:  # goes on from the one before, and drops old ones
        distot.resume(run, max_samples=8000, progress=False)
    assert any("symbolic link" in str(its.message) for its in told)
    assert state(outside) == before
    assert os.readlink(there) if there.is_symlink() else True


def test_a_log_with_another_name_is_copied_before_it_grows(run: Path, tmp_path: Path) -> None:
    """A backup by hard links shares its files with the run, and somebody's run may share any."""
    (tmp_path / "backup").hardlink_to(run / "log.jsonl")
    before = (tmp_path / "backup").read_bytes()
    distot.resume(run, max_samples=2500, progress=False)
    assert (tmp_path / "backup").read_bytes() == before
    assert (run / "log.jsonl").read_bytes().startswith(before)
    assert len(Run(run).records()) > before.count(b"\n")


def test_debris_is_what_is_named_like_it(run: Path, tmp_path: Path) -> None:
    kept = [
        run / "checkpoints/photos/a.jpg",
        run / "checkpoints/step-1/a",
        run / "checkpoints/README",
        run / ".x.partial",
    ]
    gone = [run / "checkpoints/step-000000001-0123abcd/part-00000/a", run / ".LATEST.0123abcd.partial"]
    for file in kept + gone:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    distot.certify(run, samples=100)
    assert all(file.exists() for file in kept)
    assert not any(file.exists() for file in gone)


def test_rows_are_not_written_through_a_link(run: Path, outside: Path, tmp_path: Path) -> None:
    from distot.store import new_rows

    rows = {"z": np.zeros((8, 2))}
    with pytest.raises(KeyboardInterrupt), new_rows(tmp_path / "r.zarr", 8, {"z": ("float64", 2)}, {}):
        raise KeyboardInterrupt
    (tmp_path / "r.zarr/z/c").symlink_to(outside)
    before = state(outside)
    with (
        pytest.raises(StoreError, match="symbolic link"),
        new_rows(tmp_path / "r.zarr", 8, {"z": ("float64", 2)}, {}) as out,
    ):
        out.write(rows)
    assert state(outside) == before


@pytest.mark.parametrize("how", ["the run", "the folder of both", "both apart", "latents", "relative"])
def test_a_run_behind_links_finds_its_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, made: Path
) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    copy_latents(Z, None, tmp_path / "deep/z.zarr", "drawn for a test")
    (tmp_path / "short").symlink_to("deep/er")
    (tmp_path / "data").symlink_to(tmp_path / "deep")
    (tmp_path / "z.zarr").symlink_to("deep/z.zarr")
    latents, run = {
        "the run": (tmp_path / "deep/z.zarr", tmp_path / "short/r.zarr"),
        "the folder of both": (tmp_path / "data/z.zarr", tmp_path / "data/r.zarr"),
        "both apart": (tmp_path / "data/z.zarr", tmp_path / "short/r.zarr"),
        "latents": (tmp_path / "z.zarr", tmp_path / "disk/r.zarr"),
        "relative": (Path("../data/z.zarr"), Path("../short/r.zarr")),
    }[how]
    monkeypatch.chdir(tmp_path / "disk")
    distot.solve(latents, run=run, max_samples=200, until_chi2=None, certificate_samples=100, progress=False)
    expected = distot.load(run).heights
    (tmp_path / "again").symlink_to(run.resolve())
    real = run.resolve()
    monkeypatch.chdir(tmp_path)
    for path in (real, Path("again"), tmp_path / "again"):
        assert np.array_equal(distot.load(path).heights, expected)
    distot.resume("again", max_samples=400, progress=False)


def test_a_run_that_was_moved_behind_a_link_finds_the_latents_beside_the_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "big/disk").mkdir(parents=True)
    run.rename(tmp_path / "big/disk/run.zarr")
    run.symlink_to(tmp_path / "big/disk/run.zarr")
    assert distot.load(run).facts.shape == Z.shape


# ------------------------------------------------------------------------------- what manifests and configs name


def resealed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(file.read_text())
    del record["sha256"]
    change(record)
    file.write_text(json.dumps(sealed(record)))


def manifests(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/*/MANIFEST.json"))


def each_manifest(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    for file in manifests(run):
        resealed(file, change)


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../../../secret", "part-00000/../../../../secret", "part-00000/pipe", "secret"]
)
def test_manifests_name_files_of_their_checkpoint_alone(run: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for file in manifests(run):
        os.mkfifo(file.parent / "part-00000/pipe")
    its = {"bytes": 6, "sha256": "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"}
    each_manifest(run, lambda manifest: manifest["parts"][0]["files"].update({name: its}))
    assert all("is damaged" in text for text in refused(run, tmp_path, "report"))


@pytest.mark.parametrize(
    "change", [{"name": ".."}, {"name": "/tmp"}, {"first": 1}, {"count": 10**15}, {"arrays": ["../x"]}]
)
def test_parts_of_a_manifest_are_checked(run: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    each_manifest(run, lambda manifest: manifest["parts"][0].update(change))
    assert all("is damaged" in text for text in refused(run, tmp_path, "report"))


def test_a_large_file_is_not_hashed(run: Path, tmp_path: Path) -> None:
    for file in manifests(run):
        with (file.parent / "part-00000/average/c/0").open("wb") as stream:
            stream.truncate(1 << 42)  # a hole, but hours to read
    assert all("fails its checksum" in text for text in refused(run, tmp_path, "report"))


ODD: list[Any] = [
    None,
    -1,
    10**30,
    1e308,
    float("nan"),
    "",
    "x",
    "../..",
    [],
    {},
    [1],
    {"a": 1},
    True,
    0.5,
    [[[]]],
    "a\x00b",
]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from leaves(value[name], (*path, name))


def mutated(value: Any, rng: random.Random) -> Any:
    value = json.loads(json.dumps(value))
    at, (*path, last) = value, rng.choice(list(leaves(value)))
    for name in path:
        at = at[name]
    if rng.random() < 0.25:
        del at[last]
    else:
        at[last] = json.loads(json.dumps(rng.choice(ODD)))
    return value


def survives(*calls: Callable[[], Any]) -> None:
    """Each call is done, or ends in one sentence."""
    for call in calls:
        assert "\n" not in (failure(call) or "")


def test_any_configuration_is_read_or_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    rng, file = random.Random(0), run / "config.json"
    config = json.loads(file.read_text())
    del config["sha256"]
    out = tmp_path / "page.html"
    for trial in range(120):
        file.write_text(json.dumps(changed := mutated(config, rng)))
        survives(lambda: describe(run), lambda: distot.load(run), lambda: distot.report(run, out, detail=False))
        if trial % 10 == 0:
            file.write_text(json.dumps(sealed(changed)))
            survives(lambda: distot.certify(run, samples=50))


def test_no_flipped_bit_of_a_configuration_changes_it(run: Path) -> None:
    file = run / "config.json"
    whole, config = file.read_bytes(), Run(run).config
    for bit in range(0, 8 * len(whole), 5):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        if failure(partial(Run, run)) is None:
            assert Run(run).config == config


def test_configurations_of_older_versions_have_no_checksum(run: Path) -> None:
    file = run / "config.json"
    config = json.loads(file.read_text())
    for name in ("sha256", "folder", "masses"):
        config.pop(name)
    for name in ("memory", "exact", "cost", "recall"):
        config["options"].pop(name)
    file.write_text(json.dumps(config))
    assert distot.resume(run, max_samples=2500, progress=False).reason == "max_samples"
    assert "sha256" in json.loads(file.read_text())  # it has one now


@pytest.mark.parametrize("where", ["", "options"])
def test_what_a_newer_version_has_written_is_said(run: Path, where: str) -> None:
    def newer(config: dict[str, Any]) -> None:
        (config[where] if where else config)["novelty"] = 1

    resealed(run / "config.json", newer)
    with pytest.raises(StoreError, match=r"config\.json has 'novelty', which this version of distot does not know"):
        distot.load(run)


def test_any_manifest_is_read_or_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    rng, file = random.Random(1), manifests(run)[-1]
    manifest = json.loads(file.read_text())
    del manifest["sha256"]
    shutil.rmtree(manifests(run)[0].parent)
    out = tmp_path / "page.html"
    for trial in range(120):
        changed = mutated(manifest, rng)
        if rng.random() < 0.7:
            changed = manifest | {"scalars": mutated(manifest["scalars"], rng)}
        file.write_text(json.dumps(sealed(changed)))
        survives(lambda: describe(run), lambda: distot.load(run))
        if trial % 6 == 0:  # a report reads what the others do, and takes longer
            survives(lambda: distot.report(run, out, detail=False))


def test_any_certificate_and_log_is_read_or_told(run: Path, tmp_path: Path) -> None:
    rng, file, log = random.Random(2), run / "certificate.json", run / "log.jsonl"
    certificate, lines = json.loads(file.read_text()), log.read_text().splitlines()
    out = tmp_path / "page.html"
    for _ in range(80):
        file.write_text(json.dumps(mutated(certificate, rng)))
        changed = list(lines)
        for _ in range(2):
            number = rng.randrange(len(lines))
            changed[number] = json.dumps(mutated(json.loads(lines[number]), rng))
        log.write_text("\n".join(changed) + "\n")
        survives(lambda: describe(run), lambda: distot.load(run))
        distot.report(run, out, detail=False)


@pytest.mark.parametrize(
    "text", ["{", "[]", "7", '{"pid": {"a": 1}}', "[" * 100_000, "\xff", '{"host": 5, "pid": "x"}']
)
def test_a_damaged_owner_is_unknown(run: Path, text: str) -> None:
    with FileLock(run / ".lock", is_singleton=False):
        (run / "owner.json").write_text(text)
        with pytest.raises(StoreError, match="is being written by process unknown on host unknown"):
            distot.certify(run, samples=50)


def test_forms_know_all_fields() -> None:
    looks = {field.name for field in dataclasses.fields(Check)}
    assert set(LOOK) == looks
    assert set(EVENTS["check"]) == looks | {"seconds"}
    assert set(EVENTS["certificate"]) <= {field.name for field in dataclasses.fields(Certificate)}


def test_options_are_checked_by_name_and_type(run: Path) -> None:
    for field in dataclasses.fields(Options):
        values: list[Any] = [[], {}, 5 if field.name == "device" else "x"]
        for value in values:

            def change(config: dict[str, Any], name: str = field.name, value: Any = value) -> None:
                config["options"][name] = value

            kept = (run / "config.json").read_bytes()
            resealed(run / "config.json", change)
            with pytest.raises(StoreError, match=r"config\.json is damaged"):
                describe(run)
            (run / "config.json").write_bytes(kept)


@pytest.mark.parametrize("name", ["mean", "cov"])
def test_a_source_that_lacks_an_array_is_damaged(run: Path, name: str) -> None:
    """Without its covariance a Gaussian would be the standard one, and the run that of another source."""
    resealed(run / "config.json", lambda config: config["source_arrays"].remove(name))
    with pytest.raises(StoreError, match=f"the source of .* is damaged .it lacks its {name}.; this run cannot"):
        distot.load(run)


@pytest.mark.parametrize("name", ["mass", "init"])
def test_an_array_that_is_missing_is_no_advice_to_ingest(run: Path, name: str) -> None:
    resealed(run / "config.json", lambda config: config.update({name: True}))
    with pytest.raises(StoreError, match=f"{name} is missing; this run cannot be continued"):
        distot.load(run)


def test_values_that_no_run_can_have_are_refused(run: Path) -> None:
    """A manifest may list any files with their hashes; what they hold is looked at, too."""
    for file in manifests(run):
        array = zarr.open_array(file.parent / "part-00000/average", mode="r+")
        array[0] = np.nan
        chunk = file.parent / "part-00000/average/c/0"

        def change(manifest: dict[str, Any], chunk: Path = chunk) -> None:
            entry = manifest["parts"][0]["files"]["part-00000/average/c/0"]
            entry.update(bytes=chunk.stat().st_size, sha256=hashlib.sha256(chunk.read_bytes()).hexdigest())

        resealed(file, change)
    with pytest.raises(StoreError, match="it has no finite heights of 60 atoms"):
        distot.load(run)


# --------------------------------------------------------------------------------- latents in another place


def elsewhere(config: dict[str, Any]) -> None:
    config["latents"] = "s3://somebody/latents.zarr"


def test_a_run_from_elsewhere_asks_no_object_store(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_module, "_bucket", lambda *_: pytest.fail("a request was about to be sent"))
    resealed(run / "config.json", elsewhere)
    said = refused(run, tmp_path, "inspect", "report")
    assert all("--latents s3://somebody/latents.zarr" in text for text in said)


def test_a_run_in_its_own_folder_goes_to_the_object_store_it_names(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def asked(*_: object) -> None:
        raise Asked

    monkeypatch.setattr(places_module, "_bucket", asked)
    resealed(run / "config.json", lambda config: config.update(folder=run.stat().st_ino))
    resealed(run / "config.json", elsewhere)
    with pytest.raises(Asked):
        distot.load(run)
    run.rename(run.with_name("renamed.zarr"))  # is still the same folder
    with pytest.raises(Asked):
        distot.load(run.with_name("renamed.zarr"))


@pytest.mark.parametrize("place", ["s3://", "ftp://x/y", "a\x00b", "s3://key:secret@bucket/x"])
def test_places_that_are_none(run: Path, place: str) -> None:
    resealed(run / "config.json", lambda config: config.update(latents=place))
    with pytest.raises(StoreError) as caught:
        distot.load(run)
    assert "secret" not in str(caught.value)


# ------------------------------------------------------------------------------------- checkpoints that are lost


def test_a_manifest_that_is_gone_is_said_and_the_rest_kept(run: Path) -> None:
    newest = manifests(run)[-1]
    newest.unlink()
    assert f"LATEST names is incomplete: its {newest} is missing" in describe(run)["damage"]
    assert f"using the checkpoint before it, {manifests(run)[-1].parent.name}" in describe(run)["damage"]
    with pytest.warns(DistotWarning) as told:
        distot.resume(run, max_samples=4000, progress=False)
    assert any("is incomplete" in str(its.message) for its in told)
    distot.certify(run, samples=50)
    assert (newest.parent / "part-00000/average/c/0").exists()
    assert "damage" not in describe(run)


@pytest.mark.parametrize("gone", ["manifest", "all manifests", "folder", "shelf", "shelf and LATEST"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(run: Path, tmp_path: Path, gone: str) -> None:
    files = manifests(run)
    shutil.rmtree(files[0].parent)
    if "manifest" in gone:
        files[1].unlink()
    elif gone == "folder":
        shutil.rmtree(files[1].parent)
    else:
        shutil.rmtree(run / "checkpoints")
    if "LATEST" in gone:
        (run / "LATEST").unlink()
    before = state(run / "checkpoints")
    said = refused(run, tmp_path, "report")
    assert all("restore them from a copy" in text for text in said)
    assert before.items() <= state(run / "checkpoints").items()


def test_statistics_of_cells_that_are_lost_are_said(run: Path, tmp_path: Path) -> None:
    (manifest,) = run.glob("cells/*/MANIFEST.json")
    manifest.unlink()
    assert "LATEST_CELLS names is incomplete" in describe(run)["cells"]


# ------------------------------------------------------------------------------------------------ zarr


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that appears if something is unpickled, by a codec without the guard that newer versions have."""
    monkeypatch.setattr(numcodecs.pickles.Pickle, "decode", lambda self, data, out=None: pickle.loads(bytes(data)))
    yield tmp_path / "trapped"
    assert not (tmp_path / "trapped").exists()


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


OBJECTS: dict[str, Any] = {"dtype": "|O", "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "fill_value": ""}
NUMBERS: dict[str, Any] = {"dtype": "<f4", "filters": None, "fill_value": 0}


def array_2(path: Path, shape: list[int], trap: Path, about: dict[str, Any]) -> None:
    """An array of zarr 2 whose one chunk is a pickle."""
    base = {"zarr_format": 2, "shape": shape, "chunks": shape, "compressor": None, "order": "C"}
    write_json(path / ".zarray", base | {"dimension_separator": "."} | about)
    (path / ".".join("0" for _ in shape)).write_bytes(pickle.dumps(Evil(trap)))


def group_2(path: Path, **attributes: Any) -> Path:
    write_json(path / ".zgroup", {"zarr_format": 2})
    write_json(path / ".zattrs", attributes)
    return path


UNUSUAL: dict[str, dict[str, Any]] = {
    "objects": OBJECTS,
    "one filter": OBJECTS | {"filters": [{"id": "pickle"}]},
    "numbers through a filter": NUMBERS | {"filters": [{"id": "pickle"}]},
    "compressor": NUMBERS | {"compressor": {"id": "pickle"}},
    "objects by json": OBJECTS | {"filters": [{"id": "json2"}]},
    "a type in a filter": NUMBERS | {"filters": [{"id": "delta", "dtype": "|O"}]},
    "unknown codec": NUMBERS | {"compressor": {"id": "somebody's"}},
    "codec without name": NUMBERS | {"compressor": {"id": ["pickle"]}},
    "text": NUMBERS | {"dtype": "<U8"},
    "bytes": NUMBERS | {"dtype": "|S8"},
    "structured": NUMBERS | {"dtype": [["a", "<f4"], ["b", "|O"]]},
    "dates": NUMBERS | {"dtype": "<M8[s]"},
    "no shape": NUMBERS | {"shape": "x"},
    "filters are no list": NUMBERS | {"filters": {"id": "pickle"}},
}


@pytest.mark.parametrize("about", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_zarr_2_that_is_not_of_numbers_is_refused(tmp_path: Path, trap: Path, about: dict[str, Any]) -> None:
    array_2(tmp_path / "a.zarr", [20, 3], trap, about)
    array_2(group_2(tmp_path / "g.zarr") / "z", [20, 3], trap, about)
    calls = describe, lambda place: ingest(place, tmp_path / "out.zarr"), lambda place: open_latents(place)[:]
    for path in ("a.zarr", "g.zarr"):
        for call in calls:
            with pytest.raises(StoreError, match="which distot does not read; save the array as numbers"):
                call(tmp_path / path)
    with pytest.raises(StoreError, match="does not read"):
        open_latents(tmp_path / "g.zarr", "z")


def test_what_lies_beside_latents_is_not_looked_into(tmp_path: Path, trap: Path) -> None:
    """As a table of names, which is an array of objects, does in many stores."""
    folder = group_2(tmp_path / "g.zarr")
    array_2(folder / "names", [20], trap, OBJECTS)
    array_2(group_2(folder / "deeper") / "names", [20, 2], trap, OBJECTS)
    zarr.create_array(folder / "z", shape=(60, 3), dtype="f4", chunks=(20, 3), zarr_format=2)[:] = Z
    names = {name: json.loads((folder / name / ".zarray").read_text()) for name in ("names", "z")}
    metadata = {".zgroup": {"zarr_format": 2}} | {f"{name}/.zarray": its for name, its in names.items()}
    write_json(folder / ".zmetadata", {"zarr_consolidated_format": 1, "metadata": metadata})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(open_latents(folder, "z")[:], Z)
        ingest(folder, tmp_path / "out.zarr", key="z")
    with pytest.raises(DistotError):
        open_latents(folder, "names")


def test_masses_of_objects_in_a_store_that_seems_to_be_ours(tmp_path: Path, trap: Path) -> None:
    about = {"format": "distot-latents", "version": 1, "dtype": "float32", "origin": "x", "fingerprint": "x"}
    folder = group_2(tmp_path / "l.zarr", **about)
    zarr.create_array(folder / "z", shape=(60, 3), dtype="f4", chunks=(60, 3), zarr_format=2)[:] = Z
    array_2(folder / "mass", [60], trap, OBJECTS)
    for call in (describe, distot.solve):
        with pytest.raises(StoreError):
            call(folder)


@pytest.mark.parametrize("name", ["mass", "source-mean", "checkpoints/{newest}/part-00000/average"])
def test_runs_hold_zarr_3_alone(run: Path, tmp_path: Path, trap: Path, name: str) -> None:
    resealed(run / "config.json", lambda config: config.update(mass=True))
    path = run / name.format(newest=manifests(run)[-1].parent.name)
    shutil.rmtree(path, ignore_errors=True)
    array_2(path, [60], trap, OBJECTS)
    survives(*verbs(run, tmp_path).values())


UNUSUAL_3: list[dict[str, Any]] = [
    {"data_type": "string"},
    {"data_type": "variable_length_bytes"},
    {"data_type": {"name": "struct", "configuration": {}}},
    {"data_type": {"name": "numpy.datetime64", "configuration": {"unit": "s", "scale_factor": 1}}},
    {"data_type": 5},
    {"codecs": [{"name": "vlen-utf8"}]},
    {"codecs": [{"name": "numcodecs.pickle"}]},
    {"codecs": [{"name": "bytes"}, {"name": "somebody's", "configuration": {}}]},
    {"codecs": [{"name": "numcodecs.delta", "configuration": {"dtype": "|O"}}, {"name": "bytes"}]},
    {"codecs": [{"name": "sharding_indexed", "configuration": {"codecs": [{"name": "numcodecs.pickle"}]}}]},
    {"codecs": "bytes"},
    {"codecs": [5]},
    {"storage_transformers": [{"name": "somebody's"}]},
    {"shape": [20, -3]},
    {"shape": [2**70, 3]},
    {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 3]}}},
    {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": False}}},
    {"chunk_grid": "regular"},
]


@pytest.mark.parametrize("about", UNUSUAL_3, ids=str)
def test_zarr_3_that_is_not_of_numbers_is_refused(tmp_path: Path, about: dict[str, Any]) -> None:
    for name, folder in (("a.zarr", tmp_path / "a.zarr"), ("g.zarr", tmp_path / "g.zarr/z")):
        if name == "g.zarr":
            zarr.create_group(tmp_path / name)
        zarr.create_array(folder, shape=(20, 3), dtype="f4", chunks=(20, 3))[:] = 1
        write_json(folder / "zarr.json", json.loads((folder / "zarr.json").read_text()) | about)
        with pytest.raises(StoreError, match="which distot does not read; save the array as numbers"):
            open_latents(tmp_path / name)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "codec", ["default", "none", "blosc", "gzip", "sharded", "transposed", "filtered", "consolidated"]
)
@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning", "ignore:Numcodecs codecs are not in the Zarr")
def test_usual_zarr_goes_on_to_be_read(tmp_path: Path, version: Any, codec: str) -> None:
    import zarr.codecs as codecs

    usual: dict[str, dict[str, Any]] = {"none": {"compressors": None}, "sharded": {"shards": (40, 3)}}
    more = usual.get(codec, {})
    if codec in ("blosc", "gzip"):
        three: Any = {"blosc": codecs.BloscCodec(), "gzip": codecs.GzipCodec()}[codec]
        more = {"compressors": three if version == 3 else numcodecs.get_codec({"id": codec})}
    if codec == "filtered" and version == 2:
        more = {"filters": [numcodecs.Delta("<f4")]}
    if codec == "transposed" and version == 3:
        more = {"filters": [codecs.TransposeCodec(order=(1, 0))]}
    if codec == "sharded" and version == 2:
        more = {"order": "F"}
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=version)
    group.create_array("z", shape=Z.shape, dtype="f4", chunks=(20, 3), **more)[:] = Z
    if codec == "consolidated":
        zarr.consolidate_metadata(tmp_path / "g.zarr")
    assert np.allclose(open_latents(tmp_path / "g.zarr")[:], Z, atol=1e-5)
    assert np.allclose(open_latents(tmp_path / "g.zarr/z")[:], Z, atol=1e-5)
    assert open_latents(tmp_path / "g.zarr").notes == ()


def test_any_metadata_of_a_store_is_read_or_refused_in_a_sentence(made: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    shutil.copytree(made / "z.zarr", tmp_path / "z.zarr")
    shutil.copytree(made / "new.zarr", tmp_path / "new.zarr")
    for folder, call in (
        ("z.zarr", lambda path: open_latents(path)[0:5]),
        ("new.zarr", lambda path: describe_rows(path)),
    ):
        for file in sorted((tmp_path / folder).rglob("zarr.json")):
            whole = file.read_text()
            for _ in range(60):
                file.write_text(json.dumps(mutated(json.loads(whole), rng)))
                survives(partial(call, tmp_path / folder), partial(describe, tmp_path / folder))
            file.write_text(whole)


def describe_rows(path: Path) -> None:
    rows = distot.store.RowFile(path)
    for name in rows.arrays:
        rows.read(name, slice(0, min(rows.written, 5)))


@pytest.mark.parametrize("state", [{"drawn": "many"}, {"skip": 10**9}, {"block": -1}, {"singular": None}])
def test_rows_that_go_on_at_a_place_that_is_none(run: Path, made: Path, tmp_path: Path, state: dict[str, Any]) -> None:
    shutil.copytree(made / "new.zarr", tmp_path / "new.zarr")
    file = tmp_path / "new.zarr/zarr.json"
    about = json.loads(file.read_text())
    about["attributes"]["state"] |= state
    about["attributes"] |= {"written": 0, "unfinished": True}
    file.write_text(json.dumps(about))
    with pytest.raises(StoreError, match="is damaged: it goes on at"):
        distot.generate_file(run, tmp_path / "new.zarr", 10)


def test_pipes_and_devices_are_no_arrays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npy")
    (tmp_path / "y.npy").symlink_to("/dev/zero")
    zarr.create_array(tmp_path / "a.zarr", shape=(20, 3), dtype="f4", chunks=(20, 3))[:] = 1
    (tmp_path / "a.zarr/c/0/0").unlink()
    os.mkfifo(tmp_path / "a.zarr/c/0/0")
    for name in ("y.npy", "a.zarr"):
        with pytest.raises(DistotError, match="is no file but a pipe or device"):
            ingest(tmp_path / name, tmp_path / "out.zarr")
    for name in ("x.npy", "y.npy"):
        with pytest.raises(InputError, match="pipe or device"):
            read_npy(tmp_path / name)


def test_latents_of_links_to_files_are_read(made: Path, tmp_path: Path) -> None:
    """As those that download tools keep in a cache."""
    for file in sorted((made / "z.zarr").rglob("*")):
        if file.is_file():
            link = tmp_path / "z.zarr" / file.relative_to(made / "z.zarr")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    assert np.array_equal(open_latents(tmp_path / "z.zarr")[:], Z)


# ----------------------------------------------------------------------------------------------- terminal


def test_control_characters_are_shown_and_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(stderr=False)
    evil = "a\x1b[31mred\x1b]0;title\x07\r\x9b2Jb \u202eb"
    screen.print(evil, soft_wrap=True)
    screen.print(Text.assemble(("error", "red"), f": {evil}"), soft_wrap=True)
    shown = capsys.readouterr().out
    assert not set(shown) & {"\x1b", "\x07", "\r", "\x9b", "\u202e"}
    assert shown.count("\u241b[31mred") == 2


def test_passwords_in_addresses_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (
        StoreError("cannot read http://me:secret@host:9000/x"),
        InputError("s3://key:secret@bucket is no place"),
    ):
        assert "secret" not in f"{error!r} {error} {error.args}"
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with pytest.raises(InputError) as caught:
        distot.solve("http://me:secret@host/z.zarr")
    assert "secret" not in str(caught.value)
    Screen(stderr=False).print("address http://me:secret@host")
    assert "secret" not in capsys.readouterr().out


# ------------------------------------------------------------------------------- locks, and what writers leave


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(37, "No locks available")])
def test_where_no_lock_can_be_had_no_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", fails)
    with pytest.raises(StoreError, match="choose a folder on another one"):
        distot.solve(Z, run=tmp_path / "run.zarr", max_samples=200, until_chi2=None, progress=False)
    with pytest.raises(StoreError, match="choose a folder on another one"):
        distot.solve(Z, max_samples=200, until_chi2=None, progress=False).save(tmp_path / "run.zarr")
    assert list(tmp_path.iterdir()) == []


def test_folders_of_killed_writers_are_cleared_by_the_next(tmp_path: Path) -> None:
    for name in ("l.zarr", "a.npy"):
        pid = os.fork()
        if pid == 0:
            if name == "l.zarr":
                with new_latents(tmp_path / name, (4, 2), "float32", "a test"):
                    os.kill(os.getpid(), signal.SIGKILL)
            with new_file(tmp_path / name) as file:
                file.write_text("x")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
    others = [tmp_path / "l.zarr.partial-00000000aaaa", tmp_path / "x.l.zarr.partial-1234abcd"]
    for folder in others:
        folder.mkdir()
        (folder / "x").write_text("x")
    assert len(list(tmp_path.iterdir())) == 4
    with new_latents(tmp_path / "l.zarr", (1, 2), "float32", "a test") as first:
        with new_latents(tmp_path / "l2.zarr", (1, 2), "float32", "a test") as writer:
            writer.write(np.zeros((1, 2)))
        with pytest.raises(KeyboardInterrupt), new_latents(tmp_path / "l.zarr", (1, 2), "float32", "a test"):
            raise KeyboardInterrupt  # it has left the folder of the first, which is at work
        first.write(np.zeros((1, 2)))
    with new_file(tmp_path / "a.npy") as file:
        file.write_text("y")
    assert sorted(tmp_path.iterdir()) == sorted(
        [*others, *(tmp_path / name for name in ("a.npy", "l.zarr", "l2.zarr"))]
    )


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with new_file(tmp_path / "a.npy") as first, new_file(tmp_path / "a.npy") as second:
        first.write_text("first")
        second.write_text("second")
        assert first.read_text() == "first"
    assert (tmp_path / "a.npy").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_a_seal_is_of_the_content(tmp_path: Path) -> None:
    record = {"b": (1, 2), "a": 0.1}
    assert sealed(record)["sha256"] == digest_of({"a": 0.1, "b": [1, 2]})
