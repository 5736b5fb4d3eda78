"""AE-OT from data to new data: train -> encode -> solve -> generate -> decode -> evaluate -> report.

    python -m jobs.aeot digits --out digits                      scanned digits, some minutes on two cores
    python -m jobs.aeot gaussians8 --out ring --quick            to see that it runs
    python -m jobs.aeot mnist/ --out mnist --device cuda         a folder with the four files of MNIST or Fashion-MNIST
    python -m jobs.aeot celeba/ --out faces --latent 100 --workers 8
    python -m jobs.aeot digits --out digits --redo generate      this stage and all behind it anew

An autoencoder learns what data look like; distot carries noise to its latents, each of which gets its mass, and makes
new ones between neighbours, never across a gap; the decoder turns these into data. Each stage writes into the folder
what the next one reads, is left alone when it is done, and goes on where it was interrupted: submit the job as often
as its machine is taken away.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import distot
from distot.again import check_same, go_on
from distot.api import check_workers
from distot.arguments import RayAddress, Seconds, Workers, parse_goal
from distot.console import start
from distot.errors import InputError
from distot.fingerprint import fingerprint_of
from distot.inspect import describe
from distot.models import Autoencoder, Data, Epoch, Judge, Spec, Training, load, train
from distot.models.autoencoder import about
from distot.models.datasets import PICTURES, TOYS
from distot.store import RowFile, Run, new_file, new_latents, new_npy, open_latents
from distot.store.places import digest
from jobs.demo import begun, remembered, say

ROWS = 4096  # decoded at once
DONE = ("until_chi2", "max_samples", "exact")


@dataclass(frozen=True)
class Settings:
    """What a folder is about. Those of its first call are kept; another call may not change them."""

    data: str
    size: int | None = None
    latent: int = 12
    epochs: int = 15
    batch: int = 256
    width: int = 16
    until_chi2: float = 0.05
    count: int = 20_000
    seed: int = 0

    @classmethod
    def of(cls, data: str, quick: bool, **given: Any) -> Settings:
        """The defaults of a data set but for what is given."""
        its = cls(data if data in (*TOYS, *PICTURES) else str(Path(data).absolute()))
        if data in TOYS:
            its = replace(its, latent=2, epochs=60, width=128, count=100_000)
        if quick:
            its = replace(its, size=2000, epochs=8, batch=32, until_chi2=0.2, count=2000)
        return replace(its, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Places:
    """Where the transport is solved, and networks run."""

    workers: int | None = None
    ray: str | None = None
    device: str = "cpu"
    max_seconds: float | None = None

    def room(self) -> dict[str, Any]:
        """As ``distot.solve`` and its like take it."""
        return {"workers": self.workers, "ray": self.ray}


class Job:
    """The stages of one folder."""

    def __init__(self, folder: Path, settings: Settings, places: Places) -> None:
        self.folder, self.settings, self.places = folder, settings, places
        self.flat = settings.latent == 2 and places.workers is None  # then masses are made exact

    @cached_property
    def data(self) -> Data:
        """Raises InputError if they are not those that the model of the folder has learnt."""
        found, model = load(self.settings.data, self.settings.size), self.folder / FILES["train"]
        learnt = about(model).get("data") if model.exists() else None
        if learnt not in (None, content(found)):
            raise InputError(
                f"{self.settings.data} holds other data than {model} has learnt; --redo train begins anew with them"
            )
        return found

    @cached_property
    def model(self) -> Autoencoder:
        return Autoencoder.load(self.folder / "model.safetensors", self.places.device)

    def train(self) -> str:
        its, data, state = self.settings, self.data, self.folder / "training.safetensors"
        images = len(data.shape) == 3
        spec = Spec(data.shape, its.latent, "convolutional" if images else "dense", its.width)
        model = Autoencoder(spec, its.seed)

        def tell(epoch: Epoch) -> None:
            say(f"  epoch {epoch.number + 1} of {epoch.epochs}: mean of ½|x - G(z)|² {epoch.cost:.4g}")

        training = Training(its.epochs, its.batch, seed=its.seed)
        history = train(model, data.values, None, training, device=self.places.device, state=state, on_epoch=tell)
        words = {"settings": asdict(its), "history": [asdict(epoch) for epoch in history], "data": content(data)}
        model.save(self.folder / "model.safetensors", **words)
        state.unlink()
        return f"{len(data.values):,} data of shape {data.shape} to {its.latent} numbers and back"

    def encode(self) -> str:
        z, of = self.model.encode(self.data.values).numpy(), {"encoder": self.model.fingerprint}
        with new_latents(self.folder / "latents.zarr", z.shape, "float32", self.settings.data, of) as writer:
            writer.write(z)
        return f"{z.shape[0]:,} latents in {z.shape[1]} dimensions"

    def solve(self) -> str:
        self.check()
        run, latents = self.folder / "run.zarr", self.folder / "latents.zarr"
        if run.exists():
            solution = go_on(run, latents, "gaussian", None, self.wanted())
        else:
            solution = distot.solve(latents, exact=self.flat, run=run, **self.wanted())
        found = solution.certificate
        return f"chi2 {found.chi2:.4f} ± {found.chi2_error:.4f}; {solution.explanation}"

    def wanted(self) -> dict[str, Any]:
        """Of ``distot.solve``, also for a run that is there."""
        its = {"until_chi2": self.settings.until_chi2, "seed": self.settings.seed} | self.places.room()
        return its if self.places.max_seconds is None else its | {"max_seconds": self.places.max_seconds}

    def generate(self) -> str:
        self.warn()
        made = distot.generate_file(
            self.folder / "run.zarr",
            self.folder / "generated.zarr",
            self.settings.count,
            balance=True,
            **self.places.room(),
        )
        return (
            f"{made.samples:,} new latents; {made.singular / made.drawn:.2%} of the noise has no neighbour to mix with"
        )

    def decode(self) -> str:
        made, model = RowFile(self.folder / "generated.zarr"), self.model
        kind = np.uint8 if model.spec.images else np.float32
        with new_npy(self.folder / "images.npy", (made.rows, *model.spec.shape), kind) as write:
            for first in range(0, made.rows, ROWS):
                rows = slice(first, min(first + ROWS, made.rows))
                x = model.decode(torch.from_numpy(made.read("z", rows))).numpy()
                write(np.rint(255 * x) if model.spec.images else x)
        return f"{made.rows:,} data of shape {model.spec.shape}"

    def evaluate(self) -> str:
        judge = Judge(self.data, self.settings.seed, min(5000, self.settings.count))
        scores = judge(torch.from_numpy(np.load(self.folder / "images.npy")))
        with new_file(self.folder / "scores.json") as partial:
            partial.write_text(json.dumps(asdict(scores), indent=1))
        return (
            f"modes {scores.covered:.0%}, largest error of a share {scores.worst:.1%}, FD {scores.frechet:.3g}, "
            f"precision {scores.precision:.3f}, recall {scores.recall:.3f}, coverage {scores.coverage:.3f}"
        )

    def report(self) -> str:
        self.check()
        decoder = self.pictures if self.model.spec.images else None
        distot.report(self.folder / "run.zarr", self.folder / "report.html", decoder=decoder)
        return "a page for a browser"

    def pictures(self, z: Any) -> np.ndarray[Any, Any]:
        """Latents (n, d) as pictures (n, h, w, c)."""
        return self.model.decode(torch.from_numpy(np.asarray(z))).movedim(1, -1).numpy()

    def check(self) -> None:
        """Raises InputError if the latents are not those of the encoder."""
        found = open_latents(self.folder / "latents.zarr").attributes.get("encoder", "none that is known")
        if found != self.model.fingerprint:
            raise InputError(
                f"{self.folder}/latents.zarr comes from another encoder ({found[:12]}) than model.safetensors "
                f"({self.model.fingerprint[:12]}); --redo encode makes latents of this one"
            )

    def warn(self) -> None:
        """Says if the map is not good enough for what it is used for."""
        solution = distot.load(self.folder / "run.zarr")
        found, goal = solution.certificate, self.settings.until_chi2
        if found.chi2 - 2 * found.chi2_error > goal:
            say(
                f"  [yellow]warning: the transport is not solved well enough, chi2 {found.chi2:.3g} ± "
                f"{found.chi2_error:.2g} where {goal:g} is wanted: shares of data will be off. Give it more time.[/]"
            )

    def done(self, stage: str) -> bool:
        """Whether a stage has left what the next one reads. Raises InputError if it made it of something else."""
        path = self.folder / FILES[stage]
        if not path.exists():
            return False
        if stage == "train" and about(path).get("settings") not in (None, asdict(self.settings)):
            raise InputError(f"{path} was trained with other settings; --redo train begins anew with these")
        if stage == "encode":
            self.check()
        if stage == "solve":
            check_same(Run(path), self.folder / "latents.zarr", "gaussian", None, self.wanted())
            return bool(describe(path)["state"] in DONE)
        if stage == "generate" and not RowFile(path).complete:
            return False
        if self.stages().get(stage, self.made_of(stage)) != self.made_of(stage):
            raise InputError(
                f"{path} was made of something else than is there now; --redo {stage} makes it, and all behind it, anew"
            )
        return True

    def made_of(self, stage: str) -> dict[str, Any]:
        """What decides the file of a stage, besides the settings."""
        if stage in ("train", "encode", "solve"):  # those files say it themselves
            return {}
        run, made = self.folder / "run.zarr", self.folder / "generated.zarr"
        if stage == "evaluate":
            return {"images": digest(self.folder / "images.npy")}
        if stage == "decode":
            return {"encoder": self.model.fingerprint, "generated": RowFile(made).about}
        found = Run(run).load_checkpoint()
        encoder = {"encoder": self.model.fingerprint} if stage == "report" else {}
        return {"heights": "" if found is None else found.heights} | encoder

    def stages(self) -> dict[str, Any]:
        """What each stage has made its file of."""
        file = self.folder / "stages.json"
        return remembered(file) if file.exists() else {}

    def do(self, stage: str) -> str:
        """Does a stage; what it came to."""
        said = str(getattr(self, stage)())
        with new_file(self.folder / "stages.json") as partial:
            partial.write_text(json.dumps(self.stages() | {stage: self.made_of(stage)}, indent=1))
        return said


FILES = {
    "train": "model.safetensors",
    "encode": "latents.zarr",
    "solve": "run.zarr",
    "generate": "generated.zarr",
    "decode": "images.npy",
    "evaluate": "scores.json",
    "report": "report.html",
}


def content(data: Data) -> str:
    """A hash of the data to learn from."""
    return fingerprint_of(data.values.flatten(1).numpy())


def forget(folder: Path, first: str) -> None:
    """Deletes what a stage and all behind it have left."""
    names = list(FILES)
    if first not in names:
        raise InputError(f"--redo takes a stage, {', '.join(names)}; not {first!r}")
    for name in names[names.index(first) :]:
        path = folder / FILES[name]
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if first == "train":
        (folder / "training.safetensors").unlink(missing_ok=True)


def main(
    data: Annotated[str, typer.Argument(help="digits, patches, gaussians8, gaussians25, swissroll, or a folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where everything goes.")],
    quick: Annotated[bool, typer.Option("--quick", help="Little data and training, to see that it runs.")] = False,
    size: Annotated[int | None, typer.Option(help="Data to train on; default: all.")] = None,
    latent: Annotated[int | None, typer.Option(min=1, help="Dimension of latents; default: 12, of toys 2.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of training; default: 15, of toys 60.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the networks; default: 16, of toys 128.")] = None,
    until_chi2: Annotated[
        float | None, typer.Option(parser=parse_goal, metavar="CHI2", help="Goal of the transport; default: 0.05.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("-n", min=100, help="New data; default: 20,000, of toys 100,000.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything; default: 0.")] = None,
    redo: Annotated[str | None, typer.Option(metavar="STAGE", help="Do this stage and all behind it anew.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda, of the networks.")] = "cpu",
    max_seconds: Seconds = None,
    workers: Workers = None,
    ray: RayAddress = None,
) -> None:
    """Train, encode, solve, generate, decode, evaluate, report; what is done already is skipped.

    Example: python -m jobs.aeot digits --out digits
    """
    settings = Settings.of(
        data, quick, size=size, latent=latent, epochs=epochs, width=width, until_chi2=until_chi2, count=count, seed=seed
    )
    check_workers(workers, ray=ray)
    if redo is not None and not (out / "settings.json").exists():
        raise InputError(f"{out} was not begun by this job, so nothing of it can be done anew; leave --redo out")
    begun(out, asdict(settings))
    if redo is not None:
        forget(out, redo)
    job, began = Job(out, settings, Places(workers, ray, device, max_seconds)), time.monotonic()
    for name in FILES:
        if job.done(name):
            say(f"[bold]{name}[/]: {out / FILES[name]} is there")
            continue
        say(f"[bold]{name}[/]")
        since = time.monotonic()
        said = job.do(name)
        say(f"  {out / FILES[name]}: {said} ({time.monotonic() - since:.0f} s)")
    say(f"Done in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    start(main)
