"""Samples that a solve needs where some latents lie close to others, as a multiple of those without such twins.

    python -m bench.twins

A quarter of N = 2,000 normal latents is copied, at a distance of a part of a deviation. Reports go to bench/reports/.
"""

from __future__ import annotations

import warnings

import numpy as np

import distot
from bench.problems import Array
from bench.report import write

N, SEEDS = 2000, (1, 2)
DIMENSIONS, DISTANCES = (2, 16, 384), (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
GROUPS = ((20, 1), (500, 1), (250, 4))  # latents that have copies, and how many


def latents(d: int, seed: int, originals: int = 0, copies: int = 0, distance: float = 0.0) -> Array:
    generator = np.random.default_rng(seed)
    y, away = generator.standard_normal((N, d)), generator.standard_normal((originals * copies, d))
    y[N - len(away) :] = np.tile(y[:originals], (copies, 1)) + distance / d**0.5 * away
    return y.astype(np.float32)


def needed(d: int, *twins: float) -> tuple[float, float]:
    """Samples a latent to chi2 <= 0.05, and the largest chi2 of the certificates."""
    found = [
        distot.solve(latents(d, seed, *twins), seed=seed, max_samples=200 * N, progress=False)  # type: ignore[arg-type]
        for seed in SEEDS
    ]
    return float(np.mean([its.samples for its in found])) / N, max(its.certificate.chi2 for its in found)


def main() -> None:
    warnings.simplefilter("ignore", distot.DistotWarning)
    lines = [
        f"N = {N:,} normal latents, goal 0.05, mean of {len(SEEDS)} seeds: samples a latent, as a multiple of those "
        "without twins, and the larger chi2. Runs end at 200 samples a latent.",
        "",
        "| d | without | twins | " + " | ".join(f"at {distance:.0e}" for distance in DISTANCES) + " |",
        "|---|---|---|" + "---|" * len(DISTANCES),
    ]
    for d in DIMENSIONS:
        plain, _ = needed(d)
        for originals, copies in GROUPS:
            cells = []
            for distance in DISTANCES:
                samples, chi2 = needed(d, originals, copies, distance)
                cells.append(f"{samples / plain:.2f}, {chi2:.3f}")
            lines.append(f"| {d} | {plain:.1f} | {originals} with {copies} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    write("twins", "Latents that lie close together", lines)


if __name__ == "__main__":
    main()
