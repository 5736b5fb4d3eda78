"""chi2 against time and work of a run, from its log.

python -m bench.trajectory RUN.zarr [NAME]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from bench.report import REPORTS, write

matplotlib.use("agg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name", nargs="?", default="trajectory", help="of the report")
    args = parser.parse_args()
    events: list[dict[str, Any]] = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    begin = next(e for e in events if e["event"] == "begin")
    n = begin["atoms"]
    looks = [e for e in events if e["event"] == "check"]
    lines = [
        f"N = {n:,}, d = {begin['dim']}, source {begin['source']}, in one process. Work is in plain samples for each "
        "atom; e is the efficiency (11).",
        "",
        "| seconds | work | chi2 | e |",
        "|---|---|---|---|",
    ]
    for e in looks:
        work = e["samples"] / n
        lines.append(
            f"| {e['seconds']:,.0f} | {work:.2f} | {e['chi2']:.4f} ± {e['error']:.4f} | {1 / (work * e['chi2']):.2f} |"
        )
    for c in [e for e in events if e["event"] == "certificate"][-1:]:
        lines += [
            "",
            f"Certificate after {c['seconds']:,.0f} s, from {c['samples']:,} samples: chi2 {c['chi2']:.4f} ± "
            f"{c['chi2_error']:.4f}, {c['empty']:,} empty cells ({c['empty_by_chance']:,.0f} by chance), "
            f"W2² {c['w2_squared_bound']:.5g} ± {c['w2_squared_bound_error']:.2g}.",
        ]
    lines += ["", f"![chi2 against time]({args.name}.png)"]
    write(args.name, f"A run of {n:,} latents", lines)
    figure, axes = plt.subplots(figsize=(5, 3.2))
    axes.errorbar(
        [e["seconds"] for e in looks], [e["chi2"] for e in looks], [2 * e["error"] for e in looks], fmt="o-", ms=3
    )
    axes.set(xlabel="seconds", ylabel="chi2", yscale="log")
    figure.tight_layout()
    figure.savefig(REPORTS / f"{args.name}.png", dpi=110)


if __name__ == "__main__":
    main()
