"""Sample efficiency e = (N - 1) / (M chi2), math (11), of distot, POT and OTT: same problems, same evaluation.

    python -m bench.efficiency [--quick] [--only WORDS]    the table and the plot; POT takes most of the time
    python -m bench.efficiency --quick --ours              distot anew, and peers only where the report has none yet
    python -m bench.efficiency --growth                    e as N grows
    python -m bench.efficiency --profile                   where the time of a step goes

M counts all search work: for peers the samples they draw; for distot those of start, steps and looks, in plain samples
as (11) and (17) count them. chi2 of all is estimated on the same fresh plain samples. Reports go to bench/reports/.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray

import distot
from bench import peers
from bench.problems import Array, Case, cases, manifold
from bench.report import REPORTS, write
from distot import assign, descent, optim, start
from distot.assign import Assigner, Winners
from distot.certify import Certificate, certify
from distot.orbit import Orbits
from distot.problem import Problem, build_problem
from distot.source import Stream
from jobs.patches import patches

matplotlib.use("agg")

PER_ATOM = (20, 50, 200)
SEEDS = 5
Solver = Callable[[Array, int], Array]  # latents and samples to user heights


@dataclass(frozen=True)
class Result:
    """chi2 of a solver on a problem by samples per atom, that of the median run; runs that ended with empty cells."""

    chi2: dict[int, float]
    empty: int = 0

    def efficiency(self, n: int) -> str:
        return " / ".join(f"{(n - 1) / (per_atom * n * chi2):.2g}" for per_atom, chi2 in self.chi2.items())


def judge(problem: Problem, heights: Array) -> Certificate:
    """The certificate of user heights (N,), from fresh samples: as many as it takes to know chi2 to 5 %, or 3,200 N."""
    target = problem.target
    inside = torch.from_numpy(problem.frame.heights_in(heights[target.original], target.tilt))
    assigner = assign.build("auto", target.atoms[:])
    for per_atom in (100, 400, 1600, 3200):
        samples = max(100_000, per_atom * target.n)
        found = certify(problem, assigner, inside - inside.median(), samples, step=1)
        if found.chi2_error <= 0.05 * found.chi2:
            break
    return found


def ours(problem: Problem, case: Case, y: Array) -> Result:
    chi2, empty = {}, 0
    for per_atom in PER_ATOM:
        found = []
        for seed in range(SEEDS):
            solution = distot.solve(
                y,
                case.source_of(y.shape[1]),
                mass=case.mass and case.mass(),
                until_chi2=None,
                max_samples=per_atom * len(y),
                seed=seed,
                certificate_samples=2,
                progress=False,
            )
            certificate = judge(problem, solution.heights)
            # the budget is spent to the last batch; what is left of it counts in our favour
            found.append(max(certificate.chi2, 1e-12) * solution.samples / (per_atom * len(y)))
            empty += certificate.empty > 0
        chi2[per_atom] = median(found)
    return Result(chi2, empty)


def theirs(problem: Problem, y: Array, solvers: Sequence[Solver]) -> Result:
    """The best of some settings, for each budget; one seed."""
    chi2 = {
        per_atom: min(judge(problem, solve(y, per_atom * len(y))).chi2 for solve in solvers) for per_atom in PER_ATOM
    }
    return Result(chi2)


def table(quick: bool, only: str, again: bool) -> None:
    """Writes the report; what it has of problems that are not measured now stays in it."""
    lines = [
        f"e at {' / '.join(map(str, PER_ATOM))} samples per atom. distot: default settings, median of {SEEDS} seeds; "
        f"the number of those {len(PER_ATOM) * SEEDS} runs that left an atom without samples, of at least 100 an atom "
        "(few for light atoms: one of a hundredth of the mean mass has one). "
        "POT: DRAG, its defaults. OTT: Adam, the better of rates 0.05 and 0.2 for each budget. Source Gaussian unless "
        "named. An efficiency above 1 is below the limit of plain samples: points of an orbit are cheaper, (17). "
        "Efficiencies do not depend on the machine; some may be of an earlier day.",
        "",
        "| latents | N | distot | runs with an empty cell | POT | OTT |",
        "|---|---|---|---|---|---|",
    ]
    every = cases(1000 if quick else 2000)
    chosen, results = [case for case in every if only in case.name], known()
    work = partial(compare, kept={} if again else results)
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,), mp_context=get_context("spawn")) as pool:
        for case, found in zip(chosen, pool.map(work, chosen), strict=True):
            results[case.name] = found
            print(row(case.name, found), flush=True)
    lines += [row(case.name, results[case.name]) for case in every if case.name in results]
    lines += ["", "![chi2 against samples per atom](efficiency.png)"]
    write("efficiency", "Sample efficiency", lines)
    plot({name: found.results for name, found in results.items()})


@dataclass(frozen=True)
class Row:
    """Results on a problem of n atoms, by solver."""

    n: int
    results: dict[str, Result]


def row(name: str, found: Row) -> str:
    cells = [result.efficiency(found.n) for result in found.results.values()]
    cells.insert(1, str(found.results["distot"].empty))
    return f"| {name} | {found.n:,} | {' | '.join(cells)} |"


def known() -> dict[str, Row]:
    """What the report has, if there is one, by problem."""
    found: dict[str, Row] = {}
    report = REPORTS / "efficiency.md"
    for line in report.read_text().splitlines() if report.exists() else ():
        match [cell.strip() for cell in line.strip("|").split("|")]:
            case [name, count, distot, empty, pot, ott] if " / " in ott:
                n = int(count.replace(",", ""))
                results = {"distot": _read(distot, n, int(empty)), "POT": _read(pot, n), "OTT": _read(ott, n)}
                found[name] = Row(n, results)
    return found


def _read(cell: str, n: int, empty: int = 0) -> Result:
    """The inverse of ``Result.efficiency``."""
    told = zip(PER_ATOM, map(float, cell.split(" / ")), strict=True)
    return Result({per_atom: (n - 1) / (per_atom * n * e) for per_atom, e in told}, empty)


def compare(case: Case, kept: dict[str, Row]) -> Row:
    """Results on a problem; those of peers that are known already for as many atoms are kept."""
    y = case.latents()
    mass = np.full(len(y), 1 / len(y)) if case.mass is None else case.mass()
    problem = build_problem(y, case.source_of(y.shape[1]), mass)
    pot = partial(peers.pot, source=problem.source, mass=mass)
    ott = [partial(peers.ott, source=problem.source, mass=mass, rate=rate) for rate in peers.RATES]
    runs: dict[str, Callable[[], Result]] = {
        "distot": partial(ours, problem, case, y),
        "POT": partial(theirs, problem, y, [pot]),
        "OTT": partial(theirs, problem, y, ott),
    }
    if case.name in kept and kept[case.name].n == len(y):
        runs |= {name: partial(kept[case.name].results.__getitem__, name) for name in ("POT", "OTT")}
    return Row(len(y), {name: run() for name, run in runs.items()})


def plot(results: dict[str, dict[str, Result]]) -> None:
    """chi2 against samples per atom, one panel for each problem, with the limit 1 / samples per atom."""
    columns = min(5, len(results))
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.4 * rows), squeeze=False, sharex=True)
    for panel in axes.flat[len(results) :]:
        panel.axis("off")
    for panel, (title, found) in zip(axes.flat, results.items(), strict=False):
        for name, result in found.items():
            panel.loglog(list(result.chi2), list(result.chi2.values()), "o-", label=name, markersize=3)
        panel.loglog(PER_ATOM, [1 / m for m in PER_ATOM], "k--", label="limit of plain samples", linewidth=1)
        panel.set_title(title, fontsize=8)
    axes.flat[0].legend(fontsize=6)
    figure.supxlabel("samples per atom, all search work counted")
    figure.supylabel("chi2")
    figure.tight_layout()
    figure.savefig(REPORTS / "efficiency.png", dpi=110)


def growth(quick: bool) -> None:
    """e at a fixed number of samples per atom for more and more atoms."""
    lines = ["20 samples per atom, Gaussian source, default settings, one seed.", ""]
    lines += ["| latents | N | e | chi2 | seconds |", "|---|---|---|---|---|"]
    kinds: dict[str, Callable[[int], NDArray[Any]]] = {
        "patches, d = 32": lambda n: patches(n, 32),
        "patches, whitened, d = 32": lambda n: patches(n, 32, whiten=True),
        "curved surface, d = 64": manifold,
    }
    for name, build in kinds.items():
        for n in (2000, 5000) if quick else (2000, 5000, 10_000, 20_000, 50_000):
            began = time.perf_counter()
            y = Case(name, partial(build, n)).latents()
            solution = distot.solve(
                y, until_chi2=None, max_samples=20 * n, progress=False, certificate_samples=max(100_000, 20 * n)
            )
            chi2 = solution.certificate.chi2
            seconds = time.perf_counter() - began
            lines.append(f"| {name} | {n:,} | {solution.efficiency:.2f} | {chi2:.4f} | {seconds:.0f} |")
            print(lines[-1], flush=True)
    write("growth", "Sample efficiency as N grows", lines)


class Timed:
    """An assigner that adds up its time."""

    def __init__(self, search: Assigner) -> None:
        self.search, self.name, self.why, self.exact = search, search.name, search.why, search.exact
        self.seconds = 0.0

    def __call__(self, x: torch.Tensor | Orbits, heights: torch.Tensor, k: int = 2) -> Winners:
        began = time.perf_counter()
        found = self.search(x, heights, k)
        self.seconds += time.perf_counter() - began
        return found


def profile(quick: bool) -> None:
    """Share of a step that is not search."""
    n, steps = (20_000 if quick else 100_000), 8
    problem = build_problem(patches(n, 32).astype(np.float64))
    mass = torch.as_tensor(problem.target.mass)
    state = optim.begin(start.normal(problem).heights(problem.target.atoms), 0, problem.target.split)
    search = Timed(assign.build("auto", problem.target.atoms[:]))
    lines = [f"N = {n:,}, d = 32, patches, {search.name} search.", ""]
    lines += ["| step | samples | seconds | outside the search |", "|---|---|---|---|"]
    for step in range(steps):
        began, search.seconds, before = time.perf_counter(), 0.0, state.samples
        state = descent.advance(problem, search, state, mass, Stream.STEP, step, lambda: None)
        whole = time.perf_counter() - began
        points = round((state.samples - before) / problem.orbit.work)
        lines.append(f"| {step} | {points:,} | {whole:.2f} | {1 - search.seconds / whole:.1%} |")
        print(lines[-1], flush=True)
    write("profile", "Where the time of a step goes", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller problems")
    parser.add_argument("--only", default="", help="only problems whose name holds these words")
    parser.add_argument("--ours", action="store_true", help="keep what the report has of peers")
    parser.add_argument("--growth", action="store_true", help="e as N grows")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    args = parser.parse_args()
    if args.growth:
        growth(args.quick)
    elif args.profile:
        profile(args.quick)
    else:
        table(args.quick, args.only, again=not args.ours)


if __name__ == "__main__":
    main()
