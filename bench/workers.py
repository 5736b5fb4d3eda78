"""What sharing costs: rate, start-up and memory of workers against one process, and a run whose workers keep dying.

python -m bench.workers [-n 200000] [--dim 32] [--per-atom 4] [--kills 20]

Every grid runs in a process of its own, with as many threads in all as the machine has cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import distot
from bench.report import write
from cluster.workers import Shape, on_workers
from distot.case import Room
from distot.ingest import ingest
from distot.schedule import Options
from distot.work import Solve, Task

GRIDS = ((1, 1), (2, 1), (2, 2), (4, 1))  # workers, replicas; the last one for its memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--per-atom", type=int, default=4, help="work, in plain samples for each atom")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--one", nargs=4, metavar=("LATENTS", "WORKERS", "REPLICAS", "SAMPLES"))
    args = parser.parse_args()
    if args.one:
        latents, *numbers = args.one
        print(json.dumps(one(Path(latents), *map(int, numbers))))
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = grids(Path(folder), args.n, args.dim, args.per_atom) + losses(Path(folder), args.kills)
    write("workers", "Workers against one process", lines)


def cloud(n: int, d: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    generator = np.random.default_rng(0)
    centres = 3 * generator.standard_normal((50, d))
    rows = centres[generator.integers(50, size=n)] + generator.standard_normal((n, d)) * np.linspace(1.5, 0.2, d)
    return rows.astype(np.float32)


def one(latents: Path, workers: int, replicas: int, samples: int) -> dict[str, Any]:
    """Seconds from the command to events of a run, and the most memory of each of its processes."""
    began, events, pids = time.time(), [], [os.getpid()]

    def listen(event: dict[str, Any]) -> None:
        nonlocal pids
        pids = event.get("pids", pids)
        events.append(event | {"memory": [peak(pid) for pid in pids]})

    options = Options(until_chi2=None, max_samples=samples, assigner="native", certificate_samples=10_000)
    task = Solve(latents, "gaussian", None, options, latents.with_name(f"{workers}x{replicas}.zarr"))
    if workers == 1:
        task(Room(show=False, on_event=listen))
    else:
        on_workers(task, Shape(workers, replicas), False, listen)
    steps = [event for event in events if event["event"] == "step"]
    at = {name: next(e["time"] for e in events if e["event"] == name) - began for name in ("begin", "step")}
    return {
        "begin": at["begin"],
        "start": steps[0]["time"] - began - at["begin"],
        "rate": (steps[-1]["samples"] - steps[0]["samples"]) / (steps[-1]["time"] - steps[0]["time"]),
        "memory": max(max(event["memory"]) for event in events),
        "sent": steps[-1].get("sent", 0),
    }


def peak(pid: int) -> int:
    """Most bytes that a process has held; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def grids(folder: Path, n: int, d: int, per_atom: int) -> list[str]:
    np.save(folder / "z.npy", cloud(n, d))
    ingest(folder / "z.npy", folder / "z.zarr")
    found = []
    for workers, replicas in GRIDS:
        command = [sys.executable, "-m", "bench.workers", "--one", str(folder / "z.zarr")]
        command += [str(workers), str(replicas), str(per_atom * n)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(workers, replicas, found[-1], file=sys.stderr)
    base = found[0]
    lines = [
        f"N = {n:,}, d = {d}, {per_atom} plain samples for each atom, assigner native; latents are "
        f"{4 * n * d / 2**20:.0f} MiB in float32. Rates are those of the steps, everything but the start included; "
        "seconds to begin run from the command to the first event of the solver, Ray, imports and reading included.",
        "",
        "| grid | samples/s | of one process | s to begin | s of the start | MiB of a process | MB sent |",
        "|---|---|---|---|---|---|---|",
    ]
    for (workers, replicas), its in zip(GRIDS, found, strict=True):
        lines.append(
            f"| {workers // replicas} x {replicas} | {its['rate']:,.0f} | {its['rate'] / base['rate']:.2f} | "
            f"{its['begin']:.1f} | {its['start']:.1f} | {its['memory'] / 2**20:,.0f} | {its['sent'] / 1e6:,.1f} |"
        )
    return lines


def losses(folder: Path, kills: int) -> list[str]:
    """A run of two workers, one of which is killed at random moments, again and again."""
    n, d = 3000, 5
    latents = np.random.default_rng(3).standard_normal((n, d)) * np.linspace(2, 0.4, d)
    options = Options(
        until_chi2=None, max_samples=400 * n, assigner="native", certificate_samples=20_000, checkpoint_seconds=0.3
    )
    events: list[dict[str, Any]] = []
    luck = random.Random(0)
    left = [kills]

    def listen(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] in ("begin", "resume") and left[0]:
            left[0] -= 1
            pids = next(e["pids"] for e in reversed(events) if e["event"] == "workers")
            threading.Timer(luck.uniform(0.3, 2.5), os.kill, (luck.choice(pids), signal.SIGKILL)).start()

    task: Task = Solve(latents, "gaussian", None, options, folder / "losses.zarr")
    began = time.monotonic()
    found = on_workers(task, Shape(2), False, listen)
    taken = time.monotonic() - began
    alone = distot.solve(
        latents,
        until_chi2=None,
        max_samples=400 * n,
        assigner="native",
        certificate_samples=20_000,
        progress=False,
    )
    redone, reached, saved = 0, 0, 0
    for event in events:
        if event["event"] == "step":
            redone += event["samples"] <= reached
            reached = max(reached, event["samples"])
        saved += event["event"] == "checkpoint"
    groups = sum(event["event"] == "workers" for event in events)
    difference = np.abs(found.heights - alone.heights).max() / np.abs(alone.heights).max()
    return [
        "",
        f"Killed {groups - 1} times in one run of two workers (N = {n:,}, d = {d}, SIGKILL 0.3 to 2.5 s after a start, "
        f"first or second worker by chance): the run ended by itself after {taken:.0f} s, {saved} checkpoints, "
        f"{redone} steps done twice. Heights differ from those of one process that was left alone by {difference:.1e} "
        f"of the largest; chi2 of the certificates {found.certificate.chi2:.6f} and {alone.certificate.chi2:.6f}.",
    ]


if __name__ == "__main__":
    main()
