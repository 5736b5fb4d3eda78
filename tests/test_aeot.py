"""The job from data to new data: all stages, each skipped when done, gone on with when interrupted, and refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import distot
from distot.errors import InputError
from distot.models import Autoencoder, load
from distot.store import RowFile, new_latents, open_latents
from jobs import aeot

OPTIONAL = ("size", "latent", "epochs", "width", "until_chi2", "count", "seed", "redo")


def run(folder: Path, capsys: pytest.CaptureFixture[str], data: str = "gaussians8", **words: object) -> str:
    options: dict[str, object] = dict.fromkeys(OPTIONAL)
    options |= {"quick": True, "device": "cpu", "max_seconds": None, "workers": None, "ray": None}
    capsys.readouterr()
    aeot.main(data, folder, **(options | words))  # type: ignore[arg-type]
    return " ".join(capsys.readouterr().out.split())


def test_from_digits_to_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "digits"
    first = run(folder, capsys, "digits", width=12)
    assert all((folder / name).exists() for name in aeot.FILES.values())
    assert not (folder / "training.safetensors").exists()
    assert "epoch 8 of 8" in first
    images = np.load(folder / "images.npy")
    assert (images.shape, images.dtype) == ((2000, 1, 8, 8), np.uint8)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["covered"] >= 0.7
    assert "data:image/png" in (folder / "report.html").read_text()
    model = Autoencoder.load(folder / "model.safetensors")
    assert open_latents(folder / "latents.zarr").attributes["encoder"] == model.fingerprint
    assert distot.load(folder / "run.zarr").reason == "until_chi2"
    z = RowFile(folder / "generated.zarr").read("z")
    assert np.array_equal(images, np.rint(255 * model.decode(torch.from_numpy(z)).numpy()))

    kept = {name: (folder / name).stat().st_mtime_ns for name in aeot.FILES.values()}
    again = run(folder, capsys, "digits", width=12)
    assert again.count("is there") == len(aeot.FILES)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    with pytest.raises(InputError, match="begun with width 12 instead of 16"):
        run(folder, capsys, "digits")

    redone = run(folder, capsys, "digits", width=12, redo="generate")
    assert redone.count("is there") == 3
    assert np.array_equal(np.load(folder / "images.npy"), images)
    with pytest.raises(InputError, match="--redo takes a stage"):
        run(folder, capsys, "digits", width=12, redo="everything")


def test_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between epochs, and in the middle of a solve: the end is that of a job that was never killed."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for last in ("evaluate", "report"):
        monkeypatch.delitem(aeot.FILES, last)
    run(whole, capsys)

    def stop(text: str) -> None:
        if "epoch 2 of 8" in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(aeot, "say", stop)
        with pytest.raises(KeyboardInterrupt):
            run(broken, capsys)
    assert (broken / "training.safetensors").exists()

    solve = distot.solve

    def interrupted(*args: object, **words: object) -> None:
        def stop(event: dict[str, object]) -> None:
            if event["event"] == "step":
                raise RuntimeError("killed")

        solve(*args, **words, on_event=stop, checkpoint_seconds=0.001)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(distot, "solve", interrupted)
        with pytest.raises(RuntimeError, match="killed"):
            run(broken, capsys)
    said = run(broken, capsys)
    assert "epoch" not in said
    assert "latents.zarr is there" in said
    assert "run.zarr is there" not in said
    assert np.array_equal(distot.load(whole / "run.zarr").heights, distot.load(broken / "run.zarr").heights)
    assert np.array_equal(np.load(whole / "images.npy"), np.load(broken / "images.npy"))


def begun(folder: Path, latent: int = 2) -> aeot.Job:
    """With latents, not solved yet."""
    job = aeot.Job(folder, aeot.Settings.of("gaussians8", True, latent=latent, epochs=1), aeot.Places())
    folder.mkdir()
    job.train()
    job.encode()
    return job


def test_refuses_latents_of_another_encoder(tmp_path: Path) -> None:
    job = begun(tmp_path / "toy")
    Autoencoder(job.model.spec, seed=9).save(tmp_path / "toy/model.safetensors")
    other = aeot.Job(job.folder, job.settings, job.places)
    for stage in (other.solve, other.report):
        with pytest.raises(InputError, match="comes from another encoder"):
            stage()
    aeot.forget(job.folder, "encode")
    with new_latents(job.folder / "latents.zarr", (100, 2), "float32", "by hand") as writer:
        writer.write(np.random.default_rng(0).standard_normal((100, 2)))
    with pytest.raises(InputError, match=r"another encoder \(none that is"):
        other.solve()
    aeot.forget(job.folder, "encode")
    other.encode()
    other.check()


def test_warns_of_a_run_that_is_not_solved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = begun(tmp_path / "toy", latent=3)
    distot.solve(job.folder / "latents.zarr", max_samples=300, run=job.folder / "run.zarr", progress=False)
    job.generate()
    assert "not solved well enough, chi2" in capsys.readouterr().out


def test_stages_that_were_made_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that went on, images or latents that were replaced, other data in the place of those that were learnt."""
    folder = tmp_path / "toy"
    for last in ("evaluate", "report"):
        monkeypatch.delitem(aeot.FILES, last)
    run(folder, capsys, latent=3)
    assert run(folder, capsys, latent=3).count("is there") == len(aeot.FILES)
    distot.resume(folder / "run.zarr", until_chi2=0.1, progress=False)
    with pytest.raises(InputError, match=r"generated\.zarr was made of something else .* --redo generate"):
        run(folder, capsys, latent=3)
    run(folder, capsys, latent=3, redo="generate")
    shutil.rmtree(folder / "generated.zarr")
    distot.generate_file(folder / "run.zarr", folder / "generated.zarr", 2000, seed=9)
    with pytest.raises(InputError, match=r"images\.npy was made of something else"):
        run(folder, capsys, latent=3)

    shutil.rmtree(folder / "run.zarr")
    distot.solve(np.random.default_rng(0).random((2000, 3)), max_samples=3000, run=folder / "run.zarr", progress=False)
    with pytest.raises(InputError, match="solved for other latents"):
        run(folder, capsys, latent=3)
    other = replace(load("gaussians8", 2000), values=load("gaussians25", 2000).values)
    monkeypatch.setattr(aeot, "load", lambda name, size: other)
    with pytest.raises(InputError, match=r"holds other data than .* --redo train"):
        run(folder, capsys, latent=3, redo="encode")


def test_redo_deletes_nothing_that_the_job_has_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in a folder of something else, nor where another option would be refused afterwards."""
    (tmp_path / "run.zarr").mkdir()
    with pytest.raises(InputError, match="was not begun by this job"):
        run(tmp_path, capsys, redo="train")
    assert not (tmp_path / "settings.json").exists()
    (tmp_path / "settings.json").write_text('{"count": 300, "dim": 4}')
    with pytest.raises(InputError, match="was begun with"):
        run(tmp_path, capsys, redo="train")
    assert (tmp_path / "run.zarr").exists()
