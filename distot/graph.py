"""The facet graph: a Newton step from the pairs (winner, runner-up) that a search gives away; docs/math.md (16).

The Hessian of the energy is a graph Laplacian: raising atom i takes mass from its neighbours alone, across facets. A
sample whose two best atoms are i and j lies near their facet, so counting such pairs estimates the graph's weights.
On a grid every process holds vectors of all atoms, and some of the pairs, whatever their atoms are: a product with the
matrix adds up what the pairs of all processes make of the vector, one collective an iteration. All in float64, for
then the order of sums matters so little that the samples of the next step are won by the same atoms on any grid.
Legend: n atoms, m pairs of this process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.sparse import coo_array
from torch import Tensor

from distot.grid import Axis

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
    off: Product  # by the sparse matrix (n, n) of the weights off the diagonal, from the pairs of all processes
    degree: Tensor  # (n,)
    world: Axis

    def solve(self, gradient: Tensor, anchor: Tensor) -> Tensor:
        """s (n,) with (L + diag(anchor)) s = gradient, nearly, by conjugate gradients."""
        diagonal = self.degree + anchor
        rest = gradient.double()
        s, z = torch.zeros_like(rest), rest / diagonal
        direction, size = z, rest @ z
        enough = TOLERANCE**2 * float(size)
        for _ in range(ITERATIONS):
            if float(size) <= enough:
                break
            image = diagonal * direction - self.off(direction)
            along = size / (direction @ image)
            s, rest = s + along * direction, rest - along * image
            z = rest / diagonal
            previous, size = size, rest @ z
            direction = z + (size / previous) * direction
        return s

    def stretch(self, shift: Tensor) -> float:
        """Root mean square over all pairs of how far a shift (n,) moves the two apart, in margins."""
        apart = (shift[self.pairs[0]] - shift[self.pairs[1]]) / self.unit
        squares, count = self.world.sum(torch.stack([apart.square().sum(), apart.new_tensor(len(apart))]))
        return float((squares / count.clamp_min(1)).sqrt())


def build(pairs: Tensor, margin: Tensor, world: Axis, samples: float | None = None) -> Graph:
    """Graph of atoms with these margins (n,), from the pairs (2, m) of all processes. Costs a sort of 2 m numbers.

    samples: of all processes, that the pairs were found in; None if each has given one.
    """
    n, pairs = len(margin), pairs.long()
    unit = 0.5 * (margin[pairs[0]] + margin[pairs[1]])
    weight = (0.5 / (samples or world.total(pairs.shape[1]))) / unit
    degree = torch.zeros(n, dtype=torch.float64, device=pairs.device).index_add_(0, pairs.flatten(), weight.repeat(2))
    own = (_by_torch if pairs.is_cuda else _by_scipy)(pairs, weight, n)
    return Graph(pairs, unit, lambda v: world.sum(own(v)), world.sum(degree), world)


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
