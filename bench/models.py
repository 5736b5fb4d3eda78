"""Generative models on equal terms: AE-OT, WAE-MMD, AAE, VAE, LSOT on digits and three toys, three seeds each.

    python -m bench.models [--only SET/METHOD] [--seeds 3] [--keep FOLDER] [--no-new]
    python -m bench.models --pictures FOLDER        of `python -m jobs.aeot digits --out FOLDER`, and of what is kept

One table in bench/reports/models.md, and pictures in docs/pictures. What is finished is kept in the folder, so that the
same command goes on after an interruption; delete the folder to begin anew. All methods of a set have the same
networks, epochs and data; AE-OT and LSOT share autoencoder and run of a seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distot
from bench.report import write
from distot.models import Autoencoder, Data, Judge, Spec, Training, fit, load, train
from distot.models.penalties import PENALTIES
from distot.solution import Solution

SETS = ("digits", "gaussians8", "gaussians25", "swissroll")
PENALISED = {"WAE-MMD": "mmd", "AAE": "aae", "VAE": "vae"}
METHODS = ("AE-OT", *PENALISED, "LSOT")
FLOOR = "training data"
SAMPLES = {"digits": 20_000}  # judged; of toys:
TOY_SAMPLES = 100_000
PICTURES = Path(__file__).parent.parent / "docs/pictures"
SHOWN = 100  # samples that are kept for pictures


@dataclass(frozen=True)
class Made:
    """What a method gave: samples, and the seconds of a processor for training, solving and generating."""

    samples: Tensor
    seconds: float


@cache
def data_of(name: str) -> Data:
    return load(name)


@cache
def judge_of(name: str) -> Judge:
    """The same for all methods and seeds."""
    return Judge(data_of(name))


def autoencoder(name: str, penalty: str, seed: int) -> Autoencoder:
    """Trained; the same network and time for every penalty."""
    data, its = data_of(name), PENALTIES[penalty]
    images, latent = len(data.shape) == 3, 12 if len(data.shape) == 3 else 2
    made = its(latent)
    spec = Spec(data.shape, latent, "convolutional" if images else "dense", 16 if images else 128, made.random)
    model = Autoencoder(spec, seed)
    train(model, data.values, made, Training(epochs=15 if images else 60, seed=seed))
    return model


@cache
def solved(name: str, seed: int) -> tuple[Autoencoder, Solution, float]:
    """Autoencoder without a penalty, transport to its latents, and the seconds of a processor for both."""
    began = time.process_time()
    model = autoencoder(name, "none", seed)
    z = model.encode(data_of(name).values).numpy()
    flat = z.shape[1] == 2
    solution = distot.solve(z, until_chi2=0.05, exact=flat, seed=seed, progress=False)
    return model, solution, time.process_time() - began


def make(name: str, method: str, seed: int) -> Made:
    """Trains a method on a set, and generates."""
    n = SAMPLES.get(name, TOY_SAMPLES)
    spent, began = 0.0, time.process_time()
    if method in PENALISED:
        model = autoencoder(name, PENALISED[method], seed)
        latents = torch.randn(n, model.spec.latent, generator=torch.Generator().manual_seed(seed))
    else:
        model, solution, spent = solved(name, seed)
        began = time.process_time()
        if method == "AE-OT":
            latents = torch.from_numpy(solution.generate(n, balance=True, seed=seed).samples)
        else:
            noise = torch.randn(n, model.spec.latent, generator=torch.Generator().manual_seed(seed))
            latents = fit(solution).map(noise)
    return Made(model.decode(latents), spent + time.process_time() - began)


def cell(name: str, method: str, seed: int, keep: Path) -> dict[str, Any]:
    """The scores of one method, set and seed; from the folder if they are there."""
    stem = keep / f"{name}-{method}-{seed}"
    file = stem.with_suffix(".json")
    if file.exists():
        return dict(json.loads(file.read_text()))
    data, judge = data_of(name), judge_of(name)
    if method == FLOOR:
        order = torch.randperm(len(data.values), generator=torch.Generator().manual_seed(seed))
        made = Made(data.values[order], 0.0)
    else:
        made = make(name, method, seed)
    np.save(stem.with_suffix(".npy"), made.samples[: SHOWN if judge.classifier else 6000].numpy())
    found = asdict(judge(made.samples)) | {"seconds": made.seconds}
    file.write_text(json.dumps(found))
    return found


COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], float], str]] = {
    "covered": ("modes", lambda its: its["covered"], "{:.0%}"),
    "worst": ("worst share", lambda its: its["worst"], "{:.1%}"),
    "between": ("between", lambda its: its["between"], "{:.1%}"),
    "frechet": ("FD", lambda its: its["frechet"], "{:.4g}"),
    "precision": ("precision", lambda its: its["precision"], "{:.3f}"),
    "recall": ("recall", lambda its: its["recall"], "{:.3f}"),
    "density": ("density", lambda its: its["density"], "{:.3f}"),
    "coverage": ("coverage", lambda its: its["coverage"], "{:.3f}"),
    "sliced": ("sliced W2", lambda its: its["sliced"]["value"], "{:.4f}"),
    "w2": ("W2²", lambda its: its["w2_squared"]["value"], "{:.4g}"),
    "seconds": ("seconds", lambda its: its["seconds"], "{:.0f}"),
}


def row(method: str, found: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds."""
    words = []
    for _, value, form in COLUMNS.values():
        values = np.array([value(its) for its in found])
        spread = f" ± {form.format(values.std(ddof=1))}" if len(values) > 1 and method != FLOOR else ""
        words.append(form.format(values.mean()) + spread)
    return f"| {method} ({len(found)}) | " + " | ".join(words) + " |"


def tiles(images: Tensor, columns: int) -> Tensor:
    """Images (n, 1, h, w) side by side, (rows h, columns w)."""
    n, _, h, w = images.shape
    return images.reshape(n // columns, columns, h, w).permute(0, 2, 1, 3).reshape(-1, columns * w)


def pictures(folder: Path, keep: Path) -> None:
    """Generated digits of all methods; the OT map along lines of noise; noise that is refused."""
    import matplotlib.pyplot as plt

    methods = (FLOOR, *METHODS)
    _, axes = plt.subplots(1, len(methods), figsize=(15, 2.9), layout="constrained")
    for axis, method in zip(axes, methods, strict=True):
        made = torch.from_numpy(np.load(keep / f"digits-{method}-0.npy"))
        axis.imshow(tiles(made[:SHOWN].float(), 10), cmap="gray_r")
        axis.set(title=method, xticks=[], yticks=[])
    plt.savefig(PICTURES / "aeot-digits.png", dpi=75)

    model, solution = Autoencoder.load(folder / "model.safetensors"), distot.load(folder / "run.zarr")
    random = np.random.default_rng(3)
    ends = random.standard_normal((2, 5, 1, solution.facts.shape[1]))
    angle = np.linspace(0, np.pi / 2, 14)[:, None]
    noise = np.cos(angle) * ends[0] + np.sin(angle) * ends[1]  # as likely all the way
    flat = noise.reshape(-1, noise.shape[-1])
    by_map = torch.from_numpy(np.asarray(solution.map(flat)))
    first, last = by_map.view(5, 14, -1)[:, :1], by_map.view(5, 14, -1)[:, -1:]
    share = torch.linspace(0, 1, 14)[:, None]
    ways = {
        "T(x): the map, a latent at a time": by_map,
        "x - ∇φ(x): a smooth potential": fit(solution).map(flat),
        "a straight line between the ends": ((1 - share) * first + share * last).flatten(0, 1),
    }
    figure = plt.figure(figsize=(15, 4.2), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1.4, 1.4, 1.4, 1])
    for axis, (title, z) in zip(axes, ways.items(), strict=False):
        axis.imshow(tiles(model.decode(z.float()), 14), cmap="gray_r")
        axis.set(title=title, xticks=[], yticks=[])
    ring = distot.solve(load("gaussians8", 2000).values, exact=True, progress=False)
    new = ring.generate(20_000)
    axes[3].scatter(*new.noise[:8000].T, s=1, c="0.8", linewidths=0)
    axes[3].scatter(*new.singular.T, s=2, c="C3", linewidths=0)
    axes[3].set(title="noise refused, eight Gaussians", aspect="equal", xticks=[], yticks=[])
    figure.savefig(PICTURES / "aeot-map.png", dpi=75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a set, or SET/METHOD: do these and write no report")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw, and measure nothing")
    parser.add_argument("--no-new", action="store_true", help="write the report of what is finished")
    parser.add_argument("--keep", type=Path, default=Path("build/models"), help="folder of what is finished")
    args = parser.parse_args()
    if args.pictures is not None:
        pictures(args.pictures, args.keep)
        return
    args.keep.mkdir(parents=True, exist_ok=True)
    lines = [
        "Mean ± standard deviation over seeds; how many, in brackets. *Modes*: classes or modes with at least half of "
        "their share. *Worst share*: largest relative error of the share of one; samples between modes belong to none. "
        "*Between*: samples farther than five standard deviations from every mode or the curve. *W2²*: lower bound, of "
        "classifier features for digits. *Seconds* of a processor for training, solving, and generating 20,000 digits "
        "or 100,000 points. The first row is what data of the training set get. Penalties have one default weight for "
        "all sets; other weights and longer training helped them little on the toys.",
    ]
    for name in SETS:
        lines += ["", f"## {name}", "", "| | " + " | ".join(title for title, *_ in COLUMNS.values()) + " |"]
        lines.append("|---" * (1 + len(COLUMNS)) + "|")
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in range(args.seeds):
            for method in (FLOOR, *METHODS):
                if args.only and not f"{name}/{method}".startswith(args.only):
                    continue
                if args.no_new and not (args.keep / f"{name}-{method}-{seed}.json").exists():
                    continue
                found.setdefault(method, []).append(cell(name, method, seed, args.keep))
                print(f"{name} {seed} {row(method, found[method][-1:])}", flush=True)
            solved.cache_clear()
        if not found:
            lines = lines[:-5]
        lines += [row(method, its) for method, its in found.items()]
    if not args.only:
        write("models", "Generative models on equal terms", lines)


if __name__ == "__main__":
    main()
