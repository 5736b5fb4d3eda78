"""Pairs for flow matching by the second, and whether they come as often as they should.

    python -m bench.pairs [--quick]

Beside OTT's SemidiscreteDataloader, which scores every latent with the same potential, and the exact plan of each batch
as torchcfm's OTPlanSampler makes it: squared distances, ``ot.emd``, and a draw from the plan.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import ot
import torch
from numpy.typing import NDArray
from ott.geometry.semidiscrete_pointcloud import SemidiscretePointCloud
from ott.neural.data.semidiscrete_dataloader import SemidiscreteDataloader
from ott.problems.linear.semidiscrete_linear_problem import SemidiscreteLinearProblem
from ott.solvers.linear.semidiscrete import SemidiscreteOutput
from torch.utils.data import DataLoader

import distot
from bench.report import write
from distot.solution import Solution
from jobs.patches import patches

BATCH, THREADS, EPOCHS, ROUNDS, WARM = 256, 2, 8, 3, 8


def rate(coming: Iterator[Any], seconds: float) -> float:
    """Pairs a second."""
    began, done = time.perf_counter(), 0
    for batch in coming:
        done += len(batch[0])
        if time.perf_counter() - began > seconds:
            break
    return done / (time.perf_counter() - began)


def rates(ways: dict[str, Callable[[], Iterator[Any]]], seconds: float) -> dict[str, list[float]]:
    """Pairs a second of each way in each of some rounds, in which all take turns, so that load meets all alike.

    The first batches of a round, which wait for compilers, the start of workers and their first pools, are not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            coming = way()
            for _ in range(WARM):
                next(coming)
            found[name].append(rate(coming, seconds))
            del coming
    return found


def in_workers(pairs: distot.Pairs) -> Iterator[Any]:
    """From two processes, which are not forked, as JAX has threads here."""
    return iter(DataLoader(pairs, batch_size=None, num_workers=2, multiprocessing_context="spawn"))


def by_ott(solution: Solution, y: NDArray[np.float32]) -> SemidiscreteDataloader:
    """OTT's loader with our heights as its potential."""
    cloud = SemidiscretePointCloud(partial(jr.normal), jnp.asarray(y), epsilon=0.0)
    potential = jnp.asarray(distot.heights_to_weights(solution.heights, y.astype(np.float64)), dtype=jnp.float32)
    out = SemidiscreteOutput(g=potential, prob=SemidiscreteLinearProblem(cloud))
    return SemidiscreteDataloader(jr.key(0), out, BATCH, return_indices=True)


def on_cpu(loader: SemidiscreteDataloader) -> Iterator[Any]:
    """Its batches when they have arrived."""
    for batch in loader:
        yield [array.block_until_ready() for array in batch]


def by_batch(y: NDArray[np.float32]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The exact plan of each batch."""
    latents, random = torch.from_numpy(y), np.random.default_rng(0)
    even = np.full(BATCH, 1 / BATCH)
    while True:
        x0, x1 = torch.randn(BATCH, y.shape[1]), latents[torch.from_numpy(random.integers(len(y), size=BATCH))]
        plan = ot.emd(even, even, (torch.cdist(x0, x1) ** 2).numpy()).flatten()
        i, j = np.divmod(random.choice(len(plan), p=plan / plan.sum(), size=BATCH), BATCH)
        yield x0[i], x1[j]


def marginal(solution: Solution, samples: int) -> tuple[float, float]:
    """Unbiased chi2 of the indexes handed out, between epochs, and its noise floor sqrt(2 N) / M."""
    n = solution.facts.shape[0]
    found = []
    for epoch in range(EPOCHS):
        loader = distot.Pairs(solution, 4096, samples=samples, epoch=epoch, latents=False)
        found.append(np.bincount(np.concatenate([index.numpy() for _, index in loader]), minlength=n) / samples)
    share = np.stack(found)
    between = n * (np.sum(share.sum(0) ** 2) - np.sum(share**2)) / (EPOCHS * (EPOCHS - 1)) - 1
    return float(between), float(np.sqrt(2 * n) / (EPOCHS * samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small problem, to see that it runs")
    quick = parser.parse_args().quick
    n, d, seconds, goal = (1000, 8, 0.5, 0.3) if quick else (50_000, 32, 6.0, 0.1)
    torch.set_num_threads(THREADS)
    y = patches(n, d)
    solution = distot.solve(y, until_chi2=goal, certificate_samples=40 * n)
    endless = partial(distot.Pairs, batch=BATCH, samples=20 * n, endless=True)
    sampler = distot.PlanSampler(solution)
    with tempfile.TemporaryDirectory() as folder:
        run = solution.save(Path(folder) / "run.zarr")
        began = time.perf_counter()
        distot.write_pairs(solution, Path(folder) / "pairs.zarr", 20 * n)
        writing = 20 * n / (time.perf_counter() - began)
        rows = rates(
            {
                "distot, orbits": lambda: iter(endless(solution)),
                "distot, orbits, 2 workers": lambda: in_workers(endless(run)),
                "distot, independent noise": lambda: iter(endless(solution, orbits=False)),
                "distot.PlanSampler": lambda: (sampler.sample_plan(torch.randn(BATCH, d)) for _ in count()),
                "distot.PairFile (searched before)": lambda: iter(
                    distot.PairFile(Path(folder) / "pairs.zarr", y, BATCH, endless=True)
                ),
                "OTT SemidiscreteDataloader": lambda: on_cpu(by_ott(solution, y)),
                f"exact plan of {BATCH} by ot.emd": lambda: by_batch(y),
            },
            seconds,
        )
    load = os.getloadavg()[1]
    x, _, index = next(on_cpu(by_ott(solution, y)))
    agreed = float(np.mean(solution.assign(np.asarray(x)) == np.asarray(index)))
    chi2, floor = marginal(solution, 4 * n)
    began = time.perf_counter()
    balanced = distot.Pairs(solution, BATCH, balance=True).balanced
    certificate = solution.certificate
    lines = [
        f"N = {n:,} image patches, d = {d}, Gaussian noise, batches of {BATCH}, chi2 = {certificate.chi2:.4f} ± "
        f"{certificate.chi2_error:.4f}. Pairs a second in {ROUNDS} rounds of {seconds:g} s each, in which all took "
        f"turns: median, least and most. Load average over five minutes at their end: {load:.1f}, of which this bench "
        f"is about {THREADS}.",
        "",
        "| | median | least | most |",
        "|---|---|---|---|",
        *[f"| {name} | {np.median(its):,.0f} | {min(its):,.0f} | {max(its):,.0f} |" for name, its in rows.items()],
        "",
        f"`distot pairs` writes {writing:,.0f} a second. OTT's loader, given our heights, picks the same latent for "
        f"{agreed:.1%} of a batch. The plan of a batch knows nothing of the other {n - BATCH:,} latents: it is the "
        "coupling of another problem, and stands here for its price alone.",
        "",
        f"Marginal: chi2 of the indexes handed out in {EPOCHS} epochs of {4 * n:,} is {chi2:.4f} ± {floor:.4f} (noise "
        f"floor √(2N)/M, dependence within orbits left out); the certificate says {certificate.chi2:.4f}.",
        "",
        f"An epoch of {n:,} balanced pairs took {time.perf_counter() - began:.1f} s: {balanced}. Every latent comes "
        "once.",
    ]
    if not quick:
        write("pairs", "Pairs for flow matching", lines)
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
