"""A tree of coarser and coarser targets: nodes are k-means clusters of the atoms, split again into smaller ones.

The start solves the coarsest problem first and refines its heights from level to level. The upper levels, down to the
``top`` ones, are clusters of a sample; of the lower ones each process makes those below its own top nodes, for which
their atoms are lent to it. Levels of few nodes are then given to every process, the others stay where they are.
Legend: n atoms, d dimension, K nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot import assign
from distot.atoms import Atoms, Whole, as_atoms, blocks, each_row
from distot.grid import Grid, Split
from distot.power import Array
from distot.target import Target

BRANCH = 8  # atoms or nodes to a node, on average
LEAST = 12  # nodes of the coarsest level
ITERATIONS = 10  # of k-means
TOP = 768  # nodes that every process has, at most
WHOLE = 8192  # nodes of a level, up to which every process gets all of them
TRAIN = 256  # atoms of the sample for each of them; at most half of all atoms


@dataclass(frozen=True)
class Level:
    """Own nodes, which stand for the own atoms or nodes of the next finer level."""

    atoms: Tensor  # (K, d) float32 centroids, in the frame
    mass: Array  # (K,)
    node: Tensor  # (finer,) int64, the place of each finer one's node
    split: Split  # of the nodes; if its axis has one process, all processes have all of them


@dataclass(frozen=True)
class Tree:
    """Levels, coarsest first, and the atoms below the own nodes: the leaves."""

    levels: list[Level]
    leaves: Atoms  # (leaves, d)
    home: Callable[[Tensor], Tensor]  # values of leaves -> values of own atoms


def widths(n: int) -> list[int]:
    """Nodes wanted on each level for n atoms, coarsest first."""
    found = []
    while (n := n // BRANCH) >= LEAST:
        found.append(n)
    return found[::-1]


def upper(n: int) -> int:
    """How many of the levels every process has: those of few enough nodes, and at least one."""
    return max(1, sum(width <= min(TOP, n // (2 * TRAIN)) for width in widths(n)))


def work(n: int) -> int:
    """What ``grow`` costs, in plain samples: one sample is a search among n atoms, math (11)."""
    found, many = widths(n), upper(n)
    if not found:
        return 0
    trained = sum((BRANCH if level else width) for level, width in enumerate(found[:many])) * ITERATIONS / 2
    return round(trained + found[many - 1] + len(found[many:]) * BRANCH * (ITERATIONS + 1))


def grow(target: Target, grid: Grid, seed: int, poll: Callable[[], None]) -> Tree:
    """The tree above the atoms, without empty nodes. ``poll`` may raise to stop.

    Raises InputError if FAISS is not installed.
    """
    wanted = widths(target.n)
    if not wanted:
        return Tree([], target.atoms, lambda values: values)
    many, device = upper(target.n), target.atoms.device
    centroids, parents = _sampled(target, grid, wanted[:many], seed, poll)
    top, counts = _nearest(target, grid, centroids)
    kept = counts.nonzero()[0]
    leaves, mass, node, home = _lend(target, top, counts)
    node = np.searchsorted(kept, node)  # among top nodes that are not empty

    levels = []
    weight = torch.as_tensor(mass, device=device)
    total, centre = (grid.sample.first(grid.target.sum(part)) for part in _moments(node, weight, leaves, len(kept)))
    above = [np.unique(parent[kept], return_inverse=True)[1] for parent in parents] + [np.arange(len(kept))]
    for coarse, fine in pairwise(above):
        own_total, own_centre = _moments(coarse, total, centre / total[:, None], int(coarse.max()) + 1)
        child = np.empty(fine.max() + 1, dtype=np.int64)
        child[fine] = coarse
        levels.append(_level(own_total, own_centre, child, Split((len(own_total),))))

    nodes = _below(leaves, node, [*wanted[many:]], target.n, seed, grid, poll)
    first = node if not nodes else _children(nodes[0], node)
    levels.append(_level(total, centre, first, Split((len(total),))))
    for number, fine in enumerate(nodes):
        own_total, own_centre = _moments(fine, weight, leaves, int(fine.max()) + 1 if len(fine) else 0)
        child = _children(nodes[number + 1], fine) if number + 1 < len(nodes) else fine
        split = Split(tuple(grid.target.objects(len(own_total))), grid.target)
        levels.append(_level(own_total, own_centre, child, split))
    return Tree(_shared(levels), leaves, home)


def _shared(levels: list[Level]) -> list[Level]:
    """The same levels, those of few nodes in every process: to solve them together would be nothing but talk."""
    found = []
    for level, finer in zip(levels, [*levels[1:], None], strict=True):
        split = level.split
        if split.axis.size > 1 and split.n > WHOLE:
            found.append(level)
            continue
        node = level.node if split.axis.size == 1 else level.node + split.first
        if finer is not None and finer.split.axis.size > 1 and finer.split.n <= WHOLE:
            node = finer.split.gather(node)
        atoms, mass = split.gather(level.atoms), split.gather(torch.from_numpy(level.mass)).numpy()
        found.append(Level(atoms, mass, node, Split((split.n,))))
    return found


def _sampled(
    target: Target, grid: Grid, wanted: list[int], seed: int, poll: Callable[[], None]
) -> tuple[Tensor, list[NDArray[np.int64]]]:
    """Centroids (K, d) of the top nodes from a sample of the atoms, and their ancestors on each level above (K,)."""
    from distot.assign.faiss import split

    split_of = target.split
    stride = max(1, target.n // (TRAIN * wanted[-1]))
    some = torch.arange(-split_of.first % stride, split_of.count, stride, device=target.atoms.device)
    rows = split_of.axis.gather(target.atoms[some]).cpu().numpy()
    found = np.zeros((len(wanted), len(rows)), dtype=np.int64)
    poll()
    if grid.leads:
        node = np.zeros(len(rows), dtype=np.int64)
        for level, width in enumerate(wanted):
            found[level] = node = split(rows, node, width, ITERATIONS, seed + 1, lambda: None)
    found = grid.world.first(torch.from_numpy(found)).numpy()
    ones = torch.ones(len(rows), dtype=torch.float64)
    total, centre = _moments(found[-1], ones, Whole(torch.from_numpy(rows)), int(found[-1].max()) + 1)
    centroids = (centre / total[:, None]).float()
    return centroids.to(target.atoms.device), [_children(found[-1], its) for its in found[:-1]]


def _nearest(target: Target, grid: Grid, centroids: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The nearest centroid of each own atom, and how many atoms each centroid has in all."""
    search, half = assign.plain(centroids), -0.5 * centroids.double().square().sum(dim=1)
    own = each_row(target.atoms, lambda tile: search(tile, half, k=1).index[:, 0], torch.int64)
    top = grid.sample.first(own).cpu()
    counts = torch.bincount(top, minlength=len(centroids))
    return top.numpy(), grid.target.sum(counts).numpy()


def _lend(
    target: Target, top: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[Atoms, Array, NDArray[np.int64], Callable[[Tensor], Tensor]]:
    """Atoms, masses and top nodes of the leaves: whole top nodes go to one process, about as many atoms to each.

    Leaves are in the order of all atoms. Atoms that are not in memory as float32 are not sent: whoever needs them reads
    them where they came from.
    """
    axis = target.split.axis
    if axis.size == 1:
        return target.atoms, target.mass, top, lambda values: values
    owner = ((counts.cumsum() - 0.5 * counts) * axis.size / target.n).astype(np.int64)[top]
    there = torch.from_numpy(owner.argsort(kind="stable"))
    ends = np.bincount(owner, minlength=axis.size).cumsum()[:-1].tolist()

    def sent(values: Tensor) -> list[Tensor]:
        return axis.exchange(torch.tensor_split(values[there.to(values.device)], ends))

    nodes, mass = sent(torch.from_numpy(top)), sent(torch.from_numpy(target.mass))
    if isinstance(target.atoms, Whole):
        leaves: Atoms = Whole(torch.cat(sent(target.atoms.whole)))
    else:
        leaves = target.atoms.elsewhere(torch.cat(sent(torch.from_numpy(target.original))).numpy())
    edges = np.cumsum([len(part) for part in nodes])[:-1].tolist()

    def home(values: Tensor) -> Tensor:
        back = torch.cat(axis.exchange(torch.tensor_split(values, edges)))
        return torch.empty_like(back).index_copy_(0, there.to(values.device), back)

    return leaves, torch.cat(mass).numpy(), torch.cat(nodes).numpy(), home


def _below(
    leaves: Atoms,
    node: NDArray[np.int64],
    wanted: list[int],
    n: int,
    seed: int,
    grid: Grid,
    poll: Callable[[], None],
) -> list[NDArray[np.int64]]:
    """Nodes of the leaves on each of the lower levels; every top node is split on its own."""
    from distot.assign.faiss import split

    if not wanted:
        return []
    found = np.zeros((len(wanted), len(leaves)), dtype=np.int64)
    ends, firsts = np.bincount(node).cumsum() if len(node) else np.empty(0, dtype=np.int64), [0] * len(wanted)
    members = [part for part in np.split(node.argsort(kind="stable"), ends[:-1]) if len(part)]
    rows_of = _picked(leaves, members)
    for i in range(max(grid.world.objects(len(members)))):
        poll()  # as often in every process
        if i >= len(members):
            continue
        own, parent = next(rows_of), np.zeros(len(members[i]), dtype=np.int64)
        for level, width in enumerate(wanted):
            parent = split(own, parent, max(1, round(width * len(own) / n)), ITERATIONS, seed + 1, lambda: None)
            found[level, members[i]] = firsts[level] + parent
            firsts[level] += int(parent.max()) + 1
    return list(grid.sample.first(torch.from_numpy(found)).numpy())


def _picked(leaves: Atoms, members: list[NDArray[np.int64]]) -> Iterator[NDArray[np.float32]]:
    """The rows of each list of leaves, list after list; leaves that are not in memory are read for many at once."""
    if isinstance(leaves, Whole):
        rows = leaves.whole.cpu().numpy()
        yield from (rows[its] for its in members)
        return
    sizes = np.array([its.size for its in members])
    turn = (
        (sizes.cumsum() - sizes) * 4 * leaves.shape[1] // int(leaves.room)
    )  # lists of the same turn are read together
    for first, end in pairwise(np.r_[np.flatnonzero(np.diff(turn, prepend=-1)), len(members)]):
        rows = leaves[torch.from_numpy(np.concatenate(members[first:end])).to(leaves.device)].cpu().numpy()
        yield from np.split(rows, sizes[first:end].cumsum()[:-1])


def _children(fine: NDArray[np.int64], coarse: NDArray[np.int64]) -> NDArray[np.int64]:
    """The coarse node of each fine node, from those of the same leaves."""
    parent = np.empty(int(fine.max()) + 1 if len(fine) else 0, dtype=np.int64)
    parent[fine] = coarse
    return parent


def _level(total: Tensor, centre: Tensor, node: NDArray[np.int64], split: Split) -> Level:
    atoms = torch.cat(
        [(centre[rows] / total[rows, None]).float() for rows in blocks(*centre.shape)] or [centre.float()]
    )
    return Level(atoms, total.cpu().numpy(), torch.from_numpy(node).to(atoms.device), split)


def _moments(node: NDArray[np.int64], weight: Tensor, rows: Tensor | Atoms, nodes: int) -> tuple[Tensor, Tensor]:
    """Weights (n,) of rows (n, d), and their weighted sum, added up for each node; float64 (K,), (K, d)."""
    total = torch.zeros(nodes, dtype=torch.float64, device=rows.device)
    centre = torch.zeros((nodes, rows.shape[1]), dtype=torch.float64, device=rows.device)
    for first, tile in as_atoms(rows).tiles():
        part = slice(first, first + len(tile))
        place = torch.from_numpy(node[part]).to(rows.device)
        total.index_add_(0, place, weight[part])
        centre.index_add_(0, place, weight[part, None] * tile)
    return total, centre
