"""Nearest power cell: which atom wins each sample, argmax_i <x, y_i> + h_i. All of the time goes here.

Legend: B samples, n atoms, d dimension, k winners. Everything is in the frame, float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from torch import Tensor

from distot.errors import InputError

NAMES = ("auto", "dense", "faiss")
FAISS_FROM = 32  # dimension


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

    ``name`` says which implementation it is. A call costs 2 n (d + 1) flops for each sample.
    """

    name: str

    def __call__(self, x: Tensor, heights: Tensor, k: int = 2) -> Winners:
        """x (B, d) float32, heights (n,) of any float type, 1 <= k <= n."""
        ...


def build(name: str, atoms: Tensor) -> Assigner:
    """The assigner ``name`` over atoms (n, d) float32.

    "dense": tiled torch, any device. "faiss": FAISS flat index on the CPU. "auto": the faster one by
    bench/reports/assign.md, which is FAISS, if installed, on the CPU from d = FAISS_FROM. Raises InputError for an
    unknown name, or FAISS on a GPU.
    """
    if name == "auto":
        faster = atoms.device.type == "cpu" and atoms.shape[1] >= FAISS_FROM and find_spec("faiss") is not None
        name = "faiss" if faster else "dense"
    if name == "dense":
        from distot.assign.dense import Dense

        return Dense(atoms)
    if name == "faiss":
        from distot.assign.faiss import Faiss

        return Faiss(atoms)
    raise InputError(f"unknown assigner {name!r}; choose one of {', '.join(NAMES)}")
