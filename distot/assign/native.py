"""Exact search on the CPU by the kernels in native/: scores stay in registers, orbits cost a transform per atom."""

from __future__ import annotations

import torch
from torch import Tensor

from distot._native import available, search
from distot.assign import Winners
from distot.errors import InputError
from distot.orbit import Orbits, points


class Native:
    """``isa``: instruction set, one of ``available()``, the best if None. It uses torch's thread count."""

    name = "native"

    def __init__(self, atoms: Tensor, isa: str | None = None) -> None:
        if atoms.device.type != "cpu":
            raise InputError(f"the native assigner searches on the CPU, the atoms are on {atoms.device}; use 'dense'")
        self.isa = isa or available()[0]
        self.atoms = atoms.contiguous()
        self._basis: Tensor | None = None
        self._turned = self.atoms[:, None]  # (n, g, w): the atoms as the blocks of that basis see them

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        if isinstance(x, Orbits) and x.z.shape[1] > 1:
            if self._basis is not x.basis:
                self._turned = torch.einsum("nd,gwd->ngw", self.atoms, x.basis).contiguous()
                self._basis = x.basis
            draws, atoms = x.z, self._turned
        else:
            draws, atoms = points(x).contiguous()[:, None], self.atoms[:, None]
        index = torch.empty(len(x), k, dtype=torch.int64)
        score = torch.empty(len(x), k)
        search(draws, atoms, heights.float().contiguous(), torch.get_num_threads(), self.isa, index, score)
        return Winners(index, score)
