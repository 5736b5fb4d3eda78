"""A call or a command that is given again, and finds its run: checked to be the same, and gone on with if need be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distot.api import do
from distot.case import OWN_LATENTS, as_rows, read_source
from distot.errors import InputError
from distot.fingerprint import fingerprint_of
from distot.identity import check_source, masses_of
from distot.schedule import Options
from distot.solution import Solution, problem_mass
from distot.source import Source, as_source
from distot.store import Latents, Place, Run, Url, as_place, referred
from distot.work import Resume

GOALS = ("until_chi2", "max_samples", "max_seconds", "checkpoint_seconds", "memory", "device")  # that may change
PLACES = ("workers", "replicas", "ray", "progress", "on_event")  # that say where it is solved, and who hears of it


def go_on(
    run: Place, latents: object, source: object, mass: object, given: Mapping[str, Any], init: bool = False
) -> Solution:
    """The solution of a run that is there, gone on with if there is something left to do.

    latents, source, mass: as for ``solve``; a source of None is the run's own. given: those arguments of ``solve`` that
    were given. Goals and budgets replace the run's own, others must be the same. init: whether heights to start from
    were given.

    Raises InputError where what is given contradicts the run; else as ``resume`` does.
    """
    folder = Run(run)
    check_same(folder, latents, source, mass, given, init)
    changes = _changes(folder, given)
    own = source if callable(source) or isinstance(source, Source) else None
    task = Resume(run, own, _moved(folder, latents), changes, settled=True)
    where: dict[str, Any] = {"workers": None, "replicas": 1, "ray": None, "device": None}
    found: Solution = do(task, **where | {name: given[name] for name in (*PLACES, "device") if name in given})
    return found


def _moved(folder: Run, latents: object) -> Place | None:
    """The latents that are given, if the run has none of its own and those it knows may be elsewhere."""
    here = referred(folder.config["latents"], folder.path)
    if not isinstance(latents, str | Path | Url) or here == folder.path / OWN_LATENTS:
        return None
    return None if isinstance(here, Path) and here.exists() else as_place(latents)


def check_same(
    folder: Run, latents: object, source: object, mass: object, given: Mapping[str, Any], init: bool = False
) -> None:
    """Raises InputError if a run was begun for something else than what is given."""
    config, path = folder.config, folder.path
    rows = as_rows(latents)
    if list(rows.shape) != config["shape"] or fingerprint_of(rows) != config["fingerprint"]:
        raise InputError(
            f"{path} was solved for other latents, of shape {tuple(config['shape'])}; give those, or choose another "
            "name for a new run"
        )
    weights = problem_mass(None if mass is None else np.asarray(mass), rows)
    if "masses" in config and masses_of(weights, rows.shape[0]) != config["masses"]:
        raise InputError(f"{path} was solved for other masses; give those, or choose another name for a new run")
    if source is not None:
        arrays = {name: folder.array(f"source-{name}") for name in config["source_arrays"]}
        found = read_source(source)
        found = found[:] if isinstance(found, Latents) else found
        check_source(as_source(found, rows.shape[1]), config["source"], arrays, str(path))
    if init and not config["init"]:
        raise InputError(f"{path} was begun without init; leave it out, or choose another name for a new run")
    kept = Options().to_dict() | config["options"]
    for name, value in given.items():
        if name not in GOALS + PLACES and value != kept[name]:
            raise InputError(
                f"{path} was begun with {name} = {kept[name]!r}, and not {value!r}; give that, or choose another name "
                "for a new run"
            )


def _changes(folder: Run, given: Mapping[str, Any]) -> dict[str, Any]:
    """Goals and budgets that differ from the run's own; one that was reached is reached for a looser goal, too."""
    kept, checkpoint = Options().to_dict() | folder.config["options"], folder.load_checkpoint()
    changes = {name: given[name] for name in GOALS if name in given and given[name] != kept[name]}
    reached = checkpoint is not None and checkpoint.scalars["reason"] == "until_chi2"
    if reached and (changes.get("until_chi2") or 0.0) > kept["until_chi2"]:
        del changes["until_chi2"]
    return changes
