"""Every assigner honours one contract: the k best atoms, exact to float32 rounding, ties to the lowest index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distot.assign import NAMES, Assigner, Winners, build
from distot.assign.native import Native
from distot.errors import InputError
from distot.orbit import Orbit, Symmetry


def scores(x: Tensor, atoms: Tensor, heights: Tensor) -> Tensor:
    """All scores (B, n) in float64: the definition, math (1)."""
    return x.double() @ atoms.double().T + heights.double()


def problem(b: int, n: int, d: int, scale: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    atoms = scale * torch.randn(n, d, generator=generator)
    x = torch.randn(b, d, generator=generator)
    heights = -0.5 * atoms.double().square().sum(1) / max(scale, 1.0) + scale * torch.randn(n, generator=generator)
    return x, atoms, heights


shared = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors])


class Contract:
    """What holds for every assigner; a subclass names one."""

    name: str

    def make(self, atoms: Tensor) -> Assigner:
        return build(self.name, atoms)

    def check(self, found: Winners, x: Tensor, atoms: Tensor, heights: Tensor, k: int) -> None:
        truth = scores(x, atoms, heights.float())
        assert found.index.shape == found.score.shape == (len(x), k)
        assert found.index.dtype == torch.int64
        assert found.score.dtype == torch.float32
        rounding = 1e-6 * (x.double().abs() @ atoms.double().abs().T + heights.float().double().abs()).amax(1, True)
        own = truth.gather(1, found.index)
        assert ((own - found.score.double()).abs() <= rounding).all(), "the score is not that of the atom"
        best = truth.topk(k, dim=1).values
        assert (own >= best - rounding).all(), "a better atom was missed"
        assert (found.index.sort(1).values.diff(dim=1) > 0).all(), "an atom was given twice"
        assert (found.score.diff(dim=1) <= 0).all(), "not best first"

    @shared
    @given(
        b=st.sampled_from([1, 2, 31, 513]),
        n=st.sampled_from([1, 2, 3, 31, 32, 33, 64, 2047, 2049, 5000]),
        d=st.sampled_from([1, 2, 7, 32, 100]),
        scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
        k=st.sampled_from([1, 2, 3, 7]),
        seed=st.integers(0, 2**31),
    )
    def test_finds_the_best_of_any_shape(self, b: int, n: int, d: int, scale: float, k: int, seed: int) -> None:
        x, atoms, heights = problem(b, n, d, scale, seed)
        k = min(k, n)
        self.check(self.make(atoms)(x, heights, k), x, atoms, heights, k)

    @pytest.mark.parametrize("d", [513, 1000])
    def test_high_dimension(self, d: int) -> None:
        x, atoms, heights = problem(67, 301, d, 1.0, 5)
        self.check(self.make(atoms)(x, heights, 2), x, atoms, heights, 2)

    @shared
    @given(
        b=st.integers(1, 80), n=st.integers(2, 300), d=st.integers(1, 3), k=st.integers(1, 6), seed=st.integers(0, 99)
    )
    def test_ties_go_to_the_lowest_index(self, b: int, n: int, d: int, k: int, seed: int) -> None:
        """Small whole numbers: every score is exact, most are tied."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-1, 2, (b, d), generator=generator).float()
        atoms = torch.randint(-2, 3, (n, d), generator=generator).float()
        heights = torch.randint(-2, 3, (n,), generator=generator)
        k = min(k, n)
        order = scores(x, atoms, heights).sort(dim=1, descending=True, stable=True)
        found = self.make(atoms)(x, heights, k)
        assert torch.equal(found.index, order.indices[:, :k])
        assert torch.equal(found.score.double(), order.values[:, :k])

    def test_all_tied(self) -> None:
        found = self.make(torch.ones(5000, 3))(torch.randn(9, 3), torch.zeros(5000), 3)
        assert torch.equal(found.index, torch.arange(3).expand(9, 3))

    def test_heights_change_from_call_to_call(self) -> None:
        x, atoms, heights = problem(40, 500, 4, 1.0, 0)
        search = self.make(atoms)
        search(x, heights, 2)
        heights[123] += 1e3
        assert (search(x, heights, 2).index[:, 0] == 123).all()

    @pytest.mark.parametrize("k", [1, 2, 5])
    @pytest.mark.parametrize("symmetry", ["rotations", "signs"])
    @pytest.mark.parametrize("shape", [(1, 7, 1), (3, 50, 2), (9, 301, 3), (40, 500, 6), (33, 3001, 20), (5, 9, 40)])
    def test_orbits(self, shape: tuple[int, int, int], symmetry: Symmetry, k: int) -> None:
        """Points of an orbit win what they would win one by one."""
        b, n, d = shape
        z, atoms, heights = problem(b, n, d, 1.0, d)
        orbit = Orbit(d, symmetry, 0)
        x = orbit.of(z, orbit.axes().float())
        assert len(x) == b * orbit.size
        self.check(self.make(atoms)(x, heights, k), x.points(), atoms, heights, k)

    def test_margin(self) -> None:
        x, atoms, heights = problem(40, 500, 4, 1.0, 0)
        top = scores(x, atoms, heights.float()).topk(2, dim=1).values
        assert torch.allclose(self.make(atoms)(x, heights, 2).margin, top[:, 0] - top[:, 1], atol=1e-5)

    def test_leaves_its_arguments_alone(self) -> None:
        x, atoms, heights = problem(40, 500, 4, 1.0, 0)
        before = x.clone(), atoms.clone(), heights.clone()
        self.make(atoms)(x, heights, 2)
        assert all(torch.equal(a, b) for a, b in zip(before, (x, atoms, heights), strict=True))

    def test_no_samples(self) -> None:
        _, atoms, heights = problem(1, 50, 4, 1.0, 0)
        found = self.make(atoms)(torch.empty(0, 4), heights, 2)
        assert found.index.shape == found.score.shape == (0, 2)


class TestDense(Contract):
    name = "dense"

    def test_never_holds_the_whole_score_matrix(self) -> None:
        """The largest tensor made during a search of 2,000 x 50,000 (400 MB of scores) stays within a few MiB."""
        x, atoms, heights = problem(2000, 50_000, 8, 1.0, 1)
        search = self.make(atoms)
        with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
            search(x, heights, 2)
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        assert 1 << 20 < largest <= 8 << 20


class TestFaiss(Contract):
    name = "faiss"


class TestNative(Contract):
    name = "native"


class TestPortable(Contract):
    """The same source, compiled for any machine."""

    name = "native"

    def make(self, atoms: Tensor) -> Assigner:
        return Native(atoms, "portable")


class TestTriton(Contract):
    """The kernel of the GPU, in the interpreter where there is none; atoms in two runs, merged."""

    name = "triton"

    def make(self, atoms: Tensor) -> Assigner:
        pytest.importorskip("triton", reason="triton has no wheel for this platform")
        from distot.assign.triton import Triton

        return Triton(atoms, splits=2)


class TestAuto(Contract):
    name = "auto"

    def test_takes_the_fastest(self) -> None:
        assert self.make(torch.zeros(40, 2)).name == "native"


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="unknown assigner 'nope'; choose one of auto, native, triton, dense, faiss"):
        build("nope", torch.zeros(3, 2))


def test_every_name_is_tested() -> None:
    assert {c.name for c in Contract.__subclasses__()} == set(NAMES)
