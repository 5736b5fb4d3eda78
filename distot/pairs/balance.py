"""Exact balance: over E samples every latent gets exactly its share, and the coupling stays near the optimal one.

All samples are searched once. Latents that were won too often keep the samples of largest margin, which would lose
most; the others are searched again among the latents that lack some, with their heights, until all are placed. Legend:
E samples, N latents, n atoms, d dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from distot.assign import plain
from distot.errors import InputError
from distot.pairs.coupling import Coupling, Index
from distot.pairs.noise import Chance, generator

PART = 65536  # samples searched at a time
FEW = 1000  # samples that are placed by an exact assignment in the end


@dataclass(frozen=True)
class Balanced:
    """The atoms of E samples, and what it took.

    moved: share of the samples that do not have the latent of the coupling. cost: mean |x - y|² of the samples by the
    coupling; rise: by how much balance has raised it, which may be negative, as the coupling has other masses. gap: the
    mean cost is at most this far above the least of all ways to give these samples these quotas, math (23). All three
    are in squared user units.
    """

    atom: Index  # (E,)
    quota: Index  # (N,), samples of each latent
    moved: float
    cost: float
    rise: float
    gap: float

    def __str__(self) -> str:
        return (
            f"{self.moved:.1%} of the samples moved; their mean cost went from {self.cost:.6g} to "
            f"{self.cost + self.rise:.6g}, at most {self.gap:.4g} above the least possible"
        )


def quotas(mass: NDArray[np.float64], samples: int, seed: int, epoch: int) -> Index:
    """Largest remainders of ``samples`` times the masses (N,) of sum 1, ties by lot, (N,) of sum ``samples``."""
    wanted = samples * mass
    found = np.floor(wanted + 1e-9 * np.maximum(1.0, wanted)).astype(np.int64)  # 3 (1 - 1e-16) is 3
    lot = generator(seed, Chance.TIE, epoch, 0).random(len(mass))
    left = np.where(mass > 0, wanted - found, -np.inf)
    lacking = samples - int(found.sum())
    order = np.lexsort((lot, -left) if lacking >= 0 else (lot, np.where(found > 0, left, np.inf)))
    found[order[: abs(lacking)]] += np.sign(lacking)
    return found


def balance(coupling: Coupling, epoch: int, samples: int) -> Balanced:
    """Atoms of all samples of an epoch that give every latent its quota.

    Raises InputError at a fixed epsilon, where latents are drawn and not won.
    """
    if coupling.soft is not None:
        raise InputError("balance is for the plain coupling: this solution has a fixed epsilon; leave balance out")
    quota = quotas(coupling.mass, samples, coupling.noise.seed, epoch)
    atom_of = coupling.problem.target.atom_of
    kept = atom_of >= 0
    lacking = np.bincount(atom_of[kept], quota[kept], minlength=coupling.problem.target.n).astype(np.int64)
    won, margin = _won(coupling, epoch, samples)
    atom = np.full(samples, -1, dtype=np.int64)
    _place(atom, np.arange(samples), won, margin, lacking)
    while (rest := np.flatnonzero(atom < 0)).size:
        open_atoms = np.flatnonzero(lacking)
        if rest.size <= FEW:
            atom[rest] = _exact(coupling, epoch, rest, np.repeat(open_atoms, lacking[open_atoms]))
            break
        _place(atom, rest, *_among(coupling, epoch, rest, open_atoms), lacking)
    return _judged(coupling, epoch, won, atom, quota)


def balanced_index(coupling: Coupling, found: Balanced, epoch: int) -> Index:
    """Latents of the samples (E,), equal ones by their quotas."""
    latents = coupling.groups[0]
    index = np.empty(len(found.atom), dtype=np.int64)
    lot = generator(coupling.noise.seed, Chance.COPY, epoch, 0).random(len(index))
    index[np.lexsort((lot, found.atom))] = np.repeat(latents, found.quota[latents])
    return index


def _won(coupling: Coupling, epoch: int, samples: int) -> tuple[Index, NDArray[np.float32]]:
    """Winner and margin of every sample."""
    atom, margin = np.empty(samples, dtype=np.int64), np.empty(samples, dtype=np.float32)
    for first in range(0, samples, PART):
        last = min(first + PART, samples)
        near = coupling.search(epoch, first, last, 2)[1]
        atom[first:last], margin[first:last] = near.index[:, 0].cpu().numpy(), near.margin.float().cpu().numpy()
    return atom, margin


def _place(atom: Index, rest: Index, won: Index, margin: NDArray[np.float32], lacking: Index) -> None:
    """Gives samples ``rest`` the atoms they won, as far as these lack any: first those of largest margin."""
    order = np.lexsort((-margin, won))
    sorted_won = won[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_won, sorted_won)
    taken = order[rank < lacking[sorted_won]]
    atom[rest[taken]] = won[taken]
    lacking -= np.bincount(won[taken], minlength=len(lacking))


def _among(coupling: Coupling, epoch: int, rest: Index, atoms: Index) -> tuple[Index, NDArray[np.float32]]:
    """Winner and margin of samples ``rest`` among some atoms alone."""
    target = coupling.problem.target
    numbers = torch.from_numpy(atoms).to(target.atoms.device)
    heights = coupling.solution.held.progress.state.average[numbers]
    search, k = plain(target.atoms[numbers]), min(2, len(atoms))
    won, margin = np.empty(len(rest), dtype=np.int64), np.zeros(len(rest), dtype=np.float32)
    for own, x in _parts(coupling, epoch, rest):
        near = search(coupling.problem.frame.source_in(x).to(heights.device), heights, k)
        won[own] = atoms[near.index[:, 0].cpu().numpy()]
        if k == 2:
            margin[own] = near.margin.float().cpu().numpy()
    return won, margin


def _parts(coupling: Coupling, epoch: int, rest: Index) -> Iterator[tuple[slice, Tensor]]:
    """Samples ``rest``, in ascending order, piece by piece: where they are in it, and (b, d) in user units."""
    cuts = np.searchsorted(rest, np.arange(0, rest[-1] + PART + 1, PART))
    for a, b in pairwise(cuts):
        if a < b:
            first, last = int(rest[a]), int(rest[b - 1]) + 1
            yield slice(int(a), int(b)), coupling.noise.samples(epoch, first, last)[torch.from_numpy(rest[a:b] - first)]


def _exact(coupling: Coupling, epoch: int, rest: Index, places: Index) -> Index:
    """The best assignment of a few samples to as many places of atoms."""
    target = coupling.problem.target
    numbers = torch.from_numpy(places).to(target.atoms.device)
    y = target.atoms[numbers].double().cpu()
    x = torch.cat([coupling.problem.frame.source_in(its) for _, its in _parts(coupling, epoch, rest)]).double()
    row, column = linear_sum_assignment((x @ y.T).numpy(), maximize=True)
    found = np.empty(len(rest), dtype=np.int64)
    found[row] = places[column]
    return found


def _judged(coupling: Coupling, epoch: int, won: Index, atom: Index, quota: Index) -> Balanced:
    """With the mean cost before and after, and the gap (23)."""
    frame, atoms, count = coupling.problem.frame, coupling.problem.target.atoms, len(won)
    heights = coupling.solution.held.progress.state.average.cpu()
    centre, cost, score = torch.from_numpy(frame.target_centre), np.zeros(2), np.zeros(2)
    for first in range(0, count, PART):
        own = slice(first, min(first + PART, count))
        x = coupling.noise.samples(epoch, own.start, own.stop)
        seen = frame.source_in(x).double()
        for place, chosen in enumerate((won[own], atom[own])):
            number = torch.from_numpy(chosen)
            y = atoms[number.to(atoms.device)].cpu()
            cost[place] += float((x - centre - frame.target_out(y)).square().sum()) / count
            score[place] += float((seen * y.double()).sum() + heights[number].sum()) / count
    gap = 2 * frame.unit * (score[0] - score[1])
    return Balanced(atom, quota, float(np.mean(won != atom)), float(cost[0]), float(cost[1] - cost[0]), float(gap))
