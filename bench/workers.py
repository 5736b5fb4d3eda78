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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import write
from cluster.workers import Shape, on_workers
from distot.case import Room
from distot.ingest import ingest
from distot.schedule import Options
from distot.work import Solve

GRIDS = ((1, 1), (2, 1), (2, 2), (4, 1))  # workers, replicas
SHARES = ((1, 1), (2, 1), (4, 1))
WIDE = (100_000, 1024)  # latents that need more memory than everything else


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
        where = Path(folder)
        found = measured(where, args.n, args.dim, args.per_atom * args.n, GRIDS)
        shares = measured(where, *WIDE, 2000, SHARES)
        lines = rates(args.n, args.dim, args.per_atom, found) + memory(*WIDE, shares) + losses(where, args.kills)
    write("workers", "Workers against one process", lines)


def cloud(n: int, d: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    generator = np.random.default_rng(0)
    centres = 3 * generator.standard_normal((50, d))
    rows = centres[generator.integers(50, size=n)] + generator.standard_normal((n, d)) * np.linspace(1.5, 0.2, d)
    return rows.astype(np.float32)


def one(latents: Path, workers: int, replicas: int, samples: int) -> dict[str, Any]:
    """Seconds from the command to events of a run, and the most memory of each of its processes."""
    began, events, pids, before = time.time(), [], [os.getpid()], peak(os.getpid())

    def listen(event: dict[str, Any]) -> None:
        nonlocal pids
        pids = event.get("pids", pids)
        events.append(event | {"memory": [peak(pid) for pid in pids]})

    options = Options(until_chi2=None, max_samples=samples, assigner="native", certificate_samples=10_000)
    task = Solve(latents, "gaussian", None, options, latents.with_suffix(f".{workers}x{replicas}.zarr"))
    if workers == 1:
        task(Room(show=False, on_event=listen))
    else:
        on_workers(task, Shape(workers, replicas), False, listen)
    steps = [event for event in events if event["event"] == "step"] or events[:1]
    begin = next(event["time"] for event in events if event["event"] == "begin")
    taken = steps[-1]["time"] - steps[0]["time"]
    return {
        "begin": begin - began,
        "start": steps[0]["time"] - begin,
        "rate": (steps[-1]["samples"] - steps[0]["samples"]) / taken if taken else 0.0,
        "memory": max(max(event["memory"]) for event in events),
        "least": before if workers == 1 else max(events[0]["memory"]),
        "sent": steps[-1].get("sent", 0),
    }


def peak(pid: int) -> int:
    """Most bytes that a process has held; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def measured(folder: Path, n: int, d: int, samples: int, grids: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """``one`` for each grid, in a process of its own."""
    np.save(folder / "z.npy", cloud(n, d))
    latents = folder / f"{n}x{d}.latents.zarr"
    ingest(folder / "z.npy", latents)
    found = []
    for workers, replicas in grids:
        command = [sys.executable, "-m", "bench.workers", "--one", str(latents), str(workers), str(replicas)]
        done = subprocess.run([*command, str(samples)], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(workers, replicas, found[-1], file=sys.stderr)
    return found


def rates(n: int, d: int, per_atom: int, found: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"N = {n:,}, d = {d}, {per_atom} plain samples for each atom, assigner native. Rates are those of the steps, "
        "looks and updates included; seconds to begin run from the command to the first event of the solver, Ray, "
        "imports and reading included.",
        "",
        "| grid | samples/s | of one process | s to begin | s of the start | MB sent |",
        "|---|---|---|---|---|---|",
    ]
    for (workers, replicas), its in zip(GRIDS, found, strict=True):
        lines.append(
            f"| {workers // replicas} x {replicas} | {its['rate']:,.0f} | {its['rate'] / found[0]['rate']:.2f} | "
            f"{its['begin']:.1f} | {its['start']:.1f} | {its['sent'] / 1e6:,.1f} |"
        )
    return lines


def memory(n: int, d: int, found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        f"Memory where latents are most of it: N = {n:,}, d = {d}, {4 * n * d / 2**20:,.0f} MiB as float32, and as "
        "much again turned for orbits. The most that a process has held, less what it held before it read.",
        "",
        "| grid | MiB of a process | before | of one process |",
        "|---|---|---|---|",
    ]
    base = found[0]["memory"] - found[0]["least"]
    for (workers, _), its in zip(SHARES, found, strict=True):
        own = its["memory"] - its["least"]
        lines.append(f"| {workers} x 1 | {own / 2**20:,.0f} | {its['least'] / 2**20:,.0f} | {own / base:.2f} |")
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
    left = kills

    def listen(event: dict[str, Any]) -> None:
        nonlocal left
        events.append(event)
        if left and (event["event"] == "resume" or (event["event"] == "checkpoint" and left == kills)):
            left -= 1
            pids = next(e["pids"] for e in reversed(events) if e["event"] == "workers")
            threading.Timer(luck.uniform(0.5, 3.0), os.kill, (luck.choice(pids), signal.SIGKILL)).start()

    task = Solve(latents, "gaussian", None, options, folder / "losses.zarr")
    began = time.monotonic()
    found = on_workers(task, Shape(2), False, listen)
    taken = time.monotonic() - began
    left = 0
    undisturbed = on_workers(replace(task, run=folder / "undisturbed.zarr"), Shape(2), False)
    redone, reached, saved = 0, 0, 0
    for event in events:
        if event["event"] == "step":
            redone += event["samples"] <= reached
            reached = max(reached, event["samples"])
        saved += event["event"] == "checkpoint"
    groups = sum(event["event"] == "workers" for event in events)
    difference = np.abs(found.heights - undisturbed.heights).max() / np.abs(undisturbed.heights).max()
    return [
        "",
        f"Killed {groups - 1} times in one run of two workers (N = {n:,}, d = {d}, SIGKILL 0.5 to 3 s after a start, "
        f"first or second worker by chance): the run ended by itself after {taken:.0f} s, {saved} checkpoints, "
        f"{redone} steps done twice. Heights differ from those of a run that nobody disturbed by {difference:.1e} "
        f"of the largest; chi2 of the certificates {found.certificate.chi2:.6f} and "
        f"{undisturbed.certificate.chi2:.6f}.",
    ]


if __name__ == "__main__":
    main()
