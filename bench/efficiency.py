"""Sample efficiency e = (n - 1) / (M chi2), math (11), of distot and of POT with its defaults, all samples counted.

    python -m bench.efficiency [--quick]

The same evaluation for both: chi2 of the heights on fresh samples, by the certificate's estimator.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

import distot
from bench.report import write
from distot import assign
from distot.certify import certify
from distot.power import weights_to_heights
from distot.problem import build_problem
from jobs.patches import patches

Array = NDArray[np.float64]


def clusters(n: int, dim: int = 48, count: int = 30) -> Array:
    """Clusters of very different mass and width."""
    generator = np.random.default_rng(0)
    centres, widths = 2 * generator.standard_normal((count, dim)), np.exp(generator.normal(-1, 0.7, count))
    label = generator.choice(count, n, p=generator.dirichlet(np.full(count, 0.5)))
    return centres[label] + widths[label, None] * generator.standard_normal((n, dim))


def problems(quick: bool) -> dict[str, Array]:
    """Latents by name, scaled to unit variance on average so that POT's defaults have a fair start."""
    n = 2000 if quick else 5000
    generator = np.random.default_rng(0)
    found = {
        "patches, d = 32": patches(n, 32),
        "patches, whitened, d = 32": patches(n, 32, whiten=True),
        "patches, d = 192": patches(n, 192),
        "digits, d = 64": load_digits().data,
        "Student t, d = 10": generator.standard_t(3, (n, 10)),
        "clusters, d = 48": clusters(n),
        "plane in space, d = 50": generator.standard_normal((n, 2)) @ generator.standard_normal((2, 50)),
        "normal, d = 1": generator.standard_normal((n // 10, 1)),
    }
    return {name: (y - y.mean(axis=0)) / np.sqrt(y.var(axis=0).mean()) for name, y in found.items()}


def measure(y: Array, heights: Array) -> float:
    """chi2 of user heights on fresh samples."""
    problem = build_problem(y)
    frame, target = problem.frame, problem.target
    inside = (heights[target.original] + target.tilt) / frame.unit
    search = assign.build("auto", target.atoms)
    return certify(problem, search, torch.from_numpy(inside - inside.mean()), 40 * target.n, step=1).chi2


def main(quick: bool) -> None:
    lines = [
        "| latents | N | samples per atom | distot e | POT e | distot s | POT s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, y in problems(quick).items():
        n = len(y)
        for per_atom in (20, 50):
            began = time.perf_counter()
            ours = distot.solve(y, until_chi2=None, max_samples=per_atom * n, progress=False, certificate_samples=2)
            middle = time.perf_counter()
            generator = np.random.default_rng(0)
            g = ot.semidiscrete.solve_semidiscrete(
                y,
                sampler_source=lambda b, g=generator, d=y.shape[1]: g.standard_normal((b, d)),
                max_iter=per_atom * n // 1000,
                batch_size=1000,
            )
            end = time.perf_counter()
            chi2 = [measure(y, ours.heights), measure(y, weights_to_heights(np.asarray(g), y))]
            e = [(n - 1) / (per_atom * n * value) for value in chi2]
            lines.append(
                f"| {name} | {n:,} | {per_atom} | {e[0]:.2f} | {e[1]:.3f} | {middle - began:.1f} | {end - middle:.1f} |"
            )
            print(lines[-1], flush=True)
    write("efficiency", "Sample efficiency, Gaussian source", lines)


if __name__ == "__main__":
    main("--quick" in sys.argv)
