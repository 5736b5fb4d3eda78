"""The facet graph: a Newton step from the pairs (winner, runner-up) that a search gives away; docs/math.md (16).

The Hessian of the energy is a graph Laplacian: raising atom i takes mass from its neighbours alone, across facets. A
sample whose two best atoms are i and j lies near their facet, so counting such pairs estimates the graph's weights.
On a grid every process holds some of the pairs, whatever their atoms are, and vectors of its own atoms; a product with
the matrix gathers the vector along ``target`` and adds up what the pairs of all processes make of it. All in float64:
the order of sums then changes so little that the samples of the next step are won by the same atoms on any grid.
Legend: n atoms, m pairs, of this process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.sparse import coo_array
from torch import Tensor

from distot.grid import Axis, Split

ITERATIONS = 10  # of conjugate gradients; 30 gave nothing more
TOLERANCE = 1e-3  # of the residual, relative, in the norm of the diagonal


Product = Callable[[Tensor], Tensor]  # (n,) -> (n,), float64


@dataclass(frozen=True)
class Graph:
    """The Laplacian of n atoms, sum over pairs of (s_i - s_j)² / (2 m tau_ij) as a quadratic form, with damping.

    tau_ij is the mean of the two atoms' margins: a shift of one margin moves about the whole mass of a pair.
    """

    pairs: Tensor  # (2, m) int64
    unit: Tensor  # (m,), tau_ij
    off: Product  # by the sparse matrix of the weights off the diagonal, for all atoms
    degree: Tensor  # (n,)
    split: Split  # of the atoms
    world: Axis

    def solve(self, gradient: Tensor, anchor: Tensor) -> Tensor:
        """s (n,) with (L + diag(anchor)) s = gradient, nearly, by conjugate gradients."""
        sum_up = self.split.axis.sum
        diagonal = self.degree + anchor
        rest = gradient.double()
        s, z = torch.zeros_like(rest), rest / diagonal
        direction, size = z, sum_up(rest @ z)
        enough = TOLERANCE**2 * float(size)
        for _ in range(ITERATIONS):
            if float(size) <= enough:
                break
            image = diagonal * direction - self._own(self.off(self.split.gather(direction)))
            along = size / sum_up(direction @ image)
            s, rest = s + along * direction, rest - along * image
            z = rest / diagonal
            previous, size = size, sum_up(rest @ z)
            direction = z + (size / previous) * direction
        return s

    def stretch(self, shift: Tensor) -> float:
        """Root mean square over all pairs of how far a shift (n,) moves the two apart, in margins."""
        shift = self.split.gather(shift)
        apart = (shift[self.pairs[0]] - shift[self.pairs[1]]) / self.unit
        squares, count = self.world.sum(torch.stack([apart.square().sum(), apart.new_tensor(len(apart))]))
        return float((squares / count).sqrt())

    def _own(self, parts: Tensor) -> Tensor:
        """Values of own atoms, from what every process contributes to those of all atoms."""
        return self.split.own(self.world.sum(parts))


def build(pairs: Tensor, margin: Tensor, split: Split, world: Axis) -> Graph:
    """Graph of pairs (2, m) of atoms, where all atoms have these margins. Costs a sort of 2 m numbers."""
    n, pairs = len(margin), pairs.long()
    unit = 0.5 * (margin[pairs[0]] + margin[pairs[1]])
    weight = (0.5 / world.total(pairs.shape[1])) / unit
    degree = torch.zeros(n, dtype=torch.float64, device=pairs.device).index_add_(0, pairs.flatten(), weight.repeat(2))
    neighbours = _by_torch if pairs.is_cuda else _by_scipy
    found = Graph(pairs, unit, neighbours(pairs, weight, n), degree, split, world)
    return replace(found, degree=found._own(degree))


def _by_scipy(pairs: Tensor, weight: Tensor, n: int) -> Product:
    """Half of the symmetric matrix, by counting; four times faster than a sort by torch."""
    half = coo_array((weight.numpy(), (pairs[0].int().numpy(), pairs[1].int().numpy())), shape=(n, n)).tocsr()
    other = half.T
    return lambda v: torch.from_numpy(half @ v.numpy() + other @ v.numpy())


def _by_torch(pairs: Tensor, weight: Tensor, n: int) -> Product:
    order = torch.argsort(pairs.flatten(), stable=True)
    start = torch.zeros(n + 1, dtype=torch.int32, device=pairs.device)
    start[1:] = torch.bincount(pairs.flatten(), minlength=n).cumsum(0)
    column = pairs.flip(0).flatten()[order].int()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        off = torch.sparse_csr_tensor(start, column, weight.repeat(2)[order], (n, n), check_invariants=False)
    return lambda v: (off @ v[:, None])[:, 0]
