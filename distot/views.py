"""The commands that look and change nothing: plan, inspect, report."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import distot
from distot.arguments import Device, Json, Moved, Replicas, RunPath, parse_count
from distot.console import answer, out, print_json, say
from distot.inspect import describe
from distot.plan import parse_machines, plan, table
from distot.store import as_place

app = typer.Typer()


@app.command("plan")
def plan_run(
    n: Annotated[int, typer.Option(parser=parse_count, metavar="COUNT", help="Latents, 1e9 say.")],
    d: Annotated[int, typer.Option(min=1, help="Their dimension.")],
    machines: Annotated[
        list[str],
        typer.Option("--gpus", "--on", metavar="MACHINES", help="8x h200, 64x h100, 2x cpu; may be repeated."),
    ],
    until_chi2: Annotated[float, typer.Option(help="Goal for the squared relative error of the cell masses.")] = 0.1,
    replicas: Replicas = 1,
) -> int:
    """Estimate time, memory, traffic and cost of a run on machines that are not here, from a model.

    Example: distot plan --n 1e9 --d 64 --gpus "8x h200" --gpus "64x h200"
    """
    chosen = [parse_machines(text) for text in machines]
    plans = [plan(n, d, machine, workers, replicas, until_chi2) for workers, machine in chosen]
    for line in table(plans):
        out.print(line, soft_wrap=True)
    if unmeasured := sorted({its.machine.name for its in plans if not its.machine.measured}):
        say("note", "yellow", f"the rates of {', '.join(unmeasured)} are assumed, not measured; see docs/scaling.md")
    for its in plans:
        if not its.fits:
            say("note", "yellow", f"{its.grid[0]} shards do not fit into {its.machine.name}; use more workers")
    return 0


@app.command()
def inspect(
    path: Annotated[Any, typer.Argument(parser=as_place, metavar="PATH", help="A latents store or a run folder.")],
    as_json: Json = False,
) -> int:
    """Say what a store holds, without solving or loading anything large.

    Example: distot inspect run.zarr
    """
    facts = describe(path)
    if as_json:
        print_json(facts)
    else:
        for name, value in facts.items():
            text = f"{value:,}" if isinstance(value, int) else str(value)
            out.print(f"{name.replace('_', ' '):<18} {text}", soft_wrap=True)
    return 0


@app.command("report")
def write_report(
    run: RunPath,
    out: Annotated[
        Any, typer.Option("--out", "-o", parser=as_place, metavar="OUT.html", help="The page to write.")
    ] = "report.html",
    samples: Annotated[
        int | None, typer.Option(parser=parse_count, metavar="COUNT", help="Measure the cells with so many samples.")
    ] = None,
    detail: Annotated[
        bool | None, typer.Option(help="Read the latents and measure the cells; default: if that is no great work.")
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(metavar="FILE.py:FUNCTION", help="Turns latents (n, d) into images (n, h, w[, c]).")
    ] = None,
    latents: Moved = None,
    device: Device = None,
) -> int:
    """Write a page about a run: how good it is, how it got there, pictures of the map, and what to do next.

    Example: distot report run.zarr -o report.html
    """
    page = distot.report(run, out, samples=samples, detail=detail, decoder=decoder, latents=latents, device=device)
    answer(f"{page}: open it in a browser; it needs no other file and no network")
    return 0
