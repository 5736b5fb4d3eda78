"""One transport problem for each class: noise is paired with the latents of its own label.

    python -m jobs.classes latents.npy labels.npy classes --until-chi2 0.05

Each class gets a store and a run, ``classes/LABEL.latents.zarr`` and ``classes/LABEL.run.zarr``; options behind the
folder are those of ``distot solve``, --workers and --ray too. Started again it goes on with what is not done yet.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from distot import load
from distot.store import as_place, copy_latents
from jobs.demo import say
from jobs.solve import main as solve

DONE, OUT_OF_BUDGET = 0, 3  # exit codes of ``distot solve`` after which the next class has its turn


def main(words: list[str]) -> None:
    if len(words) < 3 or words[0] in ("-h", "--help"):
        sys.exit(__doc__)
    rows, labels, folder = np.load(words[0], mmap_mode="r"), np.load(words[1]), as_place(words[2])
    if labels.shape != rows.shape[:1]:
        sys.exit(f"{words[1]} must hold one label for each of the {len(rows):,} latents, its shape is {labels.shape}")
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        latents, run = folder / f"{label}.latents.zarr", folder / f"{label}.run.zarr"
        say(f"\nclass {label}: {count:,} latents")
        if not latents.exists():
            copy_latents(rows[labels == label], None, latents, f"class {label} of {words[0]}")
        try:
            solve([str(latents), str(run), *words[3:]])
        except SystemExit as end:
            if end.code not in (DONE, OUT_OF_BUDGET):
                raise
    say("\nclass    latents    chi2")
    for label in np.unique(labels):
        found = load(folder / f"{label}.run.zarr")
        say(f"{label!s:<8} {found.facts.shape[0]:<10,} {found.certificate.chi2:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
