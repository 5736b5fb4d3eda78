"""Exact search by FAISS: a flat index on the CPU, brute force on a GPU; and its k-means.

Neither has an index to rebuild when heights change: on the CPU they are one more float32 coordinate, changed in place,
on a GPU what FAISS takes for the squared norms of the atoms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    """A flat index over atoms (n, d) float32 on the CPU."""

    name = "faiss"

    def __init__(self, atoms: Tensor) -> None:
        n, d = atoms.shape
        self.index = faiss.IndexFlatIP(d + 1)
        self.index.add(torch.cat([atoms, torch.zeros(n, 1, dtype=torch.float32)], dim=1).numpy())
        self.codes = torch.from_numpy(faiss.rev_swig_ptr(self.index.get_xb(), n * (d + 1)).reshape(n, d + 1))
        self.dense = Dense(self.codes[:, :d])

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        n, x = len(self.codes), points(x)
        self.codes[:, -1] = heights
        query = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float32)], dim=1).numpy()
        score, index = (torch.from_numpy(a) for a in self.index.search(query, min(k + 1, n)))
        return _ordered(index, score, k, n, lambda cut: self.dense(x[cut], heights, k))


class GpuFaiss(Exact):
    """Brute force on a GPU over atoms (n, d) of float32, float16 or bfloat16. It has not run on one yet."""

    name = "faiss"

    def __init__(self, atoms: Tensor) -> None:
        if not hasattr(faiss, "StandardGpuResources"):
            raise InputError("this FAISS is for the CPU alone: pip install 'distot[gpu]', or take assigner 'dense'")
        kinds = {
            torch.float32: faiss.DistanceDataType_F32,
            torch.float16: faiss.DistanceDataType_F16,
            torch.bfloat16: faiss.DistanceDataType_BF16,  # type: ignore[attr-defined] # as in FAISS 1.10 for GPUs
        }
        self.atoms, self.kind = atoms.contiguous(), kinds[atoms.dtype]
        self.resources = faiss.StandardGpuResources()
        self.resources.setDefaultNullStreamAllDevices()
        self.dense = Dense(atoms)

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        (n, d), x = self.atoms.shape, points(x).to(self.atoms.dtype).contiguous()
        wanted = min(k + 1, n)
        index = torch.empty(len(x), wanted, dtype=torch.int64, device=x.device)
        norms = (-2 * heights).float().contiguous()  # |x - y|² = |x|² - 2 (<x, y> + h) for these
        args: Any = faiss.GpuDistanceParams()
        args.metric, args.k, args.dims = faiss.METRIC_L2, wanted, d
        args.vectors, args.vectorType, args.numVectors = _pointer(self.atoms), self.kind, n
        args.queries, args.queryType, args.numQueries = _pointer(x), self.kind, len(x)
        args.vectorNorms = faiss.cast_integer_to_float_ptr(norms.data_ptr())
        args.vectorsRowMajor = args.queriesRowMajor = True
        args.ignoreOutDistances = True  # else they are clamped at 0 before tiles are merged
        args.outIndices, args.outIndicesType = _pointer(index), faiss.IndicesDataType_I64
        args.device = self.atoms.device.index or 0
        faiss.bfKnn(self.resources, args)
        score = torch.einsum("bd,bkd->bk", x.float(), self.atoms[index].float()) + heights.float()[index]
        return _ordered(index, score, k, n, lambda cut: self.dense(x[cut], heights, k))


def _pointer(values: Tensor) -> object:
    return faiss.cast_integer_to_void_ptr(values.data_ptr())


def _ordered(index: Tensor, score: Tensor, k: int, n: int, again: Callable[[Tensor], Winners]) -> Winners:
    """The k winners among k + 1, or all n if there are no more; equal scores in the order of their indices.

    FAISS keeps the first-come of equal scores but evicts in no promised order, so a group of equals that begins behind
    the best and is cut at k may hold the wrong ones: such samples are searched ``again``.
    """
    by_index = index.argsort(dim=1)
    order = by_index.gather(1, score.gather(1, by_index).argsort(dim=1, descending=True, stable=True))
    score, index = score.gather(1, order), index.gather(1, order)
    if k < n:
        cut = (score[:, k - 1] == score[:, k]).nonzero()[:, 0]
        if len(cut):
            found = again(cut)
            index[cut, :k], score[cut, :k] = found.index, found.score
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
