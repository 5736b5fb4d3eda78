"""Several processes on one problem: the same answer as one process, to rounding, whatever the grid."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from grids import on_grid
from numpy.typing import NDArray

from distot import assign, descent, optim, start, tree
from distot.assign import Winners
from distot.assign.sharded import pack, unpack
from distot.cells import VECTORS, measure
from distot.certify import certify
from distot.entropic import Soft
from distot.errors import InputError
from distot.generate import Generator, Mixing
from distot.grid import Grid, check
from distot.problem import Problem, build_problem
from distot.source import Stream
from distot.target import divide

SHAPES = [(3, 1), (2, 2)]  # by turns as if small and as if large
N, D = 4000, 6
ROUNDED = ("entropic", "cells", "made False", "made True")  # log-sum-exp, and centres of cells, are in float32


def cloud(n: int = N, d: int = D) -> NDArray[np.float64]:
    generator = np.random.default_rng(5)
    rows = generator.standard_normal((n, d)) * np.linspace(2, 0.3, d)
    rows[n // 2 :, 0] += 3.0
    rows[n - 7] = rows[3]  # equal latents far apart
    rows[n // 2] = rows[n // 2 - 1]
    rows[-30:-20] = rows[20:30] + 1e-3  # twins, far apart as well
    rows[-40:-30] = rows[30:40] + 1e-7  # and some that float32 does not tell apart
    return rows


def masses(n: int = N) -> NDArray[np.float64]:
    mass = np.random.default_rng(6).gamma(2.0, size=n)
    mass[[1, n - 1]] = 0.0
    return mass


def whole(problem: Problem, own: torch.Tensor) -> NDArray[Any]:
    return problem.target.split.gather(own).numpy()


def everything(grid: Grid, talk: bool = False) -> dict[str, Any]:
    """The numbers of every phase of a solve. talk: as if the problem were too large for anything to be done by all."""
    if talk:
        optim.SMALL, tree.WHOLE = 100, 50
    problem = build_problem(cloud(), mass=masses(), device="cpu", grid=grid)
    target = problem.target
    found: dict[str, Any] = {
        "fingerprint": target.fingerprint,
        "notes": target.notes,
        "n": target.n,
        "atoms": whole(problem, target.atoms[:]),
        "mass": whole(problem, torch.from_numpy(target.mass)),
        "original": whole(problem, torch.from_numpy(target.original)),
        "atom_of": target.split.axis.gather(torch.from_numpy(target.atom_of)).numpy(),
        "moments": target.moments(),
        "normal": whole(problem, start.normal(problem).heights(target.atoms)),
    }
    assert target.twins is not None
    found |= {"groups": target.twins.group.numpy(), "widths": target.twins.width.numpy()}
    heights, work = start.multilevel(start.of_groups(problem), "native", lambda: None)
    heights = start.to_groups(problem, heights, start.guess_of(problem))
    found |= {"start": whole(problem, heights), "start work": work}
    search, mass = assign.over(problem, "native"), torch.from_numpy(target.mass)
    state = optim.begin(heights, work, target.split, target.twins)
    low = torch.arange(0 if grid.target.rank else 9)  # the same atoms starve on every grid
    state = optim.lifted(state, state.heights.index_fill(0, low, -30.0), 0)
    for _ in range(8):
        state = descent.advance(problem, search, state, mass, Stream.STEP, state.step, lambda: None)
    found |= {
        "heights": whole(problem, state.heights),
        "average": whole(problem, state.average),
        "margin": state.margin,
        "drawn": state.drawn,
        "samples": state.samples,
        "damping": state.damping,
    }
    found["certificate"] = certify(problem, search, state.average, 20_000).to_dict()
    found["entropic"] = certify(problem, search, state.average, 5_000, soft=Soft(0.1, 8)).to_dict()
    sums = measure(problem, search, state.average, 20_000)
    found["cells"] = {name: whole(problem, torch.from_numpy(getattr(sums, name))) for name in VECTORS}
    for balance in (False, True):
        made = Generator(problem, search, state.average, sums, Mixing(balance=balance), 4).take(5000)
        found[f"made {balance}"] = asdict(made)
    moved = build_problem(cloud()[::-1] + 0.01, device="cpu", grid=grid)
    found["transfer"] = whole(moved, start.transfer(moved, problem, state.average, "native"))
    found["probe"] = start.probe(problem, search, state.average, None, lambda: None)
    return found


@cache
def alone() -> dict[str, Any]:
    return everything(Grid())


def assert_close(name: str, found: Any, expected: Any, relative: float = 1e-5) -> None:
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_close(f"{name}.{key}", found[key], value, relative)
    elif isinstance(expected, np.ndarray) and expected.dtype.kind == "f":
        assert np.abs(found - expected).max() <= relative * (np.abs(expected).max() + 1), name
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(found, expected), name
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=relative, abs=relative), name
    elif isinstance(expected, tuple):
        assert len(found) == len(expected), name
        for mine, other in zip(found, expected, strict=True):
            assert_close(name, mine, other, relative)
    else:
        assert found == expected, name


@pytest.mark.parametrize(("shape", "talk"), [(shape, number % 2 == 1) for number, shape in enumerate(SHAPES)])
def test_every_phase_gives_what_one_process_gives(shape: tuple[int, int], talk: bool) -> None:
    answers = on_grid(shape, everything, talk)
    for answer in answers:
        for name in ROUNDED:
            assert_close(name, answer.pop(name), alone()[name], 1e-6)
        assert_close("", answer, {name: its for name, its in alone().items() if name not in ROUNDED}, 1e-9)


def test_packed_keys_are_in_the_order_of_winners() -> None:
    """Best score first, of equal ones the lowest index, and the scores come back bit for bit."""
    generator = np.random.default_rng(0)
    score = torch.from_numpy(generator.standard_normal((500, 6)).astype(np.float32)).round(decimals=1)
    score[0] = torch.tensor([0.0, -0.0, -1e-38, 3e38, -3e38, 1e-38])
    index = torch.from_numpy(generator.permuted(np.tile(np.arange(6), (500, 1)), axis=1)) * 1000
    keys = pack(Winners(index, score), first=(1 << 31) - 6000)
    found = unpack(keys.sort(dim=1, descending=True).values)
    for mine, its in zip(found.index.tolist(), found.score.tolist(), strict=True):
        assert list(zip([-value for value in its], mine, strict=True)) == sorted(
            zip([-value for value in its], mine, strict=True)
        )
    assert torch.equal(found.index.sort(1).values, index.sort(1).values + (1 << 31) - 6000)
    assert torch.equal(found.score.sort(1).values, score.sort(1).values)


def test_shares_keep_the_pieces_of_a_store_together() -> None:
    class Store(np.ndarray[Any, Any]):
        grains = (1000, 100)

    def cuts(n: int, shares: int) -> tuple[int, ...]:
        return divide(np.zeros((n, 1)).view(Store), shares)

    assert cuts(32_000, 4) == (0, 8000, 16_000, 24_000, 32_000)  # whole files
    assert cuts(8050, 3) == (0, 2700, 5400, 8050)  # too few of them: whole chunks
    assert cuts(10, 3) == (0, 3, 6, 10)
    assert divide(np.zeros((7, 1)), 2) == (0, 3, 7)


def test_a_grid_is_whole_rows_of_replicas() -> None:
    assert check(8, 2) == (4, 2)
    with pytest.raises(InputError, match="8 workers cannot hold 3 replicas"):
        check(8, 3)
