"""From photographs to a certified transport map, in the commands that a user would type. Run by ``make demo``.

python -m jobs.demo [FOLDER]
"""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

import distot
from distot.cli import main as command
from distot.console import start
from distot.errors import InputError
from distot.store import check_holder, explained, new_file, open_latents, typed
from jobs.patches import keep, patches

console = Console(highlight=False)


def say(text: str) -> None:
    console.print(text, soft_wrap=True)


def begun(
    folder: Path, said: dict[str, Any], usual: dict[str, Any] | None = None, latents: Path | None = None
) -> dict[str, Any]:
    """The settings of a folder, kept there: what was said, and for None what it was begun with, or what is usual.

    Raises InputError if it was begun with something else, or holds ``latents`` of another shape.
    """
    file, kept = folder / "settings.json", dict[str, Any]()
    if file.exists():
        kept = remembered(file)
    elif latents is not None and latents.exists():  # begun by a version that kept none
        kept = said | dict(zip(("count", "dim"), open_latents(latents).shape, strict=True))
    settings = (usual or {}) | kept | {name: value for name, value in said.items() if value is not None or not usual}
    if other := [
        f"{name} {kept.get(name)} instead of {value}"
        for name, value in settings.items()
        if kept and kept.get(name) != value
    ]:
        raise InputError(f"{folder} was begun with {', '.join(other)}; give the same options, or another folder")
    if not file.exists():
        check_holder(folder)
        with explained("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
        with new_file(file) as partial:
            partial.write_text(json.dumps(settings, indent=1))
    return settings


def remembered(file: Path) -> dict[str, Any]:
    """What a job has kept in a file of JSON. Raises InputError if it is damaged."""
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}); delete {file.parent}, or choose another folder") from error


def run(*words: str) -> None:
    """Shows a command and runs it as the shell would; leaves with its exit code if that is not 0."""
    say(f"\n[bold cyan]$ distot {shlex.join(words)}[/]")
    try:
        command(list(words))
    except SystemExit as end:
        if end.code:
            raise


def main(
    folder: Annotated[Path, typer.Argument(help="Where to put the results.")] = Path("demo"),
    count: Annotated[int | None, typer.Option(help="Number of image patches; default: 20,000.")] = None,
    dim: Annotated[int | None, typer.Option(help="Dimension of the latents; default: 32.")] = None,
) -> None:
    """Solve the optimal transport from Gaussian noise to image patches."""
    began = time.monotonic()
    latents, result = folder / "latents.zarr", folder / "run.zarr"
    its = begun(folder, {"count": count, "dim": dim, "flips": False}, {"count": 20_000, "dim": 32}, latents)
    count, dim = its["count"], its["dim"]
    if result.exists():
        say(f"{result} is there already; go on with it by `distot resume {typed(result)}`, or delete {folder}/ first.")
        run("inspect", str(result))
        return
    if not latents.exists():
        say(
            f"{count:,} patches of 8 x 8 x 3 from two photographs, by PCA latents of dimension {dim} (jobs/patches.py)."
        )
        keep(folder / "patches.npy", patches(count, dim))
        run("ingest", str(folder / "patches.npy"), str(latents))
    say(
        f"\nNow the transport: split Gaussian noise into {count:,} cells, one for each patch, all equally likely,\n"
        "at the least mean squared distance. Ctrl-C stops it and loses nothing; it then prints how to go on."
    )
    run("solve", str(latents), str(result), "--until-chi2", "0.05")

    solution = distot.load(result)
    noise = np.random.default_rng(1).standard_normal((5, dim))
    say(
        "\nchi2 is the squared relative error of the cells' probabilities, averaged: 0.05 is 22 %, root mean square.\n"
        "W2² is the transport cost: with 95 % confidence the true one is not below the limit, however good the map.\n"
        f"Efficiency {solution.efficiency:.2f}: plain samples without waste would give 1; all search work is counted.\n"
        "\nWhat it is for: every noise vector now has its own patch."
    )
    for x, i in zip(noise, solution.assign(noise), strict=True):
        say(f"  noise ({x[0]:+.2f}, {x[1]:+.2f}, ...) -> latent {i}")
    say(f"\nDone in {time.monotonic() - began:.0f} s. Next (in this shell: . .venv/bin/activate):")
    for line in (
        f"distot inspect {typed(result)}                      what the run folder holds",
        f"distot certify {typed(result)} --seed-step 1        measure it again with other samples",
        f"distot resume {typed(result)} --until-chi2 0.03     go on to a finer answer",
        f"distot solve {typed(latents)} {typed(folder / 'ball.zarr')} --source ball --radius 5",
        shlex.join(["python", "-c", f"import distot; print(distot.load({str(result)!r}).heights)"]),
    ):
        say(f"  {line}")


if __name__ == "__main__":
    start(main)
