"""Pairs for flow matching by the second, and whether they come as often as they should.

    python -m bench.pairs [--quick]

Beside OTT's SemidiscreteDataloader, which scores every latent with the same potential, and the exact plan of each batch
as torchcfm's OTPlanSampler makes it: squared distances, ``ot.emd``, and a draw from the plan.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
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

BATCH, THREADS, EPOCHS = 256, 2, 8


def rate(batches: Iterable[Any], seconds: float) -> float:
    """Pairs a second, from the second batch on."""
    coming = iter(batches)
    next(coming)
    began, count = time.perf_counter(), 0
    for batch in coming:
        count += len(batch[0])
        if time.perf_counter() - began > seconds:
            break
    return count / (time.perf_counter() - began)


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
    count = []
    for epoch in range(EPOCHS):
        loader = distot.Pairs(solution, 4096, samples=samples, epoch=epoch, latents=False)
        count.append(np.bincount(np.concatenate([index.numpy() for _, index in loader]), minlength=n) / samples)
    share = np.stack(count)
    between = n * (np.sum(share.sum(0) ** 2) - np.sum(share**2)) / (EPOCHS * (EPOCHS - 1)) - 1
    return float(between), float(np.sqrt(2 * n) / (EPOCHS * samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small problem, to see that it runs")
    quick = parser.parse_args().quick
    n, d, seconds, goal = (1000, 8, 0.5, 0.3) if quick else (50_000, 32, 10.0, 0.1)
    torch.set_num_threads(THREADS)
    y = patches(n, d)
    solution = distot.solve(y, until_chi2=goal, certificate_samples=40 * n)
    endless = partial(distot.Pairs, batch=BATCH, samples=20 * n, endless=True)
    rows: list[tuple[str, float]] = []
    rows.append(("distot, orbits", rate(endless(solution), seconds)))
    rows.append(
        ("distot, orbits, 2 workers", rate(DataLoader(endless(solution), batch_size=None, num_workers=2), seconds))
    )
    rows.append(("distot, independent noise", rate(endless(solution, orbits=False), seconds)))
    sampler = distot.PlanSampler(solution)
    rows.append(
        ("distot.PlanSampler", rate((sampler.sample_plan(torch.randn(BATCH, d)) for _ in iter(int, 1)), seconds))
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        distot.write_pairs(solution, Path(folder) / "pairs.zarr", 20 * n)
        writing = 20 * n / (time.perf_counter() - began)
        file = distot.PairFile(Path(folder) / "pairs.zarr", y, BATCH, endless=True)
        rows.append(("distot.PairFile (searched before)", rate(file, seconds)))
    rows.append(("OTT SemidiscreteDataloader", rate(on_cpu(by_ott(solution, y)), seconds)))
    rows.append((f"exact plan of {BATCH} by ot.emd", rate(by_batch(y), seconds)))
    x, _, index = next(on_cpu(by_ott(solution, y)))
    agreed = float(np.mean(solution.assign(np.asarray(x)) == np.asarray(index)))
    chi2, floor = marginal(solution, 4 * n)
    began = time.perf_counter()
    balanced = distot.Pairs(solution, BATCH, balance=True).balanced
    certificate = solution.certificate
    lines = [
        f"N = {n:,} image patches, d = {d}, Gaussian noise, batches of {BATCH}, chi2 = {certificate.chi2:.4f} ± "
        f"{certificate.chi2_error:.4f}; pairs a second over {seconds:g} s, after the first batch.",
        "",
        "| | pairs a second |",
        "|---|---|",
        *[f"| {name} | {value:,.0f} |" for name, value in rows],
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
