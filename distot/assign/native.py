"""Exact search on the CPU by the kernels in native/: scores stay in registers, orbits cost a transform per atom."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distot import _native
from distot.assign import Exact, Winners
from distot.assign.narrow import LEAST_ATOMS, LEAST_DIM, Narrow, Race, row_bytes
from distot.atoms import available, tile_rows
from distot.errors import InputError
from distot.orbit import Orbits, points
from distot.power import factors

TURNED_BYTES = 256 << 20  # for a piece of the atoms as an orbit's blocks see them
TURNED_SHARE = 0.25  # of the memory that is available, which all of them together may take to be kept for the next call
TURNED_ROWS = 8192  # at a time, at most; divides a tile


class Native(Exact):
    """``isa``: instruction set, one of ``_native.available()``, the best if None. It uses torch's thread count.

    products: the score of an atom is e^h <x, y> instead of <x, y> + h. narrow: whether plain samples may find their
    candidates in bfloat16, which changes nothing but the time; None means where that may be faster.
    """

    name = "native"

    def __init__(
        self, atoms: Tensor, isa: str | None = None, products: bool = False, narrow: bool | None = None
    ) -> None:
        if atoms.device.type != "cpu":
            raise InputError(f"the native assigner searches on the CPU, the atoms are on {atoms.device}; use 'dense'")
        self.isa = isa or _native.available()[0]
        self.atoms, self.products = atoms.contiguous(), products
        self._kept: tuple[Tensor, Tensor] | None = None  # a basis, and all atoms as it sees them (n, g, w)
        worth = atoms.shape[0] >= LEAST_ATOMS and atoms.shape[1] >= LEAST_DIM and _native.quick(self.isa)
        self._may_be_narrow = not products and (worth if narrow is None else narrow)
        self._narrow: Narrow | None = None
        self._race = Race()

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        near = Winners(torch.empty(len(x), k, dtype=torch.int64), torch.empty(len(x), k, dtype=torch.float32))
        narrow = None if isinstance(x, Orbits) and x.z.shape[1] > 1 else self._narrowed()
        if narrow is None:
            return self.go_on(x, heights, near, 0)
        draws, h = points(x).contiguous(), heights.float().contiguous()
        self._race(
            len(draws),
            (lambda: self.go_on(draws, h, near, 0), lambda: narrow(draws, h, near, self.isa)),
        )
        return near

    def _narrowed(self) -> Narrow | None:
        """The atoms in bfloat16, if they are to be used and there is room for them."""
        if self._may_be_narrow and self._narrow is None:
            wanted = row_bytes(self.atoms.shape[1]) * len(self.atoms)
            self._may_be_narrow = wanted <= TURNED_SHARE * available(self.atoms.device)
            self._narrow = Narrow(self.atoms) if self._may_be_narrow else None
        return self._narrow

    def go_on(self, x: Tensor | Orbits, heights: Tensor, near: Winners, begin: int) -> Winners:
        """Winners among these atoms, the first of which is number ``begin``, and those before it, given in ``near``."""
        if isinstance(x, Orbits) and x.z.shape[1] > 1:
            draws, pieces = x.z, self._turn(x.basis, near.index.shape[1])
        else:
            draws, pieces = points(x).contiguous()[:, None], iter([self.atoms[:, None]])
        h, first, threads = heights.float().contiguous(), begin, torch.get_num_threads()
        factor = factors(heights) if self.products else None
        for atoms in pieces:
            part = slice(first - begin, first - begin + len(atoms))
            own = h[part]
            if factor is not None:
                atoms, own = atoms * factor[part, None, None], torch.zeros_like(own)
            _native.search(draws, atoms, own, threads, self.isa, near.index, near.score, first, more=first > 0)
            first += len(atoms)
        return near

    def _turn(self, basis: Tensor, k: int) -> Iterator[Tensor]:
        """The atoms as the blocks of a basis (g, w, d) see them, (n, g, w), in pieces of at least k."""
        kept = self._kept  # read once, as other threads may search, too
        if kept is not None and kept[0] is basis:
            yield kept[1]
            return
        self._kept = kept = None  # which frees the last ones
        part_rows = min(TURNED_ROWS, tile_rows(basis.shape[2]))
        row_bytes = 4 * basis.shape[0] * basis.shape[1]
        wanted = max(k, TURNED_BYTES // row_bytes)
        if row_bytes * len(self.atoms) <= TURNED_SHARE * available(self.atoms.device):
            wanted = max(k, len(self.atoms))
        rows = -(-wanted // part_rows) * part_rows
        for first in range(0, len(self.atoms), rows):
            atoms = self.atoms[first : first + rows]
            turned = torch.empty(len(atoms), *basis.shape[:2], dtype=torch.float32)
            for part in range(0, len(atoms), part_rows):
                # in float64, as a product in float32 would depend on how many rows there are; always the same rows
                # together, as the last bit of one in float64 may, too
                own = slice(part, part + part_rows)
                turned[own] = torch.einsum("nd,gwd->ngw", atoms[own].double(), basis.double()).float()
            if len(turned) == len(self.atoms):
                self._kept = basis, turned
            yield turned


def logsumexp(atoms: Tensor, x: Tensor, heights: Tensor, epsilon: float, isa: str | None = None) -> Tensor:
    """epsilon log sum_i exp((<x, y_i> + h_i) / epsilon) over all atoms (n, d) for samples x (B, d), (B,) float64.

    A pass like that of the search: only groups of atoms within 40 epsilon of a sample's best are exponentiated.
    """
    out, threads = torch.empty(len(x), dtype=torch.float64), torch.get_num_threads()
    draws, rows, h = x.contiguous()[:, None], atoms.contiguous()[:, None], heights.float().contiguous()
    _native.logsumexp(draws, rows, h, threads, isa or _native.available()[0], epsilon, out)
    return out
