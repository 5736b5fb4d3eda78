"""Flow matching with three ways to pair noise and data: at random, by the optimal plan of each batch, by distot.

    python -m jobs.flow [--quick] [--picture FILE.png]

A small network learns the velocity that carries noise to data along straight lines between pairs. The better the
pairing, the straighter the paths of the flow, and the fewer Euler steps it takes to follow them.
Legend: B samples of a batch, N data, d dimension, t time from 0 (noise) to 1 (data).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import distot
from distot.console import start
from distot.store import check_out, fresh_file
from jobs.demo import say

BATCH, WIDTH, RATE = 256, 128, 2e-3
STEPS = (1, 2, 4, 8, 100)  # of Euler
FINE = 100

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Result:
    """One flow: lengths of its paths beyond straight ones, distance to the data by Euler steps, and some paths."""

    curvature: float
    distance: dict[int, float]
    paths: Tensor  # (FINE + 1, B, d)
    seconds: float


def ring(count: int, seed: int) -> Tensor:
    """Eight Gaussians on a circle, (N, 2)."""
    random = np.random.default_rng(seed)
    angle = random.integers(8, size=count) * np.pi / 4
    centre = 3.0 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return torch.from_numpy(centre + 0.25 * random.standard_normal((count, 2))).float()


def digits() -> Tensor:
    """Scanned digits (1797, 64), centred, of unit variance over all."""
    from sklearn.datasets import load_digits

    x = load_digits().data
    return torch.from_numpy((x - x.mean(axis=0)) / x.std()).float()


def independent(data: Tensor) -> Iterator[Pair]:
    while True:
        yield torch.randn(BATCH, data.shape[1]), data[torch.randint(len(data), (BATCH,))]


def by_batch(data: Tensor) -> Iterator[Pair]:
    """The optimal plan of each batch."""
    for noise, latent in independent(data):
        yield noise, latent[linear_sum_assignment(torch.cdist(noise, latent).square())[1]]


def by_distot(data: Tensor, goal: float) -> Iterator[Pair]:
    """The optimal plan between all noise and all data."""
    solution = distot.solve(data, until_chi2=goal, progress=False)
    return ((noise, latent) for noise, latent, _ in distot.Pairs(solution, BATCH, endless=True))


class Velocity(nn.Module):
    """v(x, t), (B, d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers = [nn.Linear(dim + 1, WIDTH), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(WIDTH, WIDTH), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, dim))

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.net(torch.cat([x, t], dim=1))


def train(pairs: Iterator[Pair], dim: int, steps: int) -> Velocity:
    torch.manual_seed(0)
    model = Velocity(dim)
    adam = torch.optim.Adam(model.parameters(), RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for noise, latent in islice(pairs, steps):
        t = torch.rand(len(noise), 1)
        loss = (model(noise + t * (latent - noise), t) - (latent - noise)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
    return model


@torch.no_grad()
def flow(model: Velocity, x: Tensor, steps: int) -> Tensor:
    """Positions after each Euler step, (steps + 1, B, d)."""
    path = [x]
    for i in range(steps):
        path.append(path[-1] + model(path[-1], torch.full((len(x), 1), i / steps)) / steps)
    return torch.stack(path)


def curvature(path: Tensor) -> float:
    """Mean squared change of velocity along the paths over mean squared velocity; 0 for straight ones at one pace."""
    velocity = path.diff(dim=0) * (len(path) - 1)
    return float((velocity - velocity.mean(0)).square().mean() / velocity.square().mean())


def sliced(a: Tensor, b: Tensor) -> float:
    """Sliced W2 of two samples of the same size, over 200 directions."""
    random = torch.Generator().manual_seed(0)
    way = nn.functional.normalize(torch.randn(a.shape[1], 200, generator=random), dim=0)
    return float(((a @ way).sort(dim=0).values - (b @ way).sort(dim=0).values).square().mean().sqrt())


def judged(pairs: Callable[[], Iterator[Pair]], fresh: Tensor, steps: int) -> Result:
    """Trains with pairs and compares samples with ``fresh`` data (B, d)."""
    torch.manual_seed(1)
    began = time.monotonic()
    model = train(pairs(), fresh.shape[1], steps)
    seconds = time.monotonic() - began
    noise = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(2))
    fine = flow(model, noise, FINE)
    distance = {count: sliced(flow(model, noise, count)[-1], fresh) for count in STEPS}
    return Result(curvature(fine), distance, fine[:, :150], seconds)


def draw(results: dict[str, dict[str, Result]], file: Path) -> None:
    """Paths in the plane, and distance against Euler steps for each data set."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plane = next(iter(results.values()))
    figure, axes = plt.subplots(1, len(plane) + len(results), figsize=(14, 3), layout="constrained")
    for axis, (name, found) in zip(axes, plane.items(), strict=False):
        axis.plot(*found.paths.permute(2, 0, 1).numpy(), color="tab:blue", alpha=0.25, linewidth=0.5)
        axis.plot(*found.paths[-1].T.numpy(), ".", color="tab:red", markersize=2)
        axis.set(title=f"{name}\ncurvature {found.curvature:.3f}", xticks=[], yticks=[], aspect="equal")
    for axis, (title, its) in zip(axes[len(plane) :], results.items(), strict=True):
        for name, found in its.items():
            axis.loglog(list(found.distance), list(found.distance.values()), "o-", label=name, markersize=3)
        axis.set(title=title, xlabel="Euler steps", ylabel="sliced W2 to data")
    axes[-1].legend(fontsize=8)
    with fresh_file(file) as partial:
        figure.savefig(partial, dpi=75, format=file.suffix.removeprefix(".") or "png")


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Train for a moment only, to see that it runs.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each flow.")] = 4000,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to draw what came out.")] = None,
) -> None:
    """Train three flows on each of two data sets and compare them."""
    if picture is not None and find_spec("matplotlib") is None:
        raise distot.InputError("a picture needs matplotlib: pip install 'distot[bench]'")
    if picture is not None:
        check_out(picture)
    steps, goal = (50, 0.3) if quick else (steps, 0.05)
    sets = {"eight Gaussians": (ring(1000 if quick else 4000, 0), ring(2000, 1)), "digits": (digits(), digits())}
    results: dict[str, dict[str, Result]] = {}
    for title, (data, fresh) in sets.items():
        say(f"\n{title}: N = {len(data):,}, d = {data.shape[1]}, {steps:,} steps of {BATCH} pairs")
        say(f"{'pairs':<16}curvature   " + "".join(f"W2 at {count:<5}" for count in STEPS) + " training")
        ways: dict[str, Callable[[], Iterator[Pair]]] = {
            "independent": lambda data=data: independent(data),  # type: ignore[misc]
            "plan per batch": lambda data=data: by_batch(data),  # type: ignore[misc]
            "distot": lambda data=data: by_distot(data, goal),  # type: ignore[misc]
        }
        results[title] = {}
        for name, pairs in ways.items():
            its = results[title][name] = judged(pairs, fresh, steps)
            distances = "".join(f"{its.distance[count]:<11.4f}" for count in STEPS)
            say(f"{name:<16}{its.curvature:<12.4f}{distances} {its.seconds:.0f} s")
    if picture is not None:
        draw(results, picture)
        say(f"\npicture: {picture}")


if __name__ == "__main__":
    start(main)
