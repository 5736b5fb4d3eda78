"""Peak memory, and the time of a search, by where latents are: float32 in memory, halves in memory, halves on disk.

python -m bench.memory [N] [D]
"""

from __future__ import annotations

import hashlib
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
from distot import assign, descent, optim, start
from distot.problem import build_problem
from distot.source import Stream
from distot.store import new_latents, open_latents

BLOCK = 50_000  # rows drawn at a time
SAMPLES = 60_000  # of an orbit's points, searched for the time of a pass
KINDS = ("float32 in memory", 1e3), ("float16 in memory", 0.75), ("on disk", 0.01)  # memory: of that of float32


def status(name: str) -> float:
    """MB of this process, by a name of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def measure(path: str, memory: float) -> dict[str, Any]:
    """Peaks in MB above what the process had when everything was loaded, and seconds."""
    small = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float16)
    distot.solve(small, max_samples=6000, certificate_samples=100, assigner="native", progress=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    problem = build_problem(open_latents(path), memory=memory)
    found: dict[str, Any] = {"kept": problem.target.atoms.kept, "read": status("VmHWM") - before}
    search, heights = assign.over(problem, "native"), torch.zeros(problem.target.n, dtype=torch.float64)
    times, points = [], 0
    for _ in range(3):  # atoms turned for the orbits are kept from the first on, if they are
        began, points = time.perf_counter(), 0
        for group in assign.searches(problem, search, Stream.STEP, 0, SAMPLES, heights, 2, lambda: None):
            points += sum(len(x) for _, x, _ in group)
        times.append((time.perf_counter() - began) / points)
    found |= {"search": min(times), "searched": status("VmHWM") - before}
    began = time.perf_counter()
    heights, work = start.multilevel(problem, "native", lambda: None)
    found |= {"start": time.perf_counter() - began, "started": status("VmHWM") - before}
    state, mass = optim.begin(heights, work, problem.target.split), torch.from_numpy(problem.target.mass)
    began = time.perf_counter()
    state = descent.advance(problem, search, state, mass, Stream.STEP, 0, lambda: None)
    found |= {"step": time.perf_counter() - began, "stepped": status("VmHWM") - before}
    return found | {"heights": hashlib.sha256(state.heights.numpy().tobytes()).hexdigest()}


def main() -> None:
    if Path(sys.argv[1] if len(sys.argv) > 1 else "1").exists():  # a process of its own for each kind
        print(json.dumps(measure(sys.argv[1], float(sys.argv[2]))))
        return
    n, d = (int(float(text)) for text in [*sys.argv[1:], *("2e5", "256")[len(sys.argv) - 1 :]])
    gib, load = 4 * n * d / 2**30, os.getloadavg()[0]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "z.zarr"
        with new_latents(path, (n, d), "float16", "drawn for a measurement") as writer:
            for first in range(0, n, BLOCK):
                rng = np.random.default_rng(first)
                writer.write(rng.standard_normal((min(BLOCK, n - first), d), dtype=np.float32))
        for _, share in KINDS:
            command = [sys.executable, "-m", "bench.memory", str(path), str(share * gib)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout))
            print({name: value for name, value in rows[-1].items() if name != "heights"}, flush=True)
    same = all(row["heights"] == rows[0]["heights"] for row in rows)
    lines = [
        f"N = {n:,} random latents of dimension {d}, stored as float16 ({2 * n * d / 1e6:,.0f} MB; as float32 "
        f"{4 * n * d / 1e6:,.0f} MB), source N(0, I), assigner native. `python -m bench.memory {n} {d}`",
        "",
        f"Load average {load:.1f} when it began: "
        + ("the machine was shared, and times are rough." if load > 0.5 else "the machine was idle."),
        "",
        "Peaks are of resident memory above what the process had when everything was loaded: after reading, after "
        f"searches with orbits ({SAMPLES:,} points), after the multilevel start, after a step.",
        "",
        "| latents | read | searched | started | stepped | µs a point | ratio | start | step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, _), row in zip(KINDS, rows, strict=True):
        peaks = " | ".join(f"{row[of]:,.0f} MB" for of in ("read", "searched", "started", "stepped"))
        lines.append(
            f"| {name} | {peaks} | {1e6 * row['search']:,.1f} | {row['search'] / rows[0]['search']:.2f} "
            f"| {row['start']:,.0f} s | {row['step']:,.0f} s |"
        )
    lines += ["", f"The heights are {'the same' if same else 'NOT the same'}, bit for bit."]
    write("memory", "Memory of latents", lines)


if __name__ == "__main__":
    main()
