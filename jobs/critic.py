"""A generator that is trained by minimisation alone: its critic is N numbers, kept at the maximum of a concave dual.

    python -m jobs.critic [--quick] [--picture FILE.png]

For eight Gaussians and for scanned digits, at the costs ½|x - y|² (W2) and |x - y| (W1). By turns, Kantorovich's
potentials g of the data climb to their best, which couples a pool of noise z with data y(z), and the generator follows
the gradient of E c(G(z), y(z)): that of the distance itself where it begins, by the envelope theorem, and of a bound
from above on the way (docs/math.md (33)). Each turn lowers the distance; there is no second network, and no game.
Legend: B samples of a batch, N data, d numbers in a datum.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor, nn

import distot
from distot.console import start
from distot.models import Critic, Data, Estimate, Judge, Scores, load
from distot.models.autoencoder import dense
from distot.models.datasets import floats
from distot.store import check_out, fresh_file
from jobs.demo import say

NOISE, WIDTH, BATCH, RATE = 16, 256, 256, 5e-3  # noise has no more numbers than data
SEARCHED = 1024  # samples of a step of ascent
TURN, POOL = 100, 4096  # steps of a turn, of the critic and of the generator; noise that is coupled for it

Cost = Literal["w2", "w1"]


class Generator(nn.Module):
    """Noise (B, min(NOISE, d)) to data (B, d), of images between 0 and 1."""

    def __init__(self, dim: int, images: bool, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        end, self.noise = [nn.Sigmoid()] if images else [], min(NOISE, dim)
        self.net = nn.Sequential(*dense([self.noise, WIDTH, WIDTH, dim]), *end)
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> Tensor:
        """Standard normal (count, noise)."""
        return torch.randn(count, self.noise, generator=self.random)

    def forward(self, z: Tensor) -> Tensor:
        """Data (B, d) of noise (B, noise)."""
        made: Tensor = self.net(z)
        return made

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """New data (count, d)."""
        return self(self.draw(count))


@dataclass(frozen=True)
class Result:
    samples: Tensor
    scores: Scores
    worst: float  # largest relative error of the share of a mode, samples between modes counted to the nearest
    distance: Estimate
    seconds: float


def minimise(data: Data, cost: Cost, size: int, steps: int, judge: Judge, seed: int = 0) -> Result:
    """Trains a generator on ``size`` data, and judges what it makes."""
    target = floats(data.values[:size]).flatten(1)
    generator, critic = Generator(target.shape[1], len(data.shape) == 3, seed), Critic(target, cost=cost)
    began = time.monotonic()
    adam = torch.optim.Adam(generator.parameters(), RATE, betas=(0.9, 0.99))
    for step in range(steps):
        adam.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        if step % TURN == 0:
            critic.fit(generator.sample, steps=TURN, batch=SEARCHED)
            pool = generator.draw(POOL)
            with torch.no_grad():
                coupled = critic.map(generator(pool))
        index = torch.randint(POOL, (BATCH,), generator=generator.random)
        square = (generator(pool[index]) - coupled[index]).square().sum(dim=1)
        loss = (0.5 * square if cost == "w2" else square.clamp_min(1e-12).sqrt()).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    seconds = time.monotonic() - began
    critic.fit(generator.sample, steps=200, batch=SEARCHED)
    samples = generator.sample(20_000).reshape(-1, *data.shape)
    distance = critic.estimate(generator.sample)
    share = torch.bincount(judge.labels(samples)[0], minlength=data.classes) / len(samples)
    worst = float((share / data.shares - 1).abs().max())
    return Result(samples, judge(samples), worst, distance, seconds)


def draw(results: dict[str, dict[str, Result]], file: Path) -> None:
    """Points in the plane, and 12 x 12 digits, for each cost."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 2, figsize=(8, 8.2), layout="constrained", squeeze=False)
    for row, (name, its) in zip(axes, results.items(), strict=True):
        for axis, (cost, found) in zip(row, its.items(), strict=True):
            if found.samples.ndim == 2:
                axis.scatter(*found.samples[:4000].T, s=2, linewidths=0)
                axis.set(aspect="equal")
            else:
                tiles = found.samples[:144, 0].reshape(12, 12, *found.samples.shape[2:])
                axis.imshow(tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1), cmap="gray_r", vmin=0, vmax=1)
            axis.set(title=f"{name}, {cost.upper()}", xticks=[], yticks=[])
    with fresh_file(file) as partial:
        figure.savefig(partial, dpi=75, format=file.suffix.removeprefix(".") or "png")


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Train for a moment only, to see that it runs.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each generator.")] = 3000,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to draw what came out.")] = None,
) -> None:
    """Train generators by minimisation alone, on two sets at two costs.

    Example: python -m jobs.critic --picture critic.png
    """
    if picture is not None and find_spec("matplotlib") is None:
        raise distot.InputError("a picture needs matplotlib: pip install 'distot[bench]'")
    if picture is not None:
        check_out(picture)
    steps = 60 if quick else steps
    results: dict[str, dict[str, Result]] = {}
    say("set          cost  modes  worst share  between  FD        distance             training")
    costs: tuple[Cost, ...] = ("w2", "w1")
    for name, size in (("gaussians8", 1024), ("digits", 1024)):
        data = load(name, 2000 if quick else None)
        judge = Judge(data, count=1000 if quick else 5000)
        for cost in costs:
            found = minimise(data, cost, min(size, len(data.values)), steps, judge)
            results.setdefault(name, {})[cost] = found
            its = found.scores
            distance = f"{found.distance.value:.4f} ± {found.distance.error:.4f}"
            say(
                f"{name:<12} {cost:<5} {its.covered:<6.0%} {found.worst:<12.1%} {its.between:<8.1%} "
                f"{its.frechet:<9.4g} {distance:<20} {found.seconds:.0f} s"
            )
    if picture is not None:
        draw(results, picture)
        say(f"\npicture: {picture}")


if __name__ == "__main__":
    start(main)
