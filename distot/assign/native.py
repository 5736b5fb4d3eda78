"""Exact search on the CPU by the kernels in native/: scores stay in registers, orbits cost a transform per atom."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distot._native import available, search
from distot.assign import Exact, Winners
from distot.errors import InputError
from distot.orbit import Orbits, points

TURNED_BYTES = 256 << 20  # for atoms as an orbit's blocks see them; kept if all of them fit, else made block by block


class Native(Exact):
    """``isa``: instruction set, one of ``available()``, the best if None. It uses torch's thread count."""

    name = "native"

    def __init__(self, atoms: Tensor, isa: str | None = None) -> None:
        if atoms.device.type != "cpu":
            raise InputError(f"the native assigner searches on the CPU, the atoms are on {atoms.device}; use 'dense'")
        self.isa = isa or available()[0]
        self.atoms = atoms.contiguous()
        self._basis: Tensor | None = None
        self._turned = self.atoms[:, None]  # (n, g, w), if there is a basis

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        if isinstance(x, Orbits) and x.z.shape[1] > 1:
            draws, pieces = x.z, self._turn(x.basis, k)
        else:
            draws, pieces = points(x).contiguous()[:, None], iter([self.atoms[:, None]])
        h, first = heights.float().contiguous(), 0
        near = Winners(torch.empty(len(x), k, dtype=torch.int64), torch.empty(len(x), k))
        for atoms in pieces:
            own, threads = h[first : first + len(atoms)], torch.get_num_threads()
            search(draws, atoms, own, threads, self.isa, near.index, near.score, first, more=first > 0)
            first += len(atoms)
        return near

    def _turn(self, basis: Tensor, k: int) -> Iterator[Tensor]:
        """The atoms as the blocks of a basis (g, w, d) see them, (n, g, w), in pieces of at least k."""
        if self._basis is basis:
            yield self._turned
            return
        rows = max(k, TURNED_BYTES // (4 * basis.shape[0] * basis.shape[1]))
        for first in range(0, len(self.atoms), rows):
            turned = torch.einsum("nd,gwd->ngw", self.atoms[first : first + rows], basis).contiguous()
            if len(turned) == len(self.atoms):
                self._basis, self._turned = basis, turned
            yield turned
