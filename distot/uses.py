"""The commands that use the map of a run: assign, generate, export, pairs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import distot
from distot.arguments import Device, Json, Moved, RayAddress, Replicas, RunPath, Workers, parse_count
from distot.console import answer, err, print_json, say
from distot.outputs import notes_on
from distot.store import as_place, check_out, save_npy
from distot.work import Load

app = typer.Typer()


@app.command()
def assign(
    run: RunPath,
    samples: Annotated[Any, typer.Argument(parser=as_place, metavar="SAMPLES", help="npy file or zarr array (B, d).")],
    out: Annotated[
        Any,
        typer.Argument(parser=as_place, metavar="OUT", help="npy file or zarr store to write: a latent's number each."),
    ],
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
    for note in notes_on(samples):
        say("note", "yellow", note)
    answer(f"{out}: the latents of {count:,} samples")
    return 0


@app.command()
def generate(
    run: RunPath,
    out: Annotated[Any, typer.Argument(parser=as_place, metavar="OUT.zarr", help="The store of new latents to make.")],
    n: Annotated[int, typer.Option("-n", "--samples", parser=parse_count, metavar="COUNT", help="How many.")],
    k: Annotated[int | None, typer.Option("-k", "--k", help="Cells that may mix; default: 20.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Largest angle of cells that mix, in radians, as in AE-OT.")
    ] = None,
    quantile: Annotated[
        float, typer.Option(help="Without a threshold: this quantile of the angles between neighbours.")
    ] = distot.Mixing.quantile,
    balance: Annotated[
        bool, typer.Option("--balance", help="Keep each latent's share: give the latent itself instead of refusing.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of the noise; default: the run's.")] = None,
    latents: Moved = None,
    device: Device = None,
    workers: Workers = None,
    replicas: Replicas = 1,
    ray: RayAddress = None,
    as_json: Json = False,
) -> int:
    """Make new latents by the extended map of AE-OT: mixtures of neighbours, never across a gap.

    Example: distot generate run.zarr new.zarr -n 100000
    """
    made = distot.generate_file(
        run,
        out,
        n,
        k=k,
        threshold=threshold,
        quantile=quantile,
        balance=balance,
        seed=seed,
        latents=latents,
        device=device,
        workers=workers,
        replicas=replicas,
        ray=ray,
    )
    if as_json:
        print_json({"path": str(out)} | asdict(made))
        return 0
    became = "gave latents themselves" if balance else "were refused"
    answer(f"{out}: {made.samples:,} new latents, in the array z; largest angle mixed {made.threshold:.3g}")
    answer(f"{made.singular:,} of {made.drawn:,} samples of noise had no neighbour to mix with and {became}")
    return 0


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT.npy", help="npy file to write, (N,) float64.")],
    convention: Annotated[
        Literal["heights", "pot", "ott"],
        typer.Option("--as", help="heights h, or the potential g of POT or OTT: 2 h + |y|², up to a constant."),
    ] = "heights",
    latents: Moved = None,
) -> int:
    """Write the heights of a run as another library takes them; `distot solve --init OUT.npy` takes heights back.

    Example: distot export run.zarr g.npy --as pot
    """
    check_out(out, *Load(run, latents=latents).reads())
    solution = distot.load(run, latents=latents)
    save_npy(out, solution.heights if convention == "heights" else solution.weights)
    answer(f"{out}: {solution.facts.shape[0]:,} numbers")
    return 0


@app.command()
def pairs(
    run: RunPath,
    out: Annotated[Any, typer.Argument(parser=as_place, metavar="PAIRS.zarr", help="The store to make or go on with.")],
    samples: Annotated[
        int | None,
        typer.Option("-n", "--samples", parser=parse_count, metavar="COUNT", help="Pairs; default: one per latent."),
    ] = None,
    balance: Annotated[bool, typer.Option("--balance", help="Every latent gets exactly its share of them.")] = False,
    independent: Annotated[bool, typer.Option("--independent", help="No orbits: all noise independent.")] = False,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="Another number draws other, independent noise.")] = 0,
    latents: Moved = None,
    device: Device = None,
) -> int:
    """Write pairs for flow matching: the latent of each of many noise vectors, which distot.PairFile draws again.

    Example: distot pairs run.zarr pairs.zarr -n 1e7 --balance
    """
    solution = distot.load(run, latents=latents, device=device)
    with err.status("searching") if err.is_terminal else nullcontext() as status:

        def tell(done: int, total: int) -> None:
            if status is not None:
                status.update(f"{done:,} of {total:,} pairs")

        found = distot.write_pairs(
            solution, out, samples, seed=seed, epoch=epoch, orbits=not independent, balanced=balance, on_rows=tell
        )
    if found is not None:
        answer(str(found))
    answer(f"{out}: complete; use it as distot.PairFile({str(out)!r}, latents)")
    return 0
