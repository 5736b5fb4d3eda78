"""Peak memory and the time of a search by where latents are: float32, halves in memory, halves on disk.

python -m bench.memory [N [D]]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import distot
from bench.report import write
from distot import assign
from distot.problem import build_problem
from distot.source import Stream
from distot.store import new_latents, open_latents

BLOCK = 50_000  # rows drawn at a time


def status(name: str) -> float:
    """MB of this process, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def measure(path: str, memory: float, samples: int) -> dict[str, Any]:
    """What this process needs for one solve by so many samples, above what it had when all was loaded."""
    small = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float16)
    distot.solve(small, max_samples=6000, certificate_samples=100, assigner="native", progress=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    problem = build_problem(open_latents(path), memory=memory)
    read = status("VmHWM") - before
    search, heights = assign.over(problem, "native"), torch.zeros(problem.target.n, dtype=torch.float64)
    seconds, points = 0.0, 0
    for _ in range(3):
        began, points = time.perf_counter(), 0
        group = next(assign.searches(problem, search, Stream.CERTIFY, 0, 60_000, heights, 2, lambda: None))
        points += sum(len(x) for _, x, _ in group)
        seconds = min(seconds or 1e9, time.perf_counter() - began)
    searched, kept = status("VmHWM") - before, problem.target.atoms.kept
    del problem, search, heights, group
    began = time.perf_counter()
    found = distot.solve(
        path,
        until_chi2=None,
        max_samples=samples,
        certificate_samples=2000,
        memory=memory,
        assigner="native",
        progress=False,
    )
    return {
        "kept": kept,
        "read": read,
        "searched": searched,
        "solved": status("VmHWM") - before,
        "points": points,
        "search": seconds,
        "solve": time.perf_counter() - began,
        "heights": float(np.sum(found.heights[:1000])),
    }


def main() -> None:
    if len(sys.argv) > 3:
        print(json.dumps(measure(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))))
        return
    n, d = (int(float(text)) for text in (*sys.argv[1:], "1e6", "64")[:2]) if len(sys.argv) != 2 else (int(float(sys.argv[1])), 64)
    gib, load = 4 * n * d / 2**30, os.getloadavg()[0]
    lines = [
        f"N = {n:,} random latents of dimension {d}, stored as float16 ({2 * n * d / 1e6:,.0f} MB; as float32 "
        f"{4 * n * d / 1e6:,.0f} MB), source N(0, I). `python -m bench.memory {n} {d}`; load average {load:.1f} at the "
        "beginning, without which it would be 0: the machine was shared." if load > 0.5 else "",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "z.zarr"
        with new_latents(path, (n, d), "float16", "drawn for a measurement") as writer:
            for first in range(0, n, BLOCK):
                rows = np.random.default_rng(first).standard_normal((min(BLOCK, n - first), d), dtype=np.float32)
                writer.write(rows)
    print(lines, gib)


if __name__ == "__main__":
    main()
