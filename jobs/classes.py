"""One transport problem for each class: noise is paired with the latents of its own label.

    python -m jobs.classes latents.npy labels.npy classes --until-chi2 0.05 --workers 8

Started again it goes on with what is not done yet. Then ``distot.ClassPairs("classes")`` has pairs for training.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import distot
from distot.arguments import Count, RayAddress, Seconds, Workers, parse_goal
from distot.console import start
from distot.store import as_place, read_npy
from jobs.demo import say


def main(
    latents: Annotated[str, typer.Argument(metavar="LATENTS", help="npy file, or a store made by `distot ingest`.")],
    labels: Annotated[Path, typer.Argument(metavar="LABELS.npy", help="One label for each latent.")],
    folder: Annotated[Any, typer.Argument(parser=as_place, metavar="FOLDER", help="Where the runs of all classes go.")],
    source: Annotated[str, typer.Option(help="gaussian, cube, ball or sphere.")] = "gaussian",
    until_chi2: Annotated[
        float | None,
        typer.Option(parser=parse_goal, metavar="CHI2", help="Goal of each class; default: as before, or 0.05."),
    ] = None,
    max_samples: Count = None,
    max_seconds: Seconds = None,
    workers: Workers = None,
    ray: RayAddress = None,
) -> None:
    """Solve a transport problem for each class, or go on with those that are not done."""
    said = {"until_chi2": until_chi2, "max_samples": max_samples, "max_seconds": max_seconds}
    rows = read_npy(Path(latents)) if latents.endswith(".npy") else latents
    found = distot.solve_classes(
        rows,
        np.array(read_npy(labels)),
        source,
        run=folder,
        on_class=lambda label, count: say(f"class {label}: {count:,} latents"),
        workers=workers,
        ray=ray,
        **{name: None if value == math.inf else value for name, value in said.items() if value is not None},
    )
    say("\nclass    latents    chi2      ended by")
    for label, its in found.items():
        say(f"{label!s:<8} {its.facts.shape[0]:<10,} {its.certificate.chi2:<9.4f} {its.reason}")


if __name__ == "__main__":
    start(main)
