"""The facet graph: its Laplacian against a dense one, and the damped solve."""

from __future__ import annotations

import pytest
import torch

from distot import graph
from distot.grid import Axis


def random_pairs(n: int, m: int) -> torch.Tensor:
    """Pairs of different atoms, some of them repeated."""
    generator = torch.Generator().manual_seed(n)
    first = torch.randint(0, n, (m,), generator=generator)
    second = (first + torch.randint(1, n, (m,), generator=generator)) % n
    return torch.stack([first, second]).int()


def laplacian(pairs: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """Sum over pairs of (s_i - s_j)² / (2 m tau_ij) as a matrix (n, n): the definition, math (16)."""
    found = torch.zeros(len(margin), len(margin), dtype=torch.float64)
    for i, j in pairs.T.tolist():
        edge = torch.zeros(len(margin), dtype=torch.float64)
        edge[i], edge[j] = 1, -1
        found += torch.outer(edge, edge) / (pairs.shape[1] * (margin[i] + margin[j]))
    return found


@pytest.mark.parametrize(("n", "m"), [(2, 3), (5, 40), (30, 200)])
def test_solves_the_damped_laplacian(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "ITERATIONS", 200)
    monkeypatch.setattr(graph, "TOLERANCE", 1e-6)
    pairs, margin = random_pairs(n, m), torch.linspace(0.5, 2, n, dtype=torch.float64)
    anchor, gradient = torch.full((n,), 0.1), torch.randn(n, generator=torch.Generator().manual_seed(0))
    matrix = laplacian(pairs, margin) + torch.diag(anchor.double())
    expected = torch.linalg.solve(matrix, gradient.double())
    assert torch.allclose(
        graph.build(pairs, margin, Axis()).solve(gradient, anchor).double(), expected, rtol=1e-3, atol=1e-4
    )


def test_both_sparse_products_agree() -> None:
    pairs, weight, v = random_pairs(50, 400).long(), torch.rand(400), torch.randn(50)
    assert torch.allclose(graph._by_scipy(pairs, weight, 50)(v), graph._by_torch(pairs, weight, 50)(v), atol=1e-5)


def test_stretch_is_in_margins() -> None:
    """Two atoms with margins 1 and 3, moved apart by 4: two mean margins."""
    margin = torch.tensor([1.0, 3.0], dtype=torch.float64)
    found = graph.build(torch.tensor([[0], [1]], dtype=torch.int32), margin, Axis())
    assert found.stretch(torch.tensor([4.0, 0.0])) == pytest.approx(2)
