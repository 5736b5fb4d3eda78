"""What a latents store or a run folder holds, read from metadata; of a run the newest checkpoint is verified."""

from __future__ import annotations

from typing import Any

from distot.errors import StoreError
from distot.identity import belongs
from distot.progress import duration
from distot.schedule import options_of
from distot.solution import stored_certificate
from distot.store import Dropped, Place, Run, as_place, explained, open_latents, typed


def describe(path: str | Place) -> dict[str, Any]:
    """Facts about a store, in reading order. Raises StoreError if there is none."""
    path = as_place(path)
    with explained("read", path):
        is_run = (path / "config.json").is_file()
    return _run(path) if is_run else _latents(path)


def _latents(path: Place) -> dict[str, Any]:
    latents = open_latents(path)
    shape = list(latents.shape)
    return {
        "kind": "latents",
        "path": str(path),
        "shape": shape,
        "dtype": latents.attributes.get("dtype", str(latents.dtype)),
        "mass": "given" if latents.mass is not None else "uniform",
        "chunks": list(latents.array.chunks),
        "shards": list(latents.array.shards) if latents.array.shards else None,
        "fingerprint": latents.fingerprint,
        "origin": latents.attributes.get("origin"),
        **({"note": "; ".join(latents.notes)} if latents.notes else {}),
        "next": f"distot solve {typed(path)} run.zarr",
    }


def _run(path: Place) -> dict[str, Any]:
    run = Run(path)
    options = options_of(run)
    facts: dict[str, Any] = {
        "kind": "run",
        "path": str(path),
        "latents": str(run.config["latents"]),
        "shape": run.config["shape"],
        "source": run.config["source"]["kind"],
        "cost": options.cost,
        "goal_chi2": options.until_chi2,
        "max_samples": options.max_samples,
        "max_seconds": options.max_seconds,
        "seed": options.seed,
        "created": run.config["created"],
    }
    checkpoint = run.load_checkpoint()
    if checkpoint is None:
        return facts | {"state": "no checkpoint yet", "next": f"distot resume {typed(path)}"}
    scalars = checkpoint.scalars
    try:
        heights = checkpoint.heights
    except Dropped:
        return _run(path)  # a writer has replaced it by newer ones meanwhile
    facts |= {
        "state": scalars["reason"] or "unfinished",
        "checkpoint": checkpoint.name,
        "step": scalars["step"],
        "samples": scalars["samples"],
    }
    if checkpoint.remarks:
        facts["damage"] = "; ".join(checkpoint.remarks)
    if scalars["history"]:
        last = scalars["history"][-1]
        facts["last_look"] = f"chi2 {last['chi2']:.4f} ± {last['error']:.4f} at {last['samples']:,} samples"
    facts["time_spent"] = _spent(run)
    facts["cells"] = _cells(run, heights)
    stored = stored_certificate(run)
    if stored is not None and belongs(stored[1], scalars["step"], heights):
        c = stored[0]
        facts["certificate"] = f"chi2 {c.chi2:.4f} ± {c.chi2_error:.4f}"
        name = "w2_squared_bound" if facts["cost"] == "quadratic" else "cost_bound"
        facts[name] = f"{c.bound:.6g} ± {c.bound_error:.2g}"
        facts["next"] = f"distot.load({str(path)!r})"
    else:
        verb = "certify" if scalars["reason"] in ("until_chi2", "exact") else "resume"
        facts["next"] = f"distot {verb} {typed(path)}"
    return facts | {"report": f"distot report {typed(path)} -o report.html"}


def _spent(run: Run) -> str:
    """Time at work, over all processes one after the other that have written to the log."""
    seconds: list[float] = []
    for event in run.records():
        if event["event"] in ("begin", "resume"):
            seconds.append(0.0)
        if seconds and "seconds" in event:
            seconds[-1] = event["seconds"]
    return f"{duration(sum(seconds))} in {len(seconds)} session{'' if len(seconds) == 1 else 's'}"


def _cells(run: Run, heights: str) -> str:
    """What is known of the cells, if it is that of the newest heights."""
    try:
        saved = run.cells.load()
    except StoreError as error:
        return str(error)
    if saved is None and (lost := run.cells.lost()):
        return f"not measured, as {lost}"
    if saved is None or saved.scalars.get("heights") != heights:
        return "not measured"
    return f"measured with {saved.scalars['samples']:,} samples"
