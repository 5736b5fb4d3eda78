"""The arguments and options that several commands share, and how their text is read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from distot.schedule import MOST
from distot.store import as_place, read_npy


def parse_count(text: str) -> int:
    """A number of samples: 250000, 2e6, 1_000_000."""
    plain = text.replace("_", "").replace(",", "")
    try:
        value = int(plain) if plain.isdecimal() else float(plain)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number of samples; write 250000 or 2e6") from None
    if not (value >= 1 and value == value // 1):
        raise typer.BadParameter(f"{text!r} must be a whole number of at least 1")
    if value >= MOST:
        raise typer.BadParameter(f"{text!r} is too large; give a number below 2^63, 9e18 say")
    return int(value)


def parse_seconds(text: str) -> float:
    """A time: 90, 90s, 10m, 1h30m."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    try:
        whole = "".join(n + u for n, u in parts) == text
        value = sum(float(n) * units[u] for n, u in parts) if whole else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{text!r} is not a time above zero; write 90s, 10m or 1h30m")
    return value


def parse_goal(text: str) -> float:
    """A value of chi2, or infinity for "none"."""
    try:
        value = math.inf if text.lower() == "none" else float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise typer.BadParameter(f"{text!r} is not a number above zero; write 0.05, or none to run to the budget")
    return value


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Count = Annotated[int | None, typer.Option(parser=parse_count, metavar="COUNT", help="Search work, in samples (2e6).")]
Seconds = Annotated[
    float | None, typer.Option("--max-time", parser=parse_seconds, metavar="TIME", help="90s, 10m, 1h30m.")
]
Moved = Annotated[
    Any, typer.Option(parser=as_place, metavar="LATENTS.zarr", help="Where the latents are now, if they have moved.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Memory = Annotated[
    float | None, typer.Option(metavar="GIB", help="What latents may take in a process; default: 40 % of what is free.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Run on that many Ray workers; default: in this process.")]
Replicas = Annotated[int, typer.Option(min=1, help="Workers that hold the same latents and share the samples.")]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Ray cluster to run on, or auto; default: one on this machine."),
]
TensorBoardFolder = Annotated[
    Path | None, typer.Option("--tensorboard", metavar="DIR", help="Folder for event files of TensorBoard.")
]
LatentsPath = Annotated[
    Any, typer.Argument(parser=as_place, metavar="LATENTS.zarr", help="A store made by `distot ingest`.")
]
NewRun = Annotated[
    Any, typer.Argument(parser=as_place, metavar="RUN.zarr", help="The run folder to make; also s3://, gs://, az://.")
]
RunPath = Annotated[Any, typer.Argument(parser=as_place, metavar="RUN.zarr", help="A run folder.")]


def said_in(context: typer.Context) -> set[str]:
    """Names of the options that were given, and not left to their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and not source.name.startswith("DEFAULT")}


def numbers(path: Path | None, default: float) -> Any:
    """The array in an npy file, or the default if no file is given. Raises InputError if it cannot be read."""
    return default if path is None else np.array(read_npy(path))
