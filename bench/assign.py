"""Rates of the assigners, best and runner-up, against plain torch (matrix product and max by tiles) and the machine.

    python -m bench.assign [--quick]

A rate is 2 N d flops a sample over the time; that of orbits too, which do fewer flops, so that rates compare times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from bench.report import REPORTS, write
from distot import assign
from distot.orbit import Orbit

matplotlib.use("agg")

DIMENSIONS = (2, 8, 16, 32, 64, 128, 256, 512)
BATCH = 4096
ROOM = 6.5e7  # numbers in the atoms of the largest problem
EFFORT = 3e11  # flops of a timed call; smaller batches where N d is large


def plain(x: Tensor, atoms: Tensor, heights: Tensor) -> Tensor:
    """What one would write first: tiles of scores, the best of each, the best of all."""
    best = torch.full((len(x),), -torch.inf)
    for start in range(0, len(atoms), 2048):
        tile = torch.addmm(heights[start : start + 2048], x, atoms[start : start + 2048].T)
        best = torch.maximum(best, tile.max(dim=1).values)
    return best


def seconds(work: Callable[[], object]) -> float:
    """The best of three, after a warm-up."""
    work()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def rates(n: int, d: int, batch: int) -> list[float]:
    """GFLOP/s of native, orbits, FAISS, dense and plain torch."""
    generator = torch.Generator().manual_seed(0)
    atoms, x = torch.randn(n, d, generator=generator), torch.randn(batch, d, generator=generator)
    heights = -0.5 * atoms.square().sum(1)
    orbit = Orbit(d, "rotations", 0)
    orbits = orbit.of(torch.randn(-(-batch // orbit.size), d, generator=generator), orbit.axes().float())
    native, faiss, dense = (assign.build(name, atoms) for name in ("native", "faiss", "dense"))
    calls: list[tuple[int, Callable[[], object]]] = [
        (batch, partial(native, x, heights, 2)),
        (len(orbits), partial(native, orbits, heights, 2)),
        (batch, partial(faiss, x, heights, 2)),
        (batch, partial(dense, x, heights, 2)),
        (batch, partial(plain, x, atoms, heights)),
    ]
    return [2e-9 * n * d * samples / seconds(call) for samples, call in calls]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="N = 10,000 alone")
    quick = parser.parse_args().quick
    square = torch.randn(3000, 3000)
    peak = 2e-9 * 3000**3 / seconds(lambda: square @ square)
    tiny = assign.build("native", torch.zeros(2, 2))
    overhead = seconds(lambda: tiny(torch.zeros(1, 2), torch.zeros(2), 2))
    lines = [
        f"GFLOP/s at 2 N d flops a sample. Matrix product of 3000 x 3000: {peak:.0f} GFLOP/s. A call of `native` with "
        f"one sample and two atoms: {1e6 * overhead:.0f} µs. `orbits` is `native` on orbits of a Gaussian, (17): its "
        "rate over that of `native` is how many times faster samples come.",
        "",
        "| N | d | batch | native | of matmul | / FAISS | / torch | orbits | / native | faiss | dense | torch, best |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    curves: dict[int, list[list[float]]] = {}
    for n in (10_000,) if quick else (10_000, 100_000, 1_000_000):
        for d in DIMENSIONS:
            if n * d > ROOM:
                continue
            batches = (256, BATCH, 65_536) if n == 10_000 and d == 32 else (BATCH,)
            for wanted in batches:
                batch = max(256, min(wanted, int(EFFORT / (2 * n * d))))
                native, orbits, faiss, dense, torch_only = found = rates(n, d, batch)
                if wanted == BATCH:
                    curves.setdefault(n, []).append([d, *found])
                ratios = f"{native / peak:.0%} | {native / faiss:.1f} | {native / torch_only:.1f}"
                lines.append(
                    f"| {n:,} | {d} | {batch:,} | {native:.0f} | {ratios} | {orbits:.0f} | {orbits / native:.1f} | "
                    f"{faiss:.0f} | {dense:.0f} | {torch_only:.0f} |"
                )
                print(lines[-1], flush=True)
    lines += ["", "![rates](assign.png)"]
    write("assign", "Nearest power cell", lines)
    plot(curves, peak)


def plot(curves: dict[int, list[list[float]]], peak: float) -> None:
    """Rate against dimension, one panel for each N."""
    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.2), squeeze=False, sharey=True)
    for panel, (n, rows) in zip(axes[0], curves.items(), strict=True):
        dimension, *series = zip(*rows, strict=True)
        for name, values in zip(("native", "orbits", "faiss", "dense", "torch"), series, strict=True):
            panel.loglog(dimension, values, "o-", label=name, markersize=3)
        panel.axhline(peak, color="k", linestyle="--", linewidth=1)
        panel.set_title(f"N = {n:,}", fontsize=9)
        panel.set_xlabel("dimension")
    axes[0][0].set_ylabel("GFLOP/s, 2 N d a sample")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(REPORTS / "assign.png", dpi=110)


if __name__ == "__main__":
    main()
