"""The command line: ingest, solve, resume, certify, inspect.

Exit codes: 0 done, 1 bad input or failure, 3 stopped by the budget before the goal, 130 after Ctrl-C, 143 after
SIGTERM.
With --json each command prints one JSON object on standard output; progress and messages go to standard error.
"""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.text import Text

import distot
from distot.errors import DistotError, DistotWarning, InputError
from distot.ingest import ingest as ingest_store
from distot.inspect import describe
from distot.plan import parse_machines, plan, table
from distot.solution import Interrupted, Solution
from distot.source import Ball, Cube, Gaussian, Sphere
from distot.store import open_latents

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Semi-discrete optimal transport at scale: a continuous source against N target latents.\n\n"
    "  distot ingest latents.npy latents.zarr\n\n"
    "  distot solve latents.zarr run.zarr --until-chi2 0.05\n\n"
    "  distot certify run.zarr",
)
# text is printed as it is: [brackets] and :colons: belong to paths
out, err = (Console(stderr=stderr, highlight=False, markup=False, emoji=False) for stderr in (False, True))

GOAL, BUDGET = 0, 3

# typer uses the package click or one of its own, by version; BadParameter, which it always exports, leads to either
UsageError: Any = typer.BadParameter.__mro__[1]


def parse_count(text: str) -> int:
    """A number of samples: 250000, 2e6, 1_000_000."""
    try:
        value = float(text.replace("_", "").replace(",", ""))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number of samples; write 250000 or 2e6") from None
    if not (value >= 1 and value.is_integer()):
        raise typer.BadParameter(f"{text!r} must be a whole number of at least 1")
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
Moved = Annotated[Path | None, typer.Option(help="Where the latents are now, if they have moved.")]
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
RunPath = Annotated[Path, typer.Argument(metavar="RUN.zarr", help="A run folder.")]


@app.command()
def ingest(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", help="npy, npz, safetensors, parquet (file or folder) or zarr.")
    ],
    latents: Annotated[Path, typer.Argument(metavar="LATENTS.zarr", help="The store to make.")],
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
        _say("note", "yellow", note)
    if as_json:
        _print_json(
            {"path": str(done.path), "shape": list(done.shape), "dtype": done.dtype, "fingerprint": done.fingerprint}
        )
    else:
        out.print(f"{latents}: {done.shape[0]:,} latents of dimension {done.shape[1]}, {done.dtype}", soft_wrap=True)
        out.print(f"next: distot solve {latents} run.zarr", soft_wrap=True)
    return 0


@app.command()
def solve(
    latents: Annotated[Path, typer.Argument(metavar="LATENTS.zarr", help="A store made by `distot ingest`.")],
    run: Annotated[Path, typer.Argument(metavar="RUN.zarr", help="The run folder to make.")],
    source: Annotated[
        str, typer.Option(help="gaussian, cube, ball, sphere, or the path of a zarr of samples.")
    ] = "gaussian",
    mean: Annotated[Path | None, typer.Option(help="npy file: mean (d,) of a gaussian source.")] = None,
    cov: Annotated[
        Path | None, typer.Option(help="npy file: variances (d,) or covariance (d, d) of a gaussian.")
    ] = None,
    low: Annotated[float, typer.Option(help="Lower edge of the cube.")] = 0.0,
    high: Annotated[float, typer.Option(help="Upper edge of the cube.")] = 1.0,
    radius: Annotated[float, typer.Option(help="Radius of the ball or sphere.")] = 1.0,
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
        Path | None, typer.Option(metavar="RUN.zarr", help="Start from the heights of this run; latents may differ.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Solve the entropic problem at this temperature, in units of cost.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Latents that share a sample at that temperature.")] = 32,
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
    certificate_samples: Annotated[
        int | None,
        typer.Option(parser=parse_count, metavar="COUNT", help="Samples of the certificate; default 10 per latent."),
    ] = None,
    memory: Memory = None,
    workers: Workers = None,
    replicas: Replicas = 1,
    ray: RayAddress = None,
    as_json: Json = False,
) -> int:
    """Solve for a source and latents, into a new run folder.

    Examples: distot solve latents.zarr run.zarr --max-time 10m
              distot solve latents.zarr run.zarr --source ball --radius 3 --until-chi2 0.02
              distot solve latents.zarr run.zarr --workers 8 --replicas 2 --ray auto
    """
    solution = distot.solve(
        latents,
        _source(source, latents, mean, cov, low, high, radius),
        until_chi2=None if until_chi2 == math.inf else until_chi2,
        max_samples=max_samples,
        max_seconds=max_seconds,
        seed=seed,
        device=device,
        assigner=assigner,
        recall=recall,
        init=init,
        epsilon=epsilon,
        top_k=top_k,
        run=run,
        checkpoint_seconds=checkpoint_seconds,
        certificate_samples=certificate_samples,
        memory=memory,
        workers=workers,
        replicas=replicas,
        ray=ray,
        progress=None,
        on_event=_speak,
    )
    return _finish(solution, run, as_json)


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
        on_event=_speak,
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
    _report(solution, run, as_json)
    return 0


@app.command()
def assign(
    run: RunPath,
    samples: Annotated[Path, typer.Argument(metavar="SAMPLES", help="npy file or zarr array (B, d).")],
    out: Annotated[Path, typer.Argument(metavar="OUT.npy", help="File to write: one latent's number for each sample.")],
    latents: Moved = None,
    device: Device = None,
    workers: Workers = None,
    replicas: Replicas = 1,
    ray: RayAddress = None,
) -> int:
    """Say which latent each sample belongs to, by the map of a run.

    Example: distot assign run.zarr noise.npy pairs.npy
    """
    count = distot.assign_file(
        run, samples, out, latents=latents, device=device, workers=workers, replicas=replicas, ray=ray
    )
    print(f"{out}: the latents of {count:,} samples")
    return 0


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
    from cluster.submit import submit as send

    env = None if runtime_env is None else json.loads(runtime_env.read_text())
    send(context.args, address, name, env, wait, lambda text: out.print(text, soft_wrap=True))
    return 0


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
        _say("note", "yellow", f"the rates of {', '.join(unmeasured)} are assumed, not measured; see docs/scaling.md")
    for its in plans:
        if not its.fits:
            _say("note", "yellow", f"{its.grid[0]} shards do not fit into {its.machine.name}; use more workers")
    return 0


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A latents store or a run folder.")],
    as_json: Json = False,
) -> int:
    """Say what a store holds, without solving or loading anything large.

    Example: distot inspect run.zarr
    """
    facts = describe(path)
    if as_json:
        _print_json(facts)
    else:
        for name, value in facts.items():
            text = f"{value:,}" if isinstance(value, int) else str(value)
            out.print(f"{name.replace('_', ' '):<18} {text}", soft_wrap=True)
    return 0


def _source(
    name: str, latents: Path, mean: Path | None, cov: Path | None, low: float, high: float, radius: float
) -> object:
    """The source that the options of ``solve`` describe."""
    kinds: dict[str, Callable[[int], object]] = {
        "gaussian": lambda dim: Gaussian(_numbers(mean, 0.0), _numbers(cov, 1.0), dim),
        "cube": lambda dim: Cube(dim, low, high),
        "ball": lambda dim: Ball(dim, radius),
        "sphere": lambda dim: Sphere(dim, radius),
    }
    if name in kinds:
        shape = open_latents(latents).shape
        return kinds[name](shape[1]) if len(shape) == 2 else name
    if Path(name).exists():
        return open_latents(name)[:]
    raise InputError(f"--source {name}: not one of {', '.join(kinds)}, and no such zarr store")


def _numbers(path: Path | None, default: float) -> Any:
    if path is None:
        return default
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an npy file: {error}") from error


def _speak(event: dict[str, Any]) -> None:
    """Off the terminal, where no progress is drawn, the milestones go to standard error as plain lines."""
    if err.is_terminal:
        return
    if event["event"] in ("note", "warning"):
        _say(event["event"], "yellow", event["text"])
    if event["event"] == "check":
        err.print(f"{event['samples']:,} samples: chi2 {event['chi2']:.4f} +- {event['error']:.4f}", soft_wrap=True)


def _finish(solution: Solution, run: Path, as_json: bool) -> int:
    _report(solution, run, as_json)
    missed = solution.options.until_chi2 is not None and solution.reason != "until_chi2"
    return BUDGET if missed else GOAL


def _report(solution: Solution, run: Path, as_json: bool) -> None:
    c = solution.certificate
    if as_json:
        _print_json(
            {
                "run": str(run),
                "reason": solution.reason,
                "samples": solution.samples,
                "efficiency": solution.efficiency,
                "certificate": c.to_dict(),
                "notes": list(solution.notes),
                "history": [check.to_dict() for check in solution.history],
            }
        )
        return
    rows = [
        (
            "samples",
            f"{solution.samples:,}",
            f"{solution.samples / c.atoms:.1f} per latent, efficiency {solution.efficiency:.2f}",
        ),
        ("chi2", f"{c.chi2:.4f} ± {c.chi2_error:.4f}", "squared relative error of the cell masses; 0 is exact"),
        (
            "empty cells",
            f"{c.empty:,} of {c.atoms:,}",
            f"{c.empty_by_chance:.1f} by chance in {c.samples:,} fresh samples",
        ),
        ("W2²", f"{c.w2_squared_bound:.6g} ± {c.w2_squared_bound_error:.2g}", "lower bound, exact as chi2 -> 0"),
        ("", f"≥ {c.w2_squared_limit:.6g}", f"with {c.level:.0%} confidence"),
        ("map cost", f"{c.map_cost:.6g} ± {c.map_cost_error:.2g}", "mean of |x - T(x)|²"),
        ("mismatch", f"{c.mismatch:.2g} ± {c.mismatch_error:.2g}", "W2² bound - map cost; 0 when all masses are exact"),
    ]
    out.print(Text.assemble("\n", (str(run), "bold"), f": {solution.explanation}"), soft_wrap=True)
    for name, value, meaning in rows:
        out.print(f"  {name:<12} {value:<22} {meaning}", soft_wrap=True)
    if solution.reason != "until_chi2":
        more = f" --max-samples {2 * solution.samples}" if solution.reason == "max_samples" else ""
        out.print(f"go on: distot resume {run}{more}", soft_wrap=True)


def _say(label: str, style: str, text: str) -> None:
    err.print(Text.assemble((label, style), f": {text}"), soft_wrap=True)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and exits with its code; errors are one sentence, never a traceback."""
    warnings.simplefilter("ignore", DistotWarning)  # notes are printed already
    given = list(sys.argv[1:] if arguments is None else arguments)
    code: Any = 1
    try:
        command = typer.main.get_command(app)
        # app() itself would turn Interrupted, as it does any KeyboardInterrupt, into 130 without a word
        with command.make_context("distot", given or ["--help"]) as context:
            code = command.invoke(context)
    except typer.Exit as done:
        code = done.exit_code
    except Interrupted as interrupted:
        err.print(str(interrupted), soft_wrap=True)
        code = 128 + interrupted.signal
    except KeyboardInterrupt:
        err.print("stopped at once; the run, if it has begun, is as of its last checkpoint")
        code = 130
    except UsageError as error:
        where = error.ctx.command_path if error.ctx else "distot"
        _say("error", "red", f"{error.format_message().rstrip('.')}; see {where} --help")
    except (DistotError, OSError) as error:
        _say("error", "red", str(error))
    sys.exit(code)


if __name__ == "__main__":
    main()
