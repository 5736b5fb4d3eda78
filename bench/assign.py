"""Rates of the assigners against plain torch (one matrix product and max by tiles), best and runner-up.

python -m bench.assign [--quick]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.report import write
from distot import assign

BATCH = 4096


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


def main(quick: bool) -> None:
    lines = [
        "GFLOP/s (2 N d flops a sample, batch of 4,096).",
        "",
        "| N | d | dense | faiss | plain torch, best only |",
    ]
    lines.append("|---|---|---|---|---|")
    for n in (10_000,) if quick else (10_000, 100_000):
        for d in (2, 8, 16, 32, 64, 128, 512):
            generator = torch.Generator().manual_seed(0)
            atoms, x = torch.randn(n, d, generator=generator), torch.randn(BATCH, d, generator=generator)
            heights = -0.5 * atoms.square().sum(1)
            flops = 2e-9 * n * d * BATCH
            dense, faiss = (assign.build(name, atoms) for name in ("dense", "faiss"))
            calls = (partial(dense, x, heights, 2), partial(faiss, x, heights, 2), partial(plain, x, atoms, heights))
            times = [seconds(call) for call in calls]
            lines.append(f"| {n:,} | {d} | " + " | ".join(f"{flops / t:.0f}" for t in times) + " |")
    write("assign", "Nearest power cell", lines)


if __name__ == "__main__":
    main("--quick" in sys.argv)
