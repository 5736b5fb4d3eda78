"""The command line.

Exit codes: 0 done, 1 bad input or failure, 3 stopped by the budget before the goal, 130 after Ctrl-C, 143 after
SIGTERM, 129 when the terminal is closed.
With --json each command prints one JSON object on standard output; progress and messages go to standard error.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

import distot
from distot import uses, views
from distot.again import go_on
from distot.arguments import (
    Count,
    Device,
    Json,
    LatentsPath,
    Memory,
    Moved,
    NewRun,
    RayAddress,
    Replicas,
    RunPath,
    Seconds,
    TensorBoardFolder,
    Workers,
    numbers,
    parse_count,
    parse_goal,
    said_in,
)
from distot.console import err, execute, out, print_json, report, say, speak
from distot.errors import DistotWarning, InputError
from distot.ingest import ingest as ingest_store
from distot.solution import Solution
from distot.source import Ball, Cube, Gaussian, Sphere
from distot.store import Place, as_place, check_out, open_latents, typed
from distot.watch import Ours, together
from distot.work import Load

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Semi-discrete optimal transport at scale: a continuous source against N target latents.\n\n"
    "  distot ingest latents.npy latents.zarr\n\n"
    "  distot solve latents.zarr run.zarr --until-chi2 0.05\n\n"
    "  distot certify run.zarr",
)
GOAL, BUDGET = 0, 3


def _version(wanted: bool) -> None:
    if wanted:
        print(f"distot {version('distot')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    pass


@app.command()
def ingest(
    src: Annotated[
        Any,
        typer.Argument(parser=as_place, metavar="SRC", help="npy, npz, safetensors, parquet (file or folder) or zarr."),
    ],
    latents: Annotated[
        Any,
        typer.Argument(parser=as_place, metavar="LATENTS.zarr", help="The store to make; also s3://, gs://, az://."),
    ],
    key: Annotated[str | None, typer.Option(help="Name of the array, tensor or column with the latents.")] = None,
    mass: Annotated[Path | None, typer.Option(help="File with one mass for each latent.")] = None,
    mass_key: Annotated[str | None, typer.Option(help="Name of the masses in --mass, or in SRC.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16, float32 or float64; default: as in SRC.")
    ] = None,
    flatten: Annotated[bool, typer.Option(help="Flatten latents of more dimensions (N, a, b, ...) to rows.")] = False,
    as_json: Json = False,
) -> int:
    """Turn a file of latents into a store, in a stream: SRC may be larger than memory.

    Example: distot ingest encodings.safetensors latents.zarr --key z --dtype float16
    """
    if err.is_terminal:
        with err.status("reading") as status:
            done = ingest_store(
                src,
                latents,
                key=key,
                mass=mass,
                mass_key=mass_key,
                dtype=dtype,
                flatten=flatten,
                on_rows=lambda now, total: status.update(f"{now:,} of {total:,} rows"),
            )
    else:
        done = ingest_store(src, latents, key=key, mass=mass, mass_key=mass_key, dtype=dtype, flatten=flatten)
    for note in done.notes:
        say("note", "yellow", note)
    if as_json:
        print_json(
            {"path": str(done.path), "shape": list(done.shape), "dtype": done.dtype, "fingerprint": done.fingerprint}
        )
    else:
        out.print(f"{latents}: {done.shape[0]:,} latents of dimension {done.shape[1]}, {done.dtype}", soft_wrap=True)
        out.print(f"next: distot solve {typed(latents)} run.zarr", soft_wrap=True)
    return 0


@app.command()
def solve(
    context: typer.Context,
    latents: LatentsPath,
    run: NewRun,
    source: Annotated[
        str, typer.Option(help="gaussian, cube, ball, sphere, or the path of a zarr of samples.")
    ] = "gaussian",
    mean: Annotated[Path | None, typer.Option(help="npy file: mean (d,) of a gaussian source.")] = None,
    cov: Annotated[
        Path | None, typer.Option(help="npy file: variances (d,) or covariance (d, d) of a gaussian.")
    ] = None,
    low: Annotated[float | None, typer.Option(help="Lower edge of the cube; default: 0.")] = None,
    high: Annotated[float | None, typer.Option(help="Upper edge of the cube; default: 1.")] = None,
    radius: Annotated[float | None, typer.Option(help="Radius of the ball or sphere; default: 1.")] = None,
    cost: Annotated[str, typer.Option(help="quadratic, or log: -log<x, y> on the unit sphere.")] = "quadratic",
    until_chi2: Annotated[
        float,
        typer.Option(
            parser=parse_goal, metavar="CHI2", help="Stop below this with 95 % confidence; none: budget only."
        ),
    ] = "0.05",  # type: ignore[assignment]  # click parses the text
    max_samples: Count = None,
    max_seconds: Seconds = None,
    seed: Annotated[int, typer.Option(help="The answer is a function of the seed.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    assigner: Annotated[str, typer.Option(help="auto, native, lists, triton, dense or faiss.")] = "auto",
    recall: Annotated[
        float | None, typer.Option(help="Share of winners to be content with, say 0.97, where that is faster.")
    ] = None,
    init: Annotated[
        Any,
        typer.Option(
            parser=as_place,
            metavar="RUN",
            help="Start from this run, also of other latents, or from heights in an npy file.",
        ),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Solve the entropic problem at this temperature, in units of cost.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Latents that share a sample at that temperature; default: 32.")
    ] = None,
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
    certificate_samples: Annotated[
        int | None,
        typer.Option(parser=parse_count, metavar="COUNT", help="Samples of the certificate; default 10 per latent."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="In the plane: then make all masses exact, by Newton's method.")
    ] = False,
    memory: Memory = None,
    again: Annotated[
        bool, typer.Option("--again", help="If the run is there already, go on with it, if anything is left to do.")
    ] = False,
    workers: Workers = None,
    replicas: Replicas = 1,
    ray: RayAddress = None,
    tensorboard: TensorBoardFolder = None,
    as_json: Json = False,
) -> int:
    """Solve for a source and latents, into a new run folder.

    Examples: distot solve latents.zarr run.zarr --max-time 10m
              distot solve latents.zarr run.zarr --source ball --radius 3 --until-chi2 0.02
              distot solve latents.zarr run.zarr --workers 8 --replicas 2 --ray auto
    """
    if top_k is not None and epsilon is None:
        raise InputError("--top-k is for the entropic problem alone; give --epsilon, or leave it out")
    shape = {"mean": mean, "cov": cov, "low": low, "high": high, "radius": radius}
    wanted: dict[str, Any] = {
        "until_chi2": None if until_chi2 == math.inf else until_chi2,
        "max_samples": max_samples,
        "max_seconds": max_seconds,
        "seed": seed,
        "device": device,
        "assigner": assigner,
        "recall": recall,
        "epsilon": epsilon,
        "top_k": 32 if top_k is None else top_k,
        "checkpoint_seconds": checkpoint_seconds,
        "certificate_samples": certificate_samples,
        "exact": exact,
        "memory": memory,
        "cost": cost,
    }
    where: dict[str, Any] = {
        "workers": workers,
        "replicas": replicas,
        "ray": ray,
        "on_event": _listener(tensorboard, latents, run),
    }
    law = _source(source, latents, **shape)
    if again and run.exists():
        said = said_in(context)
        return _again(run, latents, law if said & {"source", *shape} else None, said, wanted, where, as_json)
    return _finish(distot.solve(latents, law, run=run, init=init, **wanted, **where), run, as_json)


@app.command()
def resume(
    run: RunPath,
    until_chi2: Annotated[
        float | None, typer.Option(parser=parse_goal, metavar="CHI2", help="A new goal; default: the run's own.")
    ] = None,
    max_samples: Count = None,
    max_seconds: Seconds = None,
    latents: Moved = None,
    device: Device = None,
    memory: Memory = None,
    workers: Workers = None,
    replicas: Replicas = 1,
    ray: RayAddress = None,
    tensorboard: TensorBoardFolder = None,
    as_json: Json = False,
) -> int:
    """Go on with a run that was interrupted, killed, or stopped by its budget.

    Example: distot resume run.zarr --max-time 1h
    """
    if until_chi2 == math.inf:
        raise InputError("a run keeps a goal once it has one; to run to the budget give a tiny one, --until-chi2 1e-9")
    solution = distot.resume(
        run,
        latents=latents,
        until_chi2=until_chi2,
        max_samples=max_samples,
        max_seconds=max_seconds,
        device=device,
        memory=memory,
        workers=workers,
        replicas=replicas,
        ray=ray,
        on_event=_listener(tensorboard, *Load(run, latents=latents).reads()),
    )
    return _finish(solution, run, as_json)


@app.command()
def certify(
    run: RunPath,
    samples: Annotated[int | None, typer.Option(parser=parse_count, metavar="COUNT", help="Fresh samples.")] = None,
    seed_step: Annotated[int, typer.Option(min=0, help="Another number draws other, independent samples.")] = 0,
    latents: Moved = None,
    device: Device = None,
    workers: Workers = None,
    replicas: Replicas = 1,
    ray: RayAddress = None,
    as_json: Json = False,
) -> int:
    """Measure anew how good the heights of a run are, with an exact search on fresh samples.

    Example: distot certify run.zarr --samples 1e6 --seed-step 1
    """
    solution = distot.certify(
        run, samples, seed_step, latents=latents, device=device, workers=workers, replicas=replicas, ray=ray
    )
    report(solution, run, as_json)
    return 0


app.add_typer(uses.app)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    address: Annotated[str | None, typer.Option(help="Dashboard of the cluster, http://HOST:8265.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job; default: it follows from the paths.")] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file with a Ray runtime environment; default: none.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the log until the job ends.")] = True,
) -> int:
    """Submit a solve to a Ray cluster, or follow it, or go on with it, whichever it takes.

    Example: distot submit --address http://head:8265 /shared/latents.zarr /shared/run.zarr --workers 8
    """
    from cluster.submit import environment
    from cluster.submit import submit as send

    env = None if runtime_env is None else environment(runtime_env)
    send(context.args, address, name, env, wait, lambda text: out.print(text, soft_wrap=True))
    return 0


app.add_typer(views.app)


def _listener(tensorboard: Path | None, *reads: object) -> Callable[[dict[str, Any]], None]:
    """What hears the events of a run: standard error, and the files of TensorBoard if they are wanted."""
    if tensorboard is not None:
        check_out(tensorboard, *reads, goes_on=True)
    writer = None if tensorboard is None else Ours("TensorBoard", distot.live.TensorBoard(tensorboard))
    return together(Ours("standard error", speak), writer)


def _source(name: str, latents: Place, **given: Any) -> object:
    """The source that the options of ``solve`` describe. Raises InputError for options that it does not take."""
    kinds: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {
        "gaussian": (_gaussian, ("mean", "cov")),
        "cube": (Cube, ("low", "high")),
        "ball": (Ball, ("radius",)),
        "sphere": (Sphere, ("radius",)),
    }
    kind, options = kinds.get(name, (None, ()))
    if kind is None and not as_place(name).exists():
        raise InputError(f"--source {name}: not one of {', '.join(kinds)}, and no such zarr store")
    for option in [option for option, value in given.items() if value is not None and option not in options]:
        takes = " or ".join(each for each, (_, names) in kinds.items() if option in names)
        raise InputError(f"--{option} is for --source {takes} alone, not for {name}; leave it out")
    if kind is None:
        return as_place(name)
    shape = open_latents(latents).shape
    return kind(shape[1], **{k: v for k, v in given.items() if v is not None}) if len(shape) == 2 else name


def _gaussian(dim: int, mean: Path | None = None, cov: Path | None = None) -> Gaussian:
    return Gaussian(numbers(mean, 0.0), numbers(cov, 1.0), dim)


def _again(
    run: Place,
    latents: Place,
    source: object,
    said: set[str],
    wanted: dict[str, Any],
    where: dict[str, Any],
    as_json: bool,
) -> int:
    """Goes on with a run that is there, as far as what was said lets it; what is done already is only told."""
    heard: set[str] = set()
    listen = where["on_event"]

    def hear(event: dict[str, Any]) -> None:
        heard.add(event["event"])
        listen(event)

    words = {name: value for name, value in wanted.items() if name in said}
    solution = go_on(run, latents, source, None, words | where | {"on_event": hear}, "init" in said)
    if heard & {"begin", "resume"} or as_json:
        return _finish(solution, run, as_json)
    code = _missed(solution)
    more = "give a larger --max-samples to go on" if code == BUDGET else "nothing is left to do"
    out.print(f"{run}: {solution.explanation}; {more}", soft_wrap=True)
    views.inspect(run)
    return code


def _finish(solution: Solution, run: Place, as_json: bool) -> int:
    report(solution, run, as_json)
    return _missed(solution)


def _missed(solution: Solution) -> int:
    options, reason = solution.options, solution.reason
    missed = reason != "exact" and (options.exact or (options.until_chi2 is not None and reason != "until_chi2"))
    return BUDGET if missed else GOAL


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and exits with its code."""
    warnings.simplefilter("ignore", DistotWarning)  # notes are printed already
    execute(app, "distot", list(sys.argv[1:] if arguments is None else arguments) or ["--help"])


if __name__ == "__main__":
    main()
