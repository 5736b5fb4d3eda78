"""A million real latents on one machine: patches of photographs and their mirror images, from a Gaussian.

    python -m jobs.million million --until-chi2 0.1

The second call goes on where the first was stopped. ``python -m bench.trajectory million/run.zarr`` draws how it went.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Annotated

import typer

from distot.console import start
from jobs.demo import begun, run, say
from jobs.patches import keep, patches
from jobs.solve import main as solve


def main(
    folder: Annotated[Path, typer.Argument(help="Where to put latents and run.")] = Path("million"),
    count: Annotated[int | None, typer.Option(help="Number of image patches; default: 1,000,000.")] = None,
    dim: Annotated[int | None, typer.Option(help="Dimension of the latents; default: 32.")] = None,
    until_chi2: Annotated[float, typer.Option(help="Goal for the squared relative error of the cell masses.")] = 0.1,
) -> None:
    """Solve the optimal transport from Gaussian noise to a million image patches."""
    latents, result = folder / "latents.zarr", folder / "run.zarr"
    its = begun(folder, {"count": count, "dim": dim, "flips": True}, {"count": 1_000_000, "dim": 32}, latents)
    if not latents.exists():
        keep(folder / "patches.npy", patches(its["count"], its["dim"], flips=True))
        run("ingest", str(folder / "patches.npy"), str(latents))
    try:
        solve([str(latents), str(result), "--until-chi2", str(until_chi2)])
    finally:
        unit = 1 if sys.platform == "darwin" else 1024
        gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        say(f"most memory of this process: {gigabytes:.2f} GiB")


if __name__ == "__main__":
    start(main)
