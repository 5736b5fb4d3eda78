"""Solve, or go on if the run is there already: the job for machines that may vanish at any time.

    python -m jobs.solve latents.zarr run.zarr --until-chi2 0.05
    ray job submit --working-dir . -- python -m jobs.solve /shared/latents.zarr /shared/run.zarr

Submit it again as often as it was killed; each time it continues from the newest checkpoint, and once the goal is
reached it only says so. Options are those of ``distot solve``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from distot.cli import main as command
from distot.inspect import describe


def main(words: list[str]) -> None:
    paths = [word for word in words if not word.startswith("-")]
    run = Path(paths[1]) if len(paths) > 1 else None
    if run is None or not run.exists():
        command(["solve", *words])
    elif describe(run)["state"] == "until_chi2":
        command(["inspect", str(run)])
    else:
        command(["resume", str(run)])


if __name__ == "__main__":
    main(sys.argv[1:])
