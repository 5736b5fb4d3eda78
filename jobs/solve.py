"""Solve, or go on if the run is there already: the job for machines that may vanish at any time.

    python -m jobs.solve latents.zarr run.zarr --until-chi2 0.05 --workers 8
    ray job submit -- python -m jobs.solve /shared/latents.zarr /shared/run.zarr --workers 8

Submit it again as often as it was killed; each time it continues from the newest checkpoint, and once the goal is
reached it only says so. Options are those of ``distot solve``; of them --workers, --replicas and --ray may change from
one time to the next.
"""

from __future__ import annotations

import sys

from distot.cli import main as command
from distot.inspect import describe
from distot.store import as_place

PLACES = ("--workers", "--replicas", "--ray", "--device")  # options that are not kept in the run


def main(words: list[str]) -> None:
    paths = [word for word in words[:2] if not word.startswith("-")]
    run = as_place(paths[1]) if len(paths) > 1 else None
    if run is None or not run.exists():
        command(["solve", *words])
    elif describe(run)["state"] == "until_chi2":
        command(["inspect", str(run)])
    else:
        command(["resume", str(run), *places(words)])


def places(words: list[str]) -> list[str]:
    """Those of the options that say where to run."""
    kept = []
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word in PLACES:
            kept += [word, value]
        elif word.split("=")[0] in PLACES:
            kept.append(word)
    return kept


if __name__ == "__main__":
    main(sys.argv[1:])
