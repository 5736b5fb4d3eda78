"""Generation on mixtures and a swiss roll: does every mode get its share, and does anything fall between?

python -m bench.modes [-n 2000] [--samples 100000]

The extended map with the angle test, as it comes and balanced, beside the same interpolation without the test.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

import distot
from bench.report import write

Array = NDArray[np.float64]
PICTURE = Path(__file__).parent.parent / "docs/pictures/modes.png"
SPREAD = 0.05
MAPS: dict[str, dict[str, Any]] = {
    "angle test": {},
    "balanced": {"balance": True},
    "no test": {"quantile": 1.0, "threshold": np.pi},
}


@dataclass(frozen=True)
class Toy:
    """Latents with the mode of each, and points that the law is concentrated at, within about ``width``."""

    name: str
    latents: Array
    mode: NDArray[np.int64]
    core: Array
    core_mode: NDArray[np.int64]
    width: float


def mixture(name: str, means: Array, n: int) -> Toy:
    mode = np.arange(n) % len(means)
    latents = means[mode] + SPREAD * np.random.default_rng(0).standard_normal((n, 2))
    return Toy(name, latents, mode, means, np.arange(len(means)), 5 * SPREAD)


def ring(n: int) -> Toy:
    angle = np.arange(8) * np.pi / 4
    return mixture("8 Gaussians", 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1), n)


def lattice(n: int) -> Toy:
    side = np.arange(-2.0, 3.0)
    return mixture("25 Gaussians", np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2), n)


def roll(n: int) -> Toy:
    """A spiral of two turns; its modes are eight pieces of equally many latents."""

    def curve(u: Array) -> Array:
        angle = 1.5 * np.pi * (1 + 2 * u)
        return np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / 7

    u = np.random.default_rng(0).random(n)
    noise = SPREAD * np.random.default_rng(1).standard_normal((n, 2))
    fine = np.linspace(0, 1, 4000)
    latents, order = curve(u) + noise, np.argsort(np.argsort(u))
    cuts = np.sort(u)[n // 8 :: n // 8][:7]
    return Toy("swiss roll", latents, order * 8 // n, curve(fine), np.searchsorted(cuts, fine), 5 * SPREAD)


def judged(toy: Toy, made: distot.Generated) -> tuple[float, float]:
    """Largest relative error of a mode's share, and the share of samples that lie between modes."""
    away, nearest = KDTree(toy.core).query(made.samples)
    modes = int(toy.mode.max()) + 1
    got, wanted = (np.bincount(its, minlength=modes) / len(its) for its in (toy.core_mode[nearest], toy.mode))
    return float(np.abs(got / wanted - 1).max()), float((away > toy.width).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=100_000)
    args = parser.parse_args()
    lines = [
        f"{args.n:,} latents, exact heights, {args.samples:,} samples. *Worst share*: largest relative error "
        "of a mode's share. *Between*: samples farther than five standard deviations from every mode or the curve.",
        "",
        "| set | map | refused | worst share | between |",
        "|---|---|---|---|---|",
    ]
    makers: tuple[Callable[[int], Toy], ...] = (ring, lattice, roll)
    _, axes = plt.subplots(len(makers), 1 + len(MAPS), figsize=(12, 9.2), squeeze=False)
    for row, maker in zip(axes, makers, strict=True):
        toy = maker(args.n)
        solution = distot.solve(toy.latents, exact=True)
        show(row[0], toy.latents, f"{toy.name}: latents", "0.2")
        for place, (name, options) in zip(row[1:], MAPS.items(), strict=True):
            made = solution.generate(args.samples, **options)
            worst, between = judged(toy, made)
            refused = 0.0 if options.get("balance") else len(made.singular) / made.drawn
            lines.append(f"| {toy.name} | {name} | {refused:.1%} | {worst:.1%} | {between:.3%} |")
            show(place, made.samples[:6000], f"{name}: {between:.2%} between", "C0" if between < 0.001 else "C3")
        print("\n".join(lines[-len(MAPS) :]))
    plt.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    plt.savefig(PICTURE, dpi=65)
    write("modes", "Every mode, and nothing between", lines)


def show(place: Any, points: NDArray[Any], title: str, colour: str) -> None:
    place.scatter(*points.T, s=2, c=colour, linewidths=0)
    place.set(title=title, aspect="equal", xticks=[], yticks=[])


if __name__ == "__main__":
    main()
