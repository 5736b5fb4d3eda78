"""Rates of the assigners, best and runner-up, against plain torch (matrix product and max by tiles) and the machine.

    python -m bench.assign [--quick]
    python -m bench.assign -n 1000000 -d 32 64  these rows alone
    python -m bench.assign --run RUN.zarr       on the latents of a run, at its heights

A rate is 2 N d flops a sample over the time; that of searches which do fewer flops, too, so that rates compare times.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import distot
from bench.report import REPORTS, write
from distot import assign
from distot.assign.auto import Auto
from distot.assign.likely import Likely
from distot.assign.lists import Lists
from distot.assign.native import Native
from distot.orbit import Orbit, points
from distot.source import Stream

matplotlib.use("agg")

SIZES = (10_000, 100_000, 1_000_000)
DIMENSIONS = (2, 8, 16, 32, 64, 128, 256, 512)
BATCH = 4096
ROOM = 6.5e7  # numbers in the atoms of the largest problem
EFFORT = 2e11  # flops of a timed call; smaller batches where N d is large
NAMES = ("native", "float32", "orbits", "lists", "auto", "faiss", "dense", "torch")


def peak() -> float:
    """GFLOP/s of bare fused multiply-adds: peak.cpp, run at once as many times as torch has threads."""
    source = Path(__file__).with_name("peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "peak")
        command = ["c++", "-O3", "-ffast-math", "-march=native", str(source), "-o", program]
        subprocess.run(command, check=True)
        running = [
            subprocess.Popen([program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for _ in range(torch.get_num_threads())
        ]
        return sum(float(process.communicate()[0]) for process in running)


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


def rates(n: int, d: int, batch: int) -> tuple[dict[str, float], str]:
    """GFLOP/s by name, and what auto chose; normal atoms, each its own centre (the heights of Voronoi cells)."""
    generator = torch.Generator().manual_seed(0)
    atoms, x = torch.randn(n, d, generator=generator), torch.randn(batch, d, generator=generator)
    heights = -0.5 * atoms.square().sum(1)
    orbit = Orbit(d, "rotations", 0)
    orbits = orbit.of(torch.randn(-(-batch // orbit.size), d, generator=generator), orbit.axes().float())
    native, faiss, dense, lists, auto = (
        assign.build(name, atoms) for name in ("native", "faiss", "dense", "lists", "auto")
    )
    for _ in range(4):  # they learn and choose
        for search in (native, lists, auto):
            search(x, heights, 2)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "native": (batch, partial(native, x, heights, 2)),
        "float32": (batch, partial(Native(atoms, narrow=False), x, heights, 2)),
        "orbits": (len(orbits), partial(native, orbits, heights, 2)),
        "lists": (batch, partial(lists, x, heights, 2)),
        "auto": (batch, partial(auto, x, heights, 2)),
        "faiss": (batch, partial(faiss, x, heights, 2)),
        "dense": (batch, partial(dense, x, heights, 2)),
        "torch": (batch, partial(plain, x, atoms, heights)),
    }
    return {name: 2e-9 * n * d * samples / seconds(call) for name, (samples, call) in calls.items()}, auto.name


def table(sizes: Sequence[int], dimensions: Sequence[int], name: str) -> None:
    square = torch.randn(3000, 3000)
    matmul = 2e-9 * 3000**3 / seconds(lambda: square @ square)
    bare = peak()
    tiny = assign.build("native", torch.zeros(2, 2))
    overhead = seconds(lambda: tiny(torch.zeros(1, 2), torch.zeros(2), 2))
    lines = [
        f"GFLOP/s at 2 N d flops a sample. Bare fused multiply-adds: {bare:.0f}, a matrix product of 3000 x 3000: "
        f"{matmul:.0f}. `native` takes candidates in bfloat16 where that is faster, `float32` never does, for the "
        f"same winners and scores. A call of `native` with one sample and two atoms: {1e6 * overhead:.0f} µs. "
        "`orbits`: `native` on orbits of a Gaussian, (17): its rate over that of `native` is how many times faster "
        "samples come. `lists` is exact. `auto` is given plain samples. torch finds the best only.",
        "",
        "| N | d | batch | native | / FAISS | / torch | float32 | of bare | / FAISS | orbits | / native | lists | auto "
        "| chose | faiss | dense | torch |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    curves: dict[int, list[list[float]]] = {}
    for n in sizes:
        for d in dimensions:
            if n * d > ROOM:
                continue
            batches = (256, BATCH, 65_536) if n == 10_000 and d == 32 else (BATCH,)
            for wanted in batches:
                batch = max(256, min(wanted, int(EFFORT / (2 * n * d))))
                found, chosen = rates(n, d, batch)
                if wanted == BATCH:
                    curves.setdefault(n, []).append([d, *(found[its] for its in NAMES)])
                native, single = found["native"], found["float32"]
                lines.append(
                    f"| {n:,} | {d} | {batch:,} | {native:.0f} | {native / found['faiss']:.1f} | "
                    f"{native / found['torch']:.1f} | {single:.0f} | {single / bare:.0%} | "
                    f"{single / found['faiss']:.1f} | {found['orbits']:.0f} | {found['orbits'] / native:.1f} | "
                    f"{found['lists']:.0f} | {found['auto']:.0f} | {chosen} | {found['faiss']:.0f} | "
                    f"{found['dense']:.0f} | {found['torch']:.0f} |"
                )
                print(lines[-1], flush=True)
    lines += ["", f"![rates]({name}.png)"]
    write(name, "Nearest power cell", lines)
    plot(curves, bare, name)


def of_run(path: str, recall: float) -> None:
    """Rates and recall of the CPU's candidates on the problem of a run."""
    solution = distot.load(path)
    problem, heights = solution.problem, solution.held.progress.state.average
    atoms, n, d = problem.target.atoms[:], problem.target.n, problem.target.dim
    x = torch.cat([points(part) for _, part in problem.batch(Stream.CERTIFY, 1, 65_536)])[:65_536]
    few = x[: max(1024, min(len(x), int(EFFORT / (2 * n * d))))]
    native, auto = Native(atoms, narrow=False), Auto(atoms, recall)
    lines = [
        f"{path}: N = {n:,}, d = {d}, source {problem.source.kind}; winner and runner-up.",
        "",
        "| search | samples/s | of native | atoms scored | winners found |",
        "|---|---|---|---|---|",
    ]

    def line(name: str, rate: float, base: float, scored: float, found: float) -> None:
        lines.append(f"| {name} | {rate:,.0f} | {rate / base:.2f} | {scored:.1%} | {found:.2%} |")
        print(lines[-1], flush=True)

    truth = native(few, heights, 2)
    base = len(few) / seconds(lambda: native(few, heights, 2))
    line("native, float32", base, base, 1, 1)
    narrow = Native(atoms)
    for _ in range(4):
        narrow(few, heights, 2)
    same = float((narrow(few, heights, 2).index == truth.index).double().mean())
    line("native", len(few) / seconds(lambda: narrow(few, heights, 2)), base, 1, same)
    _, orbits = next(iter(problem.batch(Stream.CERTIFY, 2, len(few))))
    if problem.basis is not None:
        line("native, orbits", len(orbits) / seconds(lambda: native(orbits, heights, 2)), base, 1, 1)
    for name, lists in (
        ("lists, exact", Lists(atoms, native)),
        (f"lists, recall {recall}", Likely(atoms, recall, native)),
    ):
        while not lists.fitted:
            lists(x, heights, 2)
        for _ in range(2):
            lists(x, heights, 2)
        before = lists.scored
        rate = len(x) / seconds(lambda lists=lists: lists(x, heights, 2))  # type: ignore[misc]
        scored = (lists.scored - before) / (4 * len(x))
        found = lists(x, heights, 2).index[: len(few), 0] == truth.index[:, 0]
        line(name, rate, base, scored, float(found.double().mean()))
    for _ in range(5):
        auto(x, heights, 2)
    lines += ["", f"`auto` with that recall chose {auto.name} for plain samples: {auto.why}."]
    write(f"assign-{Path(path).stem}", f"Nearest power cell, {Path(path).stem}", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="N = 10,000 alone")
    parser.add_argument("-n", type=int, nargs="+", help="these N alone, to a report of their own")
    parser.add_argument("-d", type=int, nargs="+", default=DIMENSIONS, help="these dimensions alone")
    parser.add_argument("--run", help="a run folder, to measure on its problem")
    parser.add_argument("--recall", type=float, default=0.97, help="of the approximate lists, with --run")
    args = parser.parse_args()
    if args.run:
        of_run(args.run, args.recall)
    else:
        sizes = args.n or ((10_000,) if args.quick else SIZES)
        table(sizes, args.d, "assign-rows" if args.n else "assign")


def plot(curves: dict[int, list[list[float]]], bare: float, name: str) -> None:
    """Rate against dimension, one panel for each N."""
    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.2), squeeze=False, sharey=True)
    for panel, (n, rows) in zip(axes[0], curves.items(), strict=True):
        dimension, *series = zip(*rows, strict=True)
        for label, values in zip(NAMES, series, strict=True):
            panel.loglog(dimension, values, "o-", label=label, markersize=3)
        panel.axhline(bare, color="k", linestyle="--", linewidth=1)
        panel.set_title(f"N = {n:,}", fontsize=9)
        panel.set_xlabel("dimension")
    axes[0][0].set_ylabel("GFLOP/s, 2 N d a sample")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(REPORTS / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
