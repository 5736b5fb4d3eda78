"""Nearest power cell: which atom wins each sample, argmax_i <x, y_i> + h_i. All of the time goes here.

Legend: B samples, n atoms, d dimension, k winners. Everything is in the frame, float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distot.errors import InputError
from distot.orbit import Orbits

NAMES = ("auto", "native", "triton", "dense", "faiss")


@dataclass(frozen=True)
class Winners:
    """The k best atoms of each sample, best first; equal scores in the order of their indices."""

    index: Tensor  # (B, k) int64
    score: Tensor  # (B, k) float32

    @property
    def margin(self) -> Tensor:
        """Best score minus runner-up (B,) float64; needs k >= 2."""
        return self.score[:, 0].double() - self.score[:, 1].double()


class Assigner(Protocol):
    """Finds winners among fixed atoms (n, d); heights change from call to call. Exact up to float32 rounding.

    ``name`` says which implementation it is. A call costs 2 n (d + 1) flops for each sample; of an orbit those of math
    (18), if the assigner knows orbits, else the same.
    """

    name: str

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        """x (B, d) float32, or orbits of B points; heights (n,) of any float type, 1 <= k <= n."""
        ...


def build(name: str, atoms: Tensor) -> Assigner:
    """The assigner ``name`` over atoms (n, d) float32.

    "native": our own kernels on the CPU. "triton": our own kernel on an NVIDIA GPU. "dense": tiled torch, any device.
    "faiss": FAISS flat index on the CPU.
    "auto": the fastest by bench/reports/assign.md, native on the CPU, dense on a GPU. Raises InputError for an unknown
    name, or a CPU search of atoms on a GPU.
    """
    if name == "auto":
        name = "native" if atoms.device.type == "cpu" else "dense"
    if name == "native":
        from distot.assign.native import Native

        return Native(atoms)
    if name == "triton":
        from distot.assign.triton import Triton

        return Triton(atoms)
    if name == "dense":
        from distot.assign.dense import Dense

        return Dense(atoms)
    if name == "faiss":
        from distot.assign.faiss import Faiss

        return Faiss(atoms)
    raise InputError(f"unknown assigner {name!r}; choose one of {', '.join(NAMES)}")
