"""Generation on mixtures and a swiss roll: does every mode get its share, and does anything fall between?

python -m bench.modes [-n 2000] [--samples 100000]

The extended map with the angle test, as it comes and balanced, beside the same interpolation without the test.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

import distot
from bench.report import write
from distot.models import Data, load
from distot.models.datasets import REACH

PICTURE = Path(__file__).parent.parent / "docs/pictures/modes.png"
TOYS = {"gaussians8": "8 Gaussians", "gaussians25": "25 Gaussians", "swissroll": "swiss roll"}
MAPS: dict[str, dict[str, Any]] = {
    "angle test": {},
    "balanced": {"balance": True},
    "no test": {"quantile": 1.0, "threshold": np.pi},
}


def judged(data: Data, made: distot.Generated) -> tuple[float, float]:
    """Largest relative error of a mode's share, and the share of samples that lie between modes."""
    assert data.core is not None
    away, nearest = KDTree(data.core.points).query(made.samples)
    got = np.bincount(data.core.mode[nearest], minlength=data.classes) / len(nearest)
    return float(np.abs(got / data.shares.numpy() - 1).max()), float((away > REACH).mean())


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
    _, axes = plt.subplots(len(TOYS), 1 + len(MAPS), figsize=(12, 9.2), squeeze=False)
    for row, (name, title) in zip(axes, TOYS.items(), strict=True):
        data = load(name, args.n)
        solution = distot.solve(data.values, exact=True)
        show(row[0], data.values.numpy(), f"{title}: latents", "0.2")
        for place, (way, options) in zip(row[1:], MAPS.items(), strict=True):
            made = solution.generate(args.samples, **options)
            worst, between = judged(data, made)
            refused = 0.0 if options.get("balance") else len(made.singular) / made.drawn
            lines.append(f"| {title} | {way} | {refused:.1%} | {worst:.1%} | {between:.3%} |")
            show(place, made.samples[:6000], f"{way}: {between:.2%} between", "C0" if between < 0.001 else "C3")
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
