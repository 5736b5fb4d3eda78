"""Latents that lie much closer to each other than to all others.

Where float32 scores cannot tell some apart, they are one atom (``merged``); where these can, steps treat them as a
group (``grouped``), for the runner-up of a sample is then the twin of its winner and says nothing of the cells around
both: docs/math.md 5 g. Both are found by hashes of projections, so that no two distant rows need be compared. Rows of
all shares meet in the process that their hash names. Legend: n rows, d dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.atoms import Atoms
from distot.grid import Axis, Split

Index = NDArray[np.int64]
Codes = NDArray[np.uint64]

COMPARED = 1 << 26  # numbers of rows that are compared at once
TABLES = 3  # hashes of a row; twins are found if one of them is the same
DIRECTIONS = 12  # projections that a hash is made of, at most
CELL, WIDE = 16.0, 128.0  # width of a cell of a hash, in units of the reach: for groups; for rows that become one
ROUNDS = 24  # of heads that a cell may have; what is left is a crowd
TELLS = 2 * 2.0**-23  # leaves some 16 steps of float32 for the masses of two atoms to be balanced by, see ``reach``
ISOLATED = 8.0  # a group reaches no further than this part of the distance between atoms
FINER = 8.0  # groups are looked for at lengths that fall by this factor
CLEAR = 4.0  # no other row lies within so many lengths of a group
PIECE = 1 << 16  # atoms whose rows are fetched at once
MOST = 16  # atoms of a group: a search finds one more winner than that


@dataclass(frozen=True)
class Twins:
    """Groups of atoms; one of several atoms lies apart from all others. Every process knows them all."""

    group: Tensor  # (n,) int64, of each atom of all shares
    width: Tensor  # (groups,) root mean square distance of its atoms from the first one; 0 for a single atom
    most: int  # atoms of the largest group

    def sums(self, values: Tensor) -> Tensor:
        """Values (n, ...) of atoms added up by group."""
        return values.new_zeros(len(self.width), *values.shape[1:]).index_add_(0, self.group, values)

    def first(self) -> Tensor:
        """The first atom of the group of each atom (n,)."""
        number = torch.arange(len(self.group), device=self.group.device)
        least = torch.full((len(self.width),), len(number), device=number.device)
        return least.scatter_reduce_(0, self.group, number, "amin")[self.group]

    def followers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Atoms (m,) that are not the first of their group, and those (m,), piece by piece, on the CPU."""
        first = self.first().cpu()
        follower = (first != torch.arange(len(first))).nonzero()[:, 0]
        return ((part, first[part]) for part in follower.split(PIECE))

    def to(self, device: torch.device) -> Twins:
        return Twins(self.group.to(device), self.width.to(device), self.most)


def asked(axis: Axis, whom: Index, of: Sequence[NDArray[Any]], answer: Callable[..., NDArray[Any]]) -> Any:
    """What process ``whom[i]`` makes of the i-th row of each array, by ``answer`` for all that arrive there."""
    order = whom.argsort(kind="stable")
    ends = np.bincount(whom, minlength=axis.size).cumsum()[:-1]
    arrived = [axis.exchange([torch.from_numpy(part) for part in np.split(values[order], ends)]) for values in of]
    found = answer(*(torch.cat(parts).numpy() for parts in arrived))
    edges = np.cumsum([len(part) for part in arrived[0]])[:-1]
    back = axis.exchange([torch.from_numpy(part) for part in np.split(found, edges)])
    out = np.empty(len(whom), dtype=found.dtype)
    out[order] = torch.cat(back).numpy()
    return out


Judge = Callable[[NDArray[np.float32], Codes, Index], Index]
"""Of rows (m, d) with their hashes and numbers: the number of the row that stands for each."""


def meeting(every: Atoms, its: Index, code: Codes, first: int, axis: Axis, judge: Judge) -> Index:
    """What ``judge`` says of own rows ``its`` (m,), whose hashes are ``code`` (m,): the number that stands for each.

    Rows with the same hash meet in one process, and only they are compared, COMPARED numbers at a time.
    """
    stands = its + first

    def repeats(codes: Index) -> NDArray[np.bool_]:
        _, inverse, count = np.unique(codes, return_inverse=True, return_counts=True)
        return count[inverse] > 1

    size = np.uint64(axis.size)
    met = np.flatnonzero(asked(axis, (code % size).astype(np.int64), [code.view(np.int64)], repeats))
    most = int(axis.max(torch.tensor(len(met))))
    turns = -(-most * every.shape[1] // COMPARED) or 1
    for turn in range(turns):  # equal hashes have the same turn
        own = met[(code[met] >> np.uint64(32)) % np.uint64(turns) == turn]
        rows = every[torch.from_numpy(its[own])].cpu().numpy()
        whom = (code[own] % size).astype(np.int64)
        given = [rows, code[own].view(np.int64), its[own] + first]
        stands[own] = asked(axis, whom, given, lambda y, codes, number: judge(y, codes.view(np.uint64), number))
    return stands


def equal(rows: NDArray[np.float32], code: Codes, number: Index) -> Index:
    """A judge: the lowest number among equal rows."""
    _, group = np.unique(rows, axis=0, return_inverse=True)
    least = np.full(int(group.max()) + 1 if len(number) else 0, np.iinfo(np.int64).max)
    np.minimum.at(least, group.ravel(), number)
    return least[group.ravel()]


Reach = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""How far rows of these lengths (m,) may be from the one that stands for them, (m,)."""


def reach(dim: int, n: int, typical: float) -> Reach:
    """How near a row another one must be for float32 scores not to tell them apart.

    Scores of a row y are of the size of ½ d^½ |y| and rounded at 2^-23 of that; those of two rows change their order
    over a range of about their distance times the width of a cell, n^(-1/d). It is an eighth of the distance between
    rows that fill the space at most. typical: the length of most rows, which the heights of all go by.
    """
    cell = n ** (-1 / dim)
    return lambda length: np.minimum(TELLS * dim**0.5 / cell * (length + typical), typical * cell / 8)


def merged(every: Atoms, leader: Index, total: int, typical: float, first: int, axis: Axis) -> Index:
    """Leaders (own rows,) after rows which float32 scores cannot tell apart were joined to the lowest one near them.

    leader: the number of the row that stands for each, itself for most, -1 where the mass is zero; total: rows of all
    shares; typical: the length of most rows, in the frame.
    """
    leader, own = leader.copy(), np.arange(first, first + len(leader))
    if not typical > 0:
        return leader
    near = reach(every.shape[1], total, typical)
    for table in range(TABLES):
        its = np.flatnonzero(leader == own)
        code = _codes(every, its, near, table, WIDE)
        leader[its] = meeting(every, its, code, first, axis, partial(_heads, reach=near))
    return _followed(leader, first, axis)


def _followed(leader: Index, first: int, axis: Axis) -> Index:
    """The last of the rows that stand for own ones, as one that was joined to another may have stood for some."""
    leader, ends = leader.copy(), np.cumsum(axis.objects(len(leader)))[:-1]
    for _ in range(TABLES):
        kept = np.flatnonzero(leader >= 0)
        owner = np.searchsorted(ends, leader[kept], side="right")
        leader[kept] = asked(axis, owner, [leader[kept]], lambda row: leader[row - first])
    return leader


def grouped(atoms: Atoms, typical: float, split: Split) -> Twins | None:
    """Groups of 2 to MOST atoms that lie apart from all others; None if there are none."""
    axis, dim, first = split.axis, atoms.shape[1], split.first
    own = np.arange(first, first + split.count)
    leader, cell = own.copy(), split.n ** (-1 / dim)
    top = typical / dim**0.5 * min(1.0, dim**0.5 * cell) / ISOLATED  # random directions see no more than the first
    length, least = top, float(reach(dim, split.n, typical)(np.array([typical]))[0])
    while length > min(least, top / 2):
        single, near = _sizes(leader, split) == 1, partial(np.full_like, fill_value=length)
        for table in range(TABLES):  # in which those that stand for others meet again, as a cell may end among these
            its = np.flatnonzero(single & (leader == own))
            code = _codes(atoms, its, near, table, CELL)
            leader[its] = meeting(atoms, its, code, first, axis, partial(_heads, reach=near, most=MOST))
        leader = _followed(leader, first, axis)
        leader = np.where(_sizes(leader, split) > MOST, own, leader)
        length /= FINER
    heads, group = torch.unique(split.gather(torch.from_numpy(leader)), return_inverse=True)
    if len(heads) == split.n:
        return None
    size = torch.bincount(group)
    square = torch.zeros(len(heads), dtype=torch.float64)
    found = Twins(group, square, int(size.max()))
    for number, to in found.followers():
        away = rows(atoms, number, split) - rows(atoms, to, split)
        square.index_add_(0, group[number], away.square().sum(dim=1))
    return Twins(group, (square / size).sqrt(), found.most)


def _sizes(leader: Index, split: Split) -> Index:
    """How many atoms the group of each own one has."""
    return np.bincount(split.gather(torch.from_numpy(leader)).numpy(), minlength=split.n)[leader]


def rows(atoms: Atoms, number: Tensor, split: Split) -> Tensor:
    """Rows (m, d) float64 of any atoms (m,), everywhere, on the CPU."""
    here = (number >= split.first) & (number < split.first + split.count)
    found = torch.zeros(len(number), atoms.shape[1], dtype=torch.float64)
    found[here] = atoms[(number[here] - split.first).to(atoms.device)].double().cpu()
    return split.axis.sum(found)


def _codes(every: Atoms, its: Index, reach: Reach, table: int, width: float) -> Codes:
    """Hashes (m,) of own rows ``its``: of the cell, as wide as so many reaches, in which their projections lie."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(0, spawn_key=(table,))))
    dim = every.shape[1]
    axes = np.linalg.qr(generator.standard_normal((dim, min(dim, DIRECTIONS))))[0]
    shift = generator.random(axes.shape[1])
    odd = generator.integers(0, 2**63, axes.shape[1] + 1, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    code, wanted = np.empty(len(every), dtype=np.uint64), np.zeros(len(every), dtype=bool)
    wanted[its] = True
    for first, tile in every.tiles():
        part = slice(first, first + len(tile))
        if not wanted[part].any():
            continue
        y = tile.double().cpu().numpy()
        band = np.exp2(np.floor(np.log2(reach(np.sqrt((y**2).sum(axis=1))))))  # cells of a few sizes
        place = np.floor((y @ axes) / (width * band[:, None]) + shift).clip(-(2.0**62), 2.0**62)
        cell = np.concatenate([place.astype(np.int64), np.log2(band).astype(np.int64)[:, None]], axis=1)
        mixed = cell.view(np.uint64) * odd
        mixed ^= mixed >> np.uint64(29)
        mixed *= odd[::-1]
        code[part] = (mixed ^ (mixed >> np.uint64(32))).sum(axis=1, dtype=np.uint64)
    return code[its]


def _heads(rows: NDArray[np.float32], code: Codes, number: Index, reach: Reach, most: int = 0) -> Index:
    """A judge: of rows (m, d) with one hash, the lowest one that is left stands for all that are left within its reach.

    most: rows that belong together at most, and no other row may lie within CLEAR times the reach; the rest stay alone.
    """
    order = np.lexsort((number, code))
    y, cell, names = rows[order].astype(np.float64), code[order], number[order]
    within = reach(np.sqrt((y**2).sum(axis=1)))
    stands, free = names.copy(), np.ones(len(names), dtype=bool)
    for _ in range(ROUNDS):
        left = np.flatnonzero(np.isin(cell, cell[free])) if most else np.flatnonzero(free)
        if not len(left):
            break
        turn = np.concatenate([[0], (cell[left][1:] != cell[left][:-1]).cumsum()])
        head = left[free[left]][np.unique(turn[free[left]], return_index=True)[1]]
        away = np.sqrt(((y[left] - y[head[turn]]) ** 2).sum(axis=1))
        near = away <= within[head[turn]]
        good = np.ones(len(head), dtype=bool)
        if most:
            count, around = (
                np.bincount(turn[its], minlength=len(head)) for its in (near, away <= CLEAR * within[head[turn]])
            )
            good = (count <= most) & (around == count)
        taken = left[near & good[turn] & free[left]]
        stands[taken] = names[head[turn[near & good[turn] & free[left]]]]
        free[taken] = free[head] = False
    out = np.empty_like(stands)
    out[order] = stands
    return out
