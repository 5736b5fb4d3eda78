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

TURNS = 5  # of the race
PEAKS = ("read", "searched", "started", "stepped")
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
    list(assign.searches(problem, search, Stream.STEP, 0, SAMPLES, heights, 2, lambda: None))
    found["searched"] = status("VmHWM") - before
    heights, work = start.multilevel(problem, "native", lambda: None)
    found["started"] = status("VmHWM") - before
    state, mass = optim.begin(heights, work, problem.target.split), torch.from_numpy(problem.target.mass)
    state = descent.advance(problem, search, state, mass, Stream.STEP, 0, lambda: None)
    found["stepped"] = status("VmHWM") - before
    return found | {"heights": hashlib.sha256(state.heights.numpy().tobytes()).hexdigest()}


def race(path: str, gib: float) -> list[dict[str, float]]:
    """Seconds a point of searches by kind of latents, by the clock and of the CPU, taken by turns: the least."""
    found: list[dict[str, float]] = []
    problems = [build_problem(open_latents(path), memory=share * gib) for _, share in KINDS]
    searches = [assign.over(problem, "native") for problem in problems]
    heights = torch.zeros(problems[0].target.n, dtype=torch.float64)
    for turn in range(TURNS + 1):  # in the first one atoms are turned for the orbits and kept, if they are
        for kind, (problem, search) in enumerate(zip(problems, searches, strict=True)):
            began, used, points = time.perf_counter(), time.process_time(), 0
            for group in assign.searches(problem, search, Stream.STEP, 0, SAMPLES, heights, 2, lambda: None):
                points += sum(len(x) for _, x, _ in group)
            now = {"clock": (time.perf_counter() - began) / points, "cpu": (time.process_time() - used) / points}
            if turn < 2:
                found[kind : kind + 1] = [now]
            else:
                found[kind] = {name: min(now[name], found[kind][name]) for name in now}
    return found


def main() -> None:
    if Path(sys.argv[1] if len(sys.argv) > 1 else "1").exists():  # a process of its own for each kind
        print(json.dumps(measure(sys.argv[1], float(sys.argv[2]))))
        return
    n, d = (int(float(text)) for text in [*sys.argv[1:], *("4e4", "512")[len(sys.argv) - 1 :]])
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
        times = race(str(path), gib)
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
        "| latents | read | searched | started | stepped |",
        "|---|---|---|---|---|",
    ]
    for (name, _), row in zip(KINDS, rows, strict=True):
        lines.append(f"| {name} | {' | '.join(f'{row[of]:,.0f} MB' for of in PEAKS)} |")
    lines += [
        "",
        f"Those searches, by turns in one process, the best of {TURNS}; on disk means in the page cache here.",
        "",
        "| latents | µs a point | ratio | µs of the CPU | ratio |",
        "|---|---|---|---|---|",
    ]
    for (name, _), its in zip(KINDS, times, strict=True):
        columns = [f"{1e6 * its[of]:,.1f} | {its[of] / times[0][of]:.2f}" for of in ("clock", "cpu")]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    lines += [
        "",
        f"The heights are {'the same' if same else 'NOT the same'}, bit for bit.",
        "",
        "What does not shrink: sums and nodes of the start, the 16,384 rows of the survey (8 d bytes each), tiles, "
        "vectors. Searches cost more by turning atoms to the blocks of orbits anew, 2 d² flops in float64 an atom "
        "and pass, and by framing, 2 to 3 ns a number: both are shared by all samples of a pass; here it has few.",
    ]
    write("memory", "Memory of latents", lines)


if __name__ == "__main__":
    main()
