"""The verbs: solve, resume, load, certify. The command line calls these and nothing below them.

Legend: N latents, d dimension.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike
from torch import Tensor

from distot import work
from distot.case import Listen, Room
from distot.errors import DistotWarning, InputError
from distot.generate import Mixing
from distot.given import array
from distot.outputs import AssignFile, Generate, Made, notes_on
from distot.schedule import Options
from distot.solution import Solution
from distot.store import Place, Url, as_place
from distot.work import Task


def solve(
    latents: ArrayLike | Tensor | str | Place,
    source: object = "gaussian",
    mass: ArrayLike | None = None,
    until_chi2: float | None = 0.05,
    max_samples: int | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
    device: str = "auto",
    assigner: str = "auto",
    run: str | Place | None = None,
    *,
    init: Solution | ArrayLike | str | Place | None = None,
    epsilon: float | None = None,
    top_k: int = 32,
    recall: float | None = None,
    checkpoint_seconds: float = 60.0,
    certificate_samples: int | None = None,
    memory: float | None = None,
    exact: bool = False,
    workers: int | None = None,
    replicas: int = 1,
    ray: str | None = None,
    progress: bool | None = None,
    on_event: Listen | None = None,
    cost: str = "quadratic",
) -> Solution:
    """Solves semi-discrete optimal transport from ``source`` to the latents, cost ½|x - y|² or -log<x, y>.

    latents: array or tensor (N, d), or the path of a zarr store (``distot ingest`` makes one); any path
        may be in an object store: s3://BUCKET/KEY, gs://, az://.
    source: "gaussian" N(0, I), "cube" [0, 1]^d, "ball", "sphere" (radius 1), a ``distot.Source``, samples (n, d) as an
        array or the path of a zarr store, or a callable (numpy Generator, n) -> (n, d).
    mass: (N,) wanted masses; None is the store's own, or uniform.
    until_chi2: stop when the squared relative error of the cell masses, math (8), is below this with 95 % confidence.
    max_samples, max_seconds: budgets; the answer so far is returned when one is spent.
    seed: the answer is a function of it, whatever the interruptions.
    init: a warm start: heights (N,) for these latents, or a Solution or run folder, whose latents may be others: new
        ones and moved ones get their height from the nearest old one.
    epsilon: solves the entropic problem at this temperature, in units of cost, instead of the plain one; a sample is
        shared by its ``top_k`` best latents, and ``certificate.truncation`` says what share that leaves out.
    assigner, recall: how winners are found, see ``distot.assign.build``; with a recall, say 0.97, "auto" or "lists" may
        miss some where that is faster, until late in the run. Certificates are exact always.
    memory: GiB that latents may take in each process; None is 40 % of what is available. Latents that take more as
        float32 stay as they are stored, in memory if there is room, else on disk, for the same answer.
    exact: samples only until Newton's method on exact cell masses gets there from what they give: no mass is wrong by
        more than 1e-9 of itself. In the plane, from a Gaussian, Cube or Ball, in one process; see ``Solution.cells``.
    run: a new run folder for checkpoints and the log, from which ``resume`` and ``load`` go on.
    workers, replicas: solves on that many processes, each ``replicas`` of which share the samples over the same
        latents while different ones have different latents; the answer is the same, to rounding. None is this process.
    ray: address of the Ray cluster where they run, "auto" for the one at hand; None starts one on this machine.
    progress: show it on the terminal; None means if stderr is one. on_event: gets every event as a dict.
    cost: "quadratic", or "log": -log<x, y>, for the source "sphere" and latents that are unit vectors; math (28).

    Raises InputError or StoreError before work starts for what can be known by then; Interrupted on Ctrl-C or SIGTERM,
    which carries the solution so far.
    """
    options = Options(
        until_chi2,
        max_samples,
        max_seconds,
        seed,
        device,
        assigner,
        recall,
        checkpoint_seconds,
        certificate_samples,
        epsilon,
        top_k,
        memory,
        exact,
        cost,
    )
    check_workers(workers, replicas, ray)
    if epsilon is None and top_k != Options.top_k:
        raise InputError(f"top_k={top_k} is for the entropic problem alone; give an epsilon, or leave it out")
    if exact and workers is not None:
        raise InputError(f"exact masses are computed in this process alone; leave workers={workers} or exact away")
    given = None if mass is None else array(mass, "mass")
    task = work.Solve(_path(latents), source, given, options, None if run is None else as_place(run), _path(init))
    return do(task, workers, replicas, ray, device, progress, on_event)


def resume(
    run: str | Place,
    *,
    source: object = None,
    latents: ArrayLike | Tensor | str | Place | None = None,
    until_chi2: float | None = None,
    max_samples: int | None = None,
    max_seconds: float | None = None,
    device: str | None = None,
    memory: float | None = None,
    workers: int | None = None,
    replicas: int = 1,
    ray: str | None = None,
    progress: bool | None = None,
    on_event: Listen | None = None,
) -> Solution:
    """Goes on with a run from its newest good checkpoint: the same heights, bit for bit, as if never interrupted.

    workers, replicas, ray: as in ``solve``; they need not be those that the run began with, and then the heights are
    the same to rounding.

    until_chi2, max_samples, max_seconds, device, memory replace the run's own values if given, for good (max_seconds
    counts anew in every process); infinity takes a limit away. source is needed if the run draws from a user's
    callable: the same one, by its name and by what it draws. latents are needed if they have moved; where they are now
    is kept in the run.

    Raises InputError if the latents are not those of the run or nothing is left to do; StoreError if the run is
    missing, locked or damaged.
    """
    changes = {
        "until_chi2": until_chi2,
        "max_samples": max_samples,
        "max_seconds": max_seconds,
        "device": device,
        "memory": memory,
    }
    given = {name: None if value == math.inf else value for name, value in changes.items() if value is not None}
    task = work.Resume(as_place(run), source, _path(latents), given)
    return do(task, workers, replicas, ray, device, progress, on_event)


def load(
    run: str | Place,
    *,
    source: object = None,
    latents: ArrayLike | Tensor | str | Place | None = None,
    device: str | None = None,
) -> Solution:
    """The solution in a run folder, as of its newest good checkpoint, finished or not. Takes no lock.

    Raises StoreError if there is no run, or no checkpoint in it yet.
    """
    return work.Load(as_place(run), source, _path(latents), _on(device))(Room())


def certify(
    run: str | Place,
    samples: int | None = None,
    seed_step: int = 0,
    *,
    source: object = None,
    latents: ArrayLike | Tensor | str | Place | None = None,
    device: str | None = None,
    workers: int | None = None,
    replicas: int = 1,
    ray: str | None = None,
) -> Solution:
    """Certifies a run anew and keeps the certificate in it; ``seed_step`` > 0 draws other, independent samples.

    Raises as ``load`` does, and StoreError if another process is writing to the run.
    """
    task = work.Certify(as_place(run), source, _path(latents), _on(device), samples, seed_step)
    return do(task, workers, replicas, ray, device)


def assign_file(
    run: str | Place,
    samples: ArrayLike | Tensor | str | Place,
    out: str | Place,
    *,
    source: object = None,
    latents: ArrayLike | Tensor | str | Place | None = None,
    device: str | None = None,
    workers: int | None = None,
    replicas: int = 1,
    ray: str | None = None,
) -> int:
    """The latent whose power cell holds each sample, math (2), for samples that may be larger than memory; how many.

    samples: (B, d) array, npy file or zarr array. out: what to write, (B,) int64: an npy file, or a zarr store with the
    array ``index``, which can be read as far as it is written, and behind which the same call goes on. workers,
    replicas, ray: as in ``solve``. For a few samples ``load(run).assign(x)`` is the same without files.

    Raises InputError for samples of another shape, NaN, or a file that cannot be read; StoreError as ``load`` does.
    """
    given = as_place(samples) if isinstance(samples, str | Path | Url) else array(samples, "the array of samples")
    task = AssignFile(as_place(run), source, _path(latents), _on(device), samples=given, out=as_place(out))
    for note in notes_on(given):
        warnings.warn(note, DistotWarning, stacklevel=2)
    found: int = do(task, workers, replicas, ray, device)
    return found


def generate_file(
    run: str | Place,
    out: str | Place,
    n: int,
    *,
    k: int | None = None,
    threshold: float | None = None,
    quantile: float = Mixing.quantile,
    balance: bool = False,
    seed: int | None = None,
    source: object = None,
    latents: ArrayLike | Tensor | str | Place | None = None,
    device: str | None = None,
    workers: int | None = None,
    replicas: int = 1,
    ray: str | None = None,
) -> Made:
    """n new latents by the extended map of AE-OT, math (15), written to a zarr store in a stream.

    out: a store with the arrays ``z`` (n, d) float32 and ``index`` (n,), the latents whose cells hold the noise. It can
    be read as far as it is written, and the same call goes on behind that. k, threshold, quantile, balance: see
    ``distot.Mixing``; seed: of the noise, the run's own if not given. Statistics of the cells are measured if the run
    has none yet, and kept there. workers, replicas, ray: as in ``solve``.

    Raises InputError for k above the number of different latents, or if all noise is refused; StoreError as ``load``
    does, or if the disk is full.
    """
    if n < 1:
        raise InputError(f"the number of samples must be at least 1, not {n}")
    mixing = Mixing(k, threshold, quantile, balance)
    its = as_place(run), source, _path(latents), _on(device)
    made: Made = do(Generate(*its, out=as_place(out), n=n, mixing=mixing, seed=seed), workers, replicas, ray, device)
    return made


def check_workers(workers: int | None, replicas: int = 1, ray: str | None = None) -> None:
    """Raises InputError for what only workers would heed, if there are none."""
    if workers is None and (replicas != 1 or ray is not None):
        given = f"replicas={replicas}" if ray is None else f"ray={ray!r}"
        raise InputError(f"{given} is for work on workers; say how many (workers), or leave it out")


def do(
    task: Task,
    workers: int | None,
    replicas: int,
    ray: str | None,
    device: str | None,
    progress: bool | None = None,
    on_event: Listen | None = None,
) -> Any:
    """Does a task in this process, or on workers if a number of them is given."""
    check_workers(workers, replicas, ray)
    if workers is None:
        return task(Room(show=progress, on_event=on_event))
    from cluster.workers import Shape, on_workers

    if isinstance(task, AssignFile | Generate):
        task.check()  # before workers are started
    return on_workers(task, Shape(workers, replicas, ray, device or "auto"), progress, on_event)


def _path(given: Any) -> Any:
    return as_place(given) if isinstance(given, str) else given


def _on(device: str | None) -> dict[str, Any]:
    """The change of options that a device is."""
    return {} if device is None else {"device": device}
