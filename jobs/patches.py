"""Latents from photographs: patches of the two pictures that come with scikit-learn, reduced by PCA.

    python -m jobs.patches patches.npy --count 20000 --dim 32
    python -m jobs.patches million.npy --count 1000000 --flips

Each latent is a random 8 x 8 x 3 window (192 numbers between 0 and 1), centred, and projected on the leading principal
axes of all windows drawn. Natural patches are a hard and honest test: a few directions carry most of the variance,
flat sky is crowded, edges and textures lie far out. The pictures hold 531,720 windows, and as many
mirrored ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images
from sklearn.decomposition import PCA

from distot.console import start
from distot.store import check_out, read_npy, save_npy

SIDE = 8


def patches(count: int, dim: int, seed: int = 0, whiten: bool = False, flips: bool = False) -> NDArray[np.float32]:
    """``count`` distinct windows, also of the mirrored pictures if ``flips``, in ``dim`` numbers (count, dim)."""
    pictures = load_sample_images().images
    if flips:
        pictures = [*pictures, *(picture[:, ::-1] for picture in pictures)]
    windows = [
        np.lib.stride_tricks.sliding_window_view(picture, (SIDE, SIDE, 3)).reshape(-1, SIDE * SIDE * 3)
        for picture in pictures
    ]
    every = np.concatenate(windows)
    distinct = list({row: place for place, row in enumerate(every.view(f"V{every.shape[1]}")[:, 0].tolist())}.values())
    if count > len(distinct):
        raise SystemExit(f"the pictures hold {len(distinct):,} distinct patches, {count:,} were asked for")
    chosen = np.random.default_rng(seed).choice(distinct, count, replace=False)
    values = every[chosen].astype(np.float32) / 255
    return PCA(dim, svd_solver="covariance_eigh", whiten=whiten).fit_transform(values).astype(np.float32)


def keep(path: Path, values: NDArray[np.float32]) -> None:
    """Writes patches that are not there yet. Raises StoreError if there is something else."""
    if not (path.is_file() and np.array_equal(read_npy(path), values)):
        save_npy(path, values)


def main(
    out: Path,
    count: Annotated[int, typer.Option(help="Number of latents.")] = 20_000,
    dim: Annotated[int, typer.Option(help="Principal axes to keep, at most 192.")] = 32,
    seed: int = 0,
    whiten: Annotated[bool, typer.Option(help="Scale every axis to variance 1.")] = False,
    flips: Annotated[bool, typer.Option(help="Take patches of the mirrored pictures as well.")] = False,
) -> None:
    """Write image patches as an npy file."""
    check_out(out)
    save_npy(out, patches(count, dim, seed, whiten, flips))


if __name__ == "__main__":
    start(main)
