"""Every assigner honours one contract: the k best atoms, exact to float32 rounding, ties to the lowest index."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distot._native import available, quick
from distot.assign import NAMES, Assigner, Exact, Winners, build, native, over
from distot.assign.auto import Auto
from distot.assign.likely import Likely
from distot.assign.lists import Lists
from distot.assign.narrow import TRIAL, Narrow, Race
from distot.assign.narrow import _lengths as lengths
from distot.assign.narrow import _narrow as narrow_rows
from distot.assign.native import Native, logsumexp
from distot.errors import InputError
from distot.orbit import Orbit, Orbits, Symmetry
from distot.problem import build_problem
from distot.source import Stream


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

    @pytest.mark.parametrize("share", [0.0, 0.25])
    def test_atoms_turned_for_orbits_are_kept_where_there_is_room(
        self, share: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same winners and scores by pieces; with room the second call turns nothing."""
        y, heights = torch.randn(3000, 6), torch.randn(3000)
        orbit = Orbit(6, "rotations", 0)
        x = orbit.of(torch.randn(100, 6), orbit.axes().float())
        expected = Native(y)(x, heights, 3)
        monkeypatch.setattr(native, "TURNED_BYTES", 24 * 500)
        monkeypatch.setattr(native, "TURNED_ROWS", 256)
        monkeypatch.setattr(native, "TURNED_SHARE", share)
        search = Native(y)
        for _ in range(2):
            found = search(x, heights, 3)
            assert torch.equal(found.index, expected.index)
            assert torch.equal(found.score, expected.score)
        kept = search._kept
        assert (kept is None) == (share == 0)
        assert kept is None or (kept[0] is x.basis and len(kept[1]) == 3000)


class TestPortable(Contract):
    """The same source, compiled for any machine."""

    name = "native"

    def make(self, atoms: Tensor) -> Assigner:
        return Native(atoms, "portable")


class TestNarrow(Contract):
    """Candidates in bfloat16, with the processor's arithmetic for it where there is some, else with ours."""

    name = "native"

    def make(self, atoms: Tensor) -> Assigner:
        return Narrowed(atoms)

    @shared
    @given(
        st.integers(1, 70),
        st.integers(1, 400),
        st.integers(1, 40),
        st.integers(1, 4),
        st.floats(-20, 20),
        st.integers(0, 99),
        st.sampled_from(available()),
    )
    def test_winners_and_scores_are_those_of_float32_bit_for_bit(
        self, b: int, n: int, d: int, k: int, size: float, seed: int, isa: str
    ) -> None:
        """Also for atoms of very different length, equal ones, and numbers that bfloat16 loses altogether."""
        x, atoms, heights = problem(b, n, d, 2.0**size, seed)
        random = torch.Generator().manual_seed(seed)
        atoms *= torch.exp(4 * torch.randn(n, 1, generator=random))
        atoms[n // 2 :] = atoms[: n - n // 2] * (1 + 2.0**-20 * torch.randn(n - n // 2, 1, generator=random))
        atoms[:, d // 2 :] *= 1e-30
        x[b // 2 :] = atoms[torch.randint(n, (b - b // 2,), generator=random)] / 2.0**size
        heights[n // 3] = -torch.inf
        k = min(k, max(1, n - 1))
        expected, found = Native(atoms, isa, narrow=False)(x, heights, k), Narrowed(atoms, isa)(x, heights, k)
        assert torch.equal(found.index, expected.index)
        assert torch.equal(found.score, expected.score)

    def test_the_bound_leaves_out_most_atoms_and_holds_for_all(self) -> None:
        x, atoms, heights = problem(200, 3000, 32, 1.0, 0)
        atoms *= torch.linspace(3, 0.1, 32) ** 2  # a few directions carry most of their length
        narrow = Narrow(atoms)
        turned = x.double() @ narrow.axes
        parts = narrow_rows(turned, lengths(turned), lengths(turned - turned.bfloat16().double()))
        most = heights + parts.view(torch.bfloat16).double() @ narrow.rows.view(torch.bfloat16).double().T
        truth = scores(x, atoms, heights)
        assert (most >= truth).all()
        assert ((most > truth.amax(1, True)).sum(1).double().mean()) < 10
        assert float((most - truth).mean()) > 0.001, "bfloat16 lost nothing"

    def test_the_faster_way_is_taken_and_the_other_one_tried_again(self) -> None:
        race, taken = Race(), []

        def way(number: int, seconds: float) -> None:
            taken.append(number)
            time.sleep(seconds)

        for _ in range(16):
            race(TRIAL, (lambda: way(0, 0.02), lambda: way(1, 0.001)))
        race(1, (lambda: way(0, 0), lambda: way(1, 0)))
        assert taken == [1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]
        assert race.ahead == 1

    def test_taken_where_the_processor_has_it_and_memory_allows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, atoms, heights = problem(TRIAL, 2500, 16, 1.0, 0)
        search = Native(atoms)
        search(x, heights, 2)
        assert (search._narrow is not None) == quick(available()[0])
        monkeypatch.setattr(native, "TURNED_SHARE", 0.0)
        search = Native(atoms, narrow=True)
        assert torch.equal(search(x, heights, 2).index, Native(atoms, narrow=False)(x, heights, 2).index)
        assert search._narrow is None


class Narrowed(Exact):
    """Every search of plain samples with candidates in bfloat16."""

    name = "native"

    def __init__(self, atoms: Tensor, isa: str | None = None) -> None:
        self.native, self.narrow = Native(atoms, isa), Narrow(atoms)

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        if isinstance(x, Orbits):
            return self.native(x, heights, k)
        near = Winners(torch.empty(len(x), k, dtype=torch.int64), torch.empty(len(x), k))
        self.narrow(x.contiguous(), heights.float().contiguous(), near, self.native.isa)
        return near


class TestTriton(Contract):
    """The kernel of the GPU, in the interpreter where there is none; atoms in two runs, merged."""

    name = "triton"

    def make(self, atoms: Tensor) -> Assigner:
        pytest.importorskip("triton", reason="triton has no wheel for this platform")
        from distot.assign.triton import Triton

        return Triton(atoms, splits=2)


class TestLists(Contract):
    """After a first call, which is exhaustive; with other heights, which the bounds must follow."""

    name = "lists"

    def make(self, atoms: Tensor) -> Assigner:
        search = build("lists", atoms)
        search(torch.randn(64, atoms.shape[1], generator=torch.Generator().manual_seed(1)), torch.zeros(len(atoms)), 1)
        return search

    @pytest.mark.parametrize("isa", available())
    @pytest.mark.parametrize("d", [1, 2, 4])
    def test_leaves_most_atoms_out_and_finds_the_same_winners(self, d: int, isa: str) -> None:
        """Heights of the Gaussian map to a wider cloud: a few percent of the atoms are scored, bit for bit the same."""
        generator = torch.Generator().manual_seed(d)
        atoms = 2 * torch.randn(20_000, d, generator=generator)
        heights = -0.25 * atoms.double().square().sum(1)
        native = Native(atoms, isa)
        lists = Lists(atoms, native)
        for samples in (2000, 5000):
            before, x = lists.scored, torch.randn(samples, d, generator=generator)
            found, truth = lists(x, heights, 2), native(x, heights, 2)
            assert torch.equal(found.index, truth.index)
            assert torch.equal(found.score, truth.score)
        assert lists.scored - before < {1: 0.02, 2: 0.1, 4: 0.35}[d] * samples

    def test_a_far_atom_and_moving_heights_do_not_deceive_the_bounds(self) -> None:
        generator = torch.Generator().manual_seed(3)
        atoms = torch.randn(3000, 3, generator=generator)
        atoms[17] *= 1e6
        heights = -0.5 * atoms.double().square().sum(1)
        lists, native = Lists(atoms), Native(atoms)
        for _ in range(6):
            x = torch.randn(500, 3, generator=generator)
            found, truth = lists(x, heights, 3), native(x, heights, 3)
            assert torch.equal(found.index, truth.index)
            heights += 3 * torch.randn(3000, generator=generator).double()

    def test_recall_is_what_was_asked_for(self) -> None:
        """Clusters in 24 dimensions: most winners are found among a part of the atoms, as many as promised."""
        generator = torch.Generator().manual_seed(4)
        centres = 4 * torch.randn(60, 24, generator=generator)
        atoms = centres[torch.randint(60, (20_000,), generator=generator)] + torch.randn(
            20_000, 24, generator=generator
        )
        heights = -2 * atoms.double().square().sum(1) ** 0.5
        lists, native = Likely(atoms, 0.9), Native(atoms)
        assert lists.found is None
        assert lists.exact.name == "native"
        for _ in range(3):
            x, before = torch.randn(20_000, 24, generator=generator), lists.scored
            found, truth = lists(x, heights, 2), native(x, heights, 2)
        share = (lists.scored - before) / len(x)
        recall = float((found.index[:, 0] == truth.index[:, 0]).double().mean())
        assert share < 0.6
        assert recall == pytest.approx(lists.found, abs=0.03)
        assert 0.88 < recall < 0.96
        right = found.index == truth.index
        assert torch.equal(found.score[right], truth.score[right])

    def test_fewer_visited_than_wanted_are_searched_again(self) -> None:
        atoms = torch.randn(300, 2, generator=torch.Generator().manual_seed(5))
        lists, native = Likely(atoms, 0.5), Native(atoms)
        x, heights = torch.randn(2000, 2, generator=torch.Generator().manual_seed(6)), -0.5 * atoms.square().sum(1)
        lists(x, heights, 2)
        found = lists(x, heights, 200)
        assert found.index.max() < 300
        assert torch.equal(found.index, native(x, heights, 200).index)


@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("epsilon", [1e-6, 0.01, 0.5, 1e3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (25, 7, 3), (300, 5001, 20)])
def test_logsumexp(shape: tuple[int, int, int], epsilon: float, isa: str) -> None:
    """From one atom that has all to all atoms alike; as exact as float32 scores allow."""
    x, atoms, heights = problem(*shape, 1.0, 3)
    found = logsumexp(atoms, x, heights, epsilon, isa)
    truth = epsilon * torch.logsumexp(scores(x, atoms, heights.float()) / epsilon, dim=1)
    assert torch.allclose(found, truth, rtol=1e-6, atol=2e-5 + 1e-6 * epsilon)


class Late:
    """An assigner made slow."""

    def __init__(self, search: Assigner) -> None:
        self.search, self.name, self.why, self.exact = search, search.name, search.why, search.exact

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        time.sleep(0.1)
        return self.search(x, heights, k)


class TestAuto(Contract):
    name = "auto"

    def test_a_small_problem_has_one_candidate(self) -> None:
        search = Auto(torch.zeros(40, 2))
        assert (search.name, search.why) == ("native", "nothing else to choose")

    @pytest.mark.parametrize("slow", ["plain", "rival"])
    def test_with_a_recall_takes_the_faster_and_drops_the_slower(self, slow: str) -> None:
        atoms, x = torch.randn(5000, 2), torch.randn(100, 2)
        search, heights = Auto(atoms, 0.9), -0.5 * atoms.square().sum(1)
        setattr(search, slow, Late(getattr(search, slow)))
        for _ in range(5):
            search(x, heights, 2)
        assert search.name == ("lists" if slow == "plain" else "native")
        assert (search.rival is None) == (slow == "rival")
        assert "of the time of native for 100 samples" in search.why

    @pytest.mark.parametrize(("n", "d", "name"), [(200_000, 2, "lists"), (5000, 24, "native")])
    def test_between_exact_ones_the_clock_does_not_decide(self, n: int, d: int, name: str) -> None:
        atoms, x = torch.randn(n, d), torch.randn(400, d)
        search, heights = Auto(atoms), -0.5 * atoms.square().sum(1)
        truth = Native(atoms)(x, heights, 2)
        assert search.rival is not None
        search.plain = Late(search.plain) if name == "native" else search.plain
        search.rival = Late(search.rival) if name == "lists" else search.rival
        for _ in range(5):
            assert torch.equal(search(x, heights, 2).index, truth.index)
        assert search.name == name
        assert (search.rival is None) == (name == "native")
        assert "of all scores" in search.why

    def test_a_small_problem_in_the_plane_is_searched_plainly(self) -> None:
        """Few scores are left over, but to find out which ones would take longer than to compute all."""
        atoms, x = torch.randn(10_000, 2), torch.randn(2000, 2)
        search = Auto(atoms)
        for _ in range(5):
            search(x, -0.5 * atoms.square().sum(1), 2)
        assert search.name == "native"

    @pytest.mark.parametrize(("n", "name"), [(6000, "native"), (220_000, "lists")])
    def test_for_orbits_it_chooses_once_whatever_was_searched_before(self, n: int, name: str) -> None:
        """So a run that goes on, or a certificate, finds the same winners with the same scores, bit for bit."""
        whole = build_problem(np.random.default_rng(0).standard_normal((n, 2)), device="cpu")
        atoms = whole.target.atoms[:]
        heights, x = -0.5 * atoms.square().sum(1), next(iter(whole.batch(Stream.STEP, 0, 2000)))[1]
        fresh, used = over(whole, "auto"), over(whole, "auto")
        for _ in range(4):  # plain samples, from which lists learn
            used(torch.randn(300, 2), heights - 1, 2)
        first, later = fresh(x, heights, 2), used(x, heights, 2)
        again = fresh(x, heights, 2)
        assert fresh.name == used.name == name
        for other in (later, again):
            assert torch.equal(first.index, other.index)
            assert torch.equal(first.score, other.score)

    def test_only_with_a_recall_may_it_miss(self) -> None:
        atoms = torch.randn(5000, 8)
        assert build("auto", atoms).exact.name == "native"
        approximate = build("auto", atoms, recall=0.9)
        assert approximate.exact is not approximate


@pytest.mark.parametrize(
    ("name", "recall", "message"),
    [
        ("native", 0.9, "assigner 'native' is exact and takes no recall"),
        ("lists", 1.5, "recall must lie between 0 and 1, or be None for an exact search; it is 1.5"),
        ("auto", 0.0, "recall must lie between 0 and 1"),
    ],
)
def test_recall_that_makes_no_sense(name: str, recall: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(name, torch.zeros(3, 2), recall)


def test_unknown_name() -> None:
    with pytest.raises(
        InputError, match="unknown assigner 'nope'; choose one of auto, native, lists, triton, dense, faiss"
    ):
        build("nope", torch.zeros(3, 2))


def test_every_name_is_tested() -> None:
    assert {c.name for c in Contract.__subclasses__()} == set(NAMES)
