"""Nearest power cell: which atom wins each sample, argmax_i <x, y_i> + h_i. All of the time goes here.

Legend: B samples, n atoms, d dimension, k winners. Everything is in the frame, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from distot.errors import InputError
from distot.orbit import Orbits
from distot.power import Cost, Quadratic
from distot.problem import Problem
from distot.source import Key, Stream

QUADRATIC = Quadratic()
UNIT = 2.0**-24  # relative error of rounding to float32
LEAST = 1e-30  # margin of scores that are both 0
NAMES = ("auto", "native", "lists", "triton", "dense", "faiss")


@dataclass(frozen=True)
class Winners:
    """The k best atoms of each sample, best first; equal scores in the order of their indices."""

    index: Tensor  # (B, k) int64
    score: Tensor  # (B, k) float32

    @property
    def margin(self) -> Tensor:
        """Best score minus runner-up (B,) float64, no less than float32 can tell; needs k >= 2."""
        return self.apart(torch.ones_like(self.index[:, :1]))[:, 0]

    def apart(self, column: Tensor) -> Tensor:
        """Best score minus that of a column (B, m) of each sample, (B, m) float64, no less than float32 can tell."""
        score = self.score.double()
        best = score[:, :1]
        return torch.maximum(best - score.gather(1, column), best.abs() * UNIT + LEAST)


Searched = tuple[int, Tensor | Orbits, Winners]
"""A portion: the number of its first sample, the samples, their winners."""


class Assigner(Protocol):
    """Finds winners among fixed atoms (n, d); heights change from call to call.

    ``name`` says which implementation it is. A call costs 2 n (d + 1) flops for each sample; of an orbit those of math
    (18), if the assigner knows orbits, else the same. Exact up to float32 rounding unless a recall was asked for;
    ``exact`` is the assigner itself, or one that is exact, as a certificate needs it. ``why`` says what was measured to
    choose it.
    """

    @property
    def name(self) -> str: ...

    @property
    def why(self) -> str: ...

    @property
    def exact(self) -> Assigner: ...

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        """x (B, d) float32, or orbits of B points; heights (n,) of any float type, 1 <= k <= n."""
        ...


class Exact:
    """What assigners share that are exact and have nothing to choose."""

    why = ""

    @property
    def exact(self) -> Self:
        return self


def check(name: str, recall: float | None) -> None:
    """Raises InputError for an unknown name, or a recall that makes no sense or does not go with it."""
    if name not in NAMES:
        raise InputError(f"unknown assigner {name!r}; choose one of {', '.join(NAMES)}")
    if recall is None:
        return
    if name not in ("auto", "lists"):
        raise InputError(f"assigner {name!r} is exact and takes no recall; leave recall out, or choose auto or lists")
    if not 0 < recall < 1:
        raise InputError(f"recall must lie between 0 and 1, or be None for an exact search; it is {recall}")


def build(
    name: str,
    atoms: Tensor,
    recall: float | None = None,
    among: int | None = None,
    products: bool = False,
    trial: Callable[[int], tuple[Tensor | Orbits, Tensor]] | None = None,
) -> Assigner:
    """The assigner ``name`` over atoms (n, d) float32.

    "native": our own kernels on the CPU. "lists": visits only those groups of atoms where the winner may be, exactly or
    with the recall asked for, on the CPU. "triton": our own kernel on an NVIDIA GPU. "dense": tiled torch, any device.
    "faiss": FAISS, a flat index on the CPU, brute force on a GPU. "auto": the fastest by trial. among: how many atoms
    there are in all, if these are a share of them. trial: see ``auto.Trial``. products: scores are e^h <x, y> instead
    of <x, y> + h; "auto" is the plain search then.
    Raises InputError as ``check`` does, or for a CPU search of atoms on a GPU, or of products by lists.
    """
    check(name, recall)
    if products:
        from distot.assign.native import Native
        from distot.assign.products import Products

        if name == "lists" or recall is not None:
            raise InputError(
                "lists leave out atoms by bounds for the quadratic cost alone; take assigner auto, without a recall"
            )
        name = _plainest(atoms.device) if name == "auto" else name
        return Native(atoms, products=True) if name == "native" else Products(name, atoms)
    match name:
        case "native":
            from distot.assign.native import Native

            return Native(atoms)
        case "lists":
            from distot.assign.likely import Likely
            from distot.assign.lists import Lists

            return Lists(atoms) if recall is None else Likely(atoms, recall)
        case "triton":
            from distot.assign.triton import Triton

            return Triton(atoms)
        case "dense":
            from distot.assign.dense import Dense

            return Dense(atoms)
        case "faiss":
            from distot.assign.faiss import Faiss, GpuFaiss

            return GpuFaiss(atoms) if atoms.is_cuda else Faiss(atoms)
    from distot.assign.auto import Auto

    return Auto(atoms, recall, among, trial)


def over(problem: Problem, name: str, recall: float | None = None) -> Assigner:
    """The assigner ``name`` over all atoms of a problem, each process searching its own."""
    target, axis = problem.target, problem.target.split.axis
    own: Assigner | None = None
    if target.atoms.whole is None:
        from distot.assign.tiled import Tiled

        check(name, recall)
        name = feasible(problem, name)
        own = Tiled(target.atoms, name, products=problem.cost.spherical) if target.split.count else None
    elif target.split.count:
        among = None if axis.size == 1 else target.n
        own = build(name, target.atoms.whole, recall, among, problem.cost.spherical, _trial_of(problem))
    if axis.size == 1:
        assert own is not None
        return scored(own, problem.cost)
    from distot.assign.sharded import Sharded

    return scored(Sharded(own, target.split), problem.cost)


def _trial_of(problem: Problem) -> Callable[[int], tuple[Tensor | Orbits, Tensor]] | None:
    """What ``auto`` makes its choice for orbits by: samples of a stream of their own, and heights of Voronoi cells."""
    basis, whole = problem.basis, problem.target.atoms.whole
    if basis is None or whole is None:
        return None

    def trial(count: int) -> tuple[Tensor | Orbits, Tensor]:
        z = problem.source.centred(Key(problem.seed, Stream.MOMENTS, 1, 0), problem.draws(count))
        return problem.orbit.of(z, basis), -0.5 * whole.double().square().sum(dim=1)

    return trial


def scored(assigner: Assigner, cost: Cost) -> Assigner:
    """The assigner with scores of this cost, from one that finds what its scores are made of."""
    if isinstance(cost, Quadratic):
        return assigner
    from distot.assign.products import Logs

    return Logs(assigner, cost)


def feasible(problem: Problem, name: str) -> str:
    """What ``name`` comes to: where atoms come tile by tile "auto" has nothing to try, and is the plain search.

    Raises InputError for those that need all of them at once.
    """
    atoms = problem.target.atoms
    if atoms.whole is not None or name in ("native", "dense", "triton"):
        return name
    if name == "auto":
        return _plainest(atoms.device)
    raise InputError(
        f"assigner {name!r} keeps all latents in memory as float32, for which there is no room; allow more (memory), "
        "share them among more workers, or take auto"
    )


def searches(
    problem: Problem,
    assigner: Assigner,
    stream: Stream,
    step: int,
    samples: int,
    heights: Tensor,
    k: int,
    poll: Callable[[], None],
) -> Iterator[list[Searched]]:
    """The portions of ``Problem.batch`` with their winners, in lists of those that were searched together.

    ``poll`` is called before each search and may raise to stop; where one process works alone on atoms that come tile
    by tile, between these, too.
    """
    if problem.grid.world.size == 1:
        assigner = _polled(assigner, poll)
    for group in problem.groups(stream, step, samples, k):
        poll()
        with problem.grid.meter.timed("search"):
            near = assigner(_joined([x for _, x in group]), heights, k)
        lengths = [len(x) for _, x in group]
        parts = zip(group, near.index.split(lengths), near.score.split(lengths), strict=True)
        yield [(first, x, Winners(index, score)) for (first, x), index, score in parts]


def _polled(assigner: Assigner, poll: Callable[[], None]) -> Assigner:
    """The same assigner, which looks for signals between tiles if it searches these."""
    from distot.assign.products import Logs
    from distot.assign.tiled import Tiled

    if isinstance(assigner, Logs):
        return Logs(_polled(assigner.products, poll), assigner.cost)
    return Tiled(assigner.atoms, assigner.name, poll, assigner.products) if isinstance(assigner, Tiled) else assigner


def _joined(parts: list[Tensor | Orbits]) -> Tensor | Orbits:
    """One request for the samples of all, which go by the same axes if they are orbits."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Orbits):
        return Orbits(torch.cat([x.z for x in parts if isinstance(x, Orbits)]), parts[0].basis)
    return torch.cat([x for x in parts if isinstance(x, Tensor)])


def plain(atoms: Tensor, cost: Cost = QUADRATIC) -> Assigner:
    """The exact assigner that needs no preparation and is fast for any samples, on the device of the atoms."""
    return scored(build(_plainest(atoms.device), atoms, products=cost.spherical), cost)


def _plainest(device: torch.device) -> str:
    return "native" if device.type == "cpu" else "dense"
