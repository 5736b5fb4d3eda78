"""Exact search by a FAISS flat index on the CPU: heights are one more float32 coordinate, changed in place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.assign import Exact, Winners
from distot.assign.dense import Dense
from distot.errors import InputError
from distot.orbit import Orbits, points

try:
    import faiss
except ImportError as error:
    raise InputError(
        "FAISS is not installed, and distot clusters the latents with it: pip install 'distot[cpu]' "
        "(or 'distot[gpu]' on a machine with an NVIDIA GPU; never both)"
    ) from error


class Faiss(Exact):
    name = "faiss"

    def __init__(self, atoms: Tensor) -> None:
        if atoms.device.type != "cpu":
            raise InputError(f"the faiss assigner searches on the CPU, the atoms are on {atoms.device}; use 'dense'")
        n, d = atoms.shape
        self.index = faiss.IndexFlatIP(d + 1)
        self.index.add(torch.cat([atoms, torch.zeros(n, 1)], dim=1).numpy())
        self.codes = torch.from_numpy(faiss.rev_swig_ptr(self.index.get_xb(), n * (d + 1)).reshape(n, d + 1))
        self.dense = Dense(self.codes[:, :d])

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        n, x = len(self.codes), points(x)
        self.codes[:, -1] = heights
        query = torch.cat([x, torch.ones(len(x), 1)], dim=1).numpy()
        score, index = (torch.from_numpy(a) for a in self.index.search(query, min(k + 1, n)))
        # FAISS keeps the first-come of equal scores but evicts in no promised order, so a group of equals that
        # begins behind the best and is cut at k may hold the wrong ones: such samples are searched again.
        by_index = index.argsort(dim=1)
        order = by_index.gather(1, score.gather(1, by_index).argsort(dim=1, descending=True, stable=True))
        score, index = score.gather(1, order), index.gather(1, order)
        if k < n:
            cut = (score[:, k - 1] == score[:, k]).nonzero()[:, 0]
            if len(cut):
                again = self.dense(x[cut], heights, k)
                index[cut, :k], score[cut, :k] = again.index, again.score
        return Winners(index[:, :k].contiguous(), score[:, :k].contiguous())


def kmeans(rows: NDArray[np.float32], clusters: int, iterations: int, seed: int) -> NDArray[np.int64]:
    """Cluster of each row (n,) of rows (n, d); trained on at most 256 rows a cluster.

    Costs about 2 d clusters (min(n, 256 clusters) iterations + n) flops.
    """
    if clusters == 1:
        return np.zeros(len(rows), dtype=np.int64)
    training = faiss.Kmeans(rows.shape[1], clusters, niter=iterations, seed=seed, min_points_per_centroid=1)
    training.train(rows)
    found: NDArray[np.int64] = training.index.search(rows, 1)[1][:, 0]
    return found


def split(
    rows: NDArray[np.float32],
    node: NDArray[np.int64],
    width: int,
    iterations: int,
    seed: int,
    poll: Callable[[], None],
) -> NDArray[np.int64]:
    """The node of each row among about ``width`` finer ones: every node has children in proportion to its rows.

    No node is empty. ``poll`` is called between nodes and may raise to stop.
    """
    ends = np.bincount(node).cumsum()
    children = np.diff(np.rint(ends * (width / len(rows))), prepend=0).clip(1).astype(int)
    out, first = np.empty_like(node), 0
    for members, k in zip(np.split(node.argsort(kind="stable"), ends[:-1]), children, strict=True):
        poll()
        child = np.unique(kmeans(rows[members], int(k), iterations, seed), return_inverse=True)[1]
        out[members] = first + child
        first += int(child.max()) + 1
    return out
