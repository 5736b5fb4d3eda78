"""Solve, or go on if the run is there already: the job for machines that may vanish at any time.

    python -m jobs.solve latents.zarr run.zarr --until-chi2 0.05 --workers 8
    ray job submit -- python -m jobs.solve /shared/latents.zarr /shared/run.zarr --workers 8

It is ``distot solve --again``. Submit it as often as it was killed; each time it continues from the newest checkpoint,
and once the goal is reached it only says so. Options are those of ``distot solve``; goals, budgets, and where it runs
may change from one time to the next, and what would make another run of it is refused.
"""

from __future__ import annotations

import sys

from distot.cli import main as command


def main(words: list[str]) -> None:
    command(["solve", "--again", *words])


if __name__ == "__main__":
    main(sys.argv[1:])
