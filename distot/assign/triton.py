"""Exact search on an NVIDIA GPU in one fused pass: scores stay on the chip, only winners go to memory.

A program holds a block of samples and walks through a run of atoms, tile by tile: products on the tensor cores (three
TF32 products make up one of float32), heights added, and only a tile that beats some runner-up is looked at further. An
orbit's points come as opposite pairs, and the score of -x is h - <x, y>, so half of them need no product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distot.assign import Exact, Winners
from distot.assign.dense import Dense, best_of
from distot.errors import InputError
from distot.orbit import Orbits

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise InputError(
        "the triton assigner needs the triton package, which comes with the CUDA builds of torch on Linux; "
        "use 'dense', which runs on any device"
    ) from error

ROWS, ATOMS, DEPTH = 64, 128, 32  # of a tile; DEPTH coordinates at a time
WARPS = 8
WAVES = 4  # programs for each multiprocessor, at least, if there are atoms enough


@triton.jit
def merge(score, first, index, best, best_at, next_, next_at):  # type: ignore[no-untyped-def]
    """Best and runner-up (rows,) after a tile of scores (rows, width) of the atoms from ``first``."""
    top = tl.max(score, axis=1)
    if tl.max((top > next_).to(tl.int32), axis=0) > 0:
        top_at = tl.argmax(score, axis=1)
        rest = tl.where(index[None, :] == top_at[:, None], -float("inf"), score)
        second, second_at = tl.max(rest, axis=1), tl.argmax(rest, axis=1)
        wins = top > best
        old, old_at = tl.where(wins, best, next_), tl.where(wins, best_at, next_at)
        new, new_at = tl.where(wins, second, top), tl.where(wins, second_at, top_at) + first
        best, best_at = tl.where(wins, top, best), tl.where(wins, top_at + first, best_at)
        next_, next_at = tl.where(new > old, new, old), tl.where(new > old, new_at, old_at)
    return best, best_at, next_, next_at


@triton.jit  # type: ignore[untyped-decorator]
def search(  # type: ignore[no-untyped-def]
    x,  # (b, d)
    atoms,  # (n, d)
    heights,  # (n,)
    index,  # out: (splits, sides, b, 2) int32
    scores,  # out: likewise
    b,
    n,
    d,
    run,  # atoms of a split, a multiple of width
    sides: tl.constexpr,  # 2: -x is searched as well
    rows: tl.constexpr,
    width: tl.constexpr,
    depth: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column, inner = tl.arange(0, width), tl.arange(0, depth)
    low = tl.full((rows,), -float("inf"), tl.float32)
    none = tl.zeros((rows,), tl.int32)
    best, next_, under, under_next = low, low, low, low
    best_at, next_at, under_at, under_next_at = none, none, none, none
    start = tl.program_id(1) * run
    for first in range(start, tl.minimum(start + run, n), width):
        atom = first + column.to(tl.int64)
        product = tl.zeros((rows, width), tl.float32)
        for q in range(0, d, depth):
            inside = q + inner < d
            left = tl.load(
                x + row[:, None] * d + (q + inner)[None, :], mask=(row < b)[:, None] & inside[None, :], other=0.0
            )
            right = tl.load(
                atoms + atom[None, :] * d + (q + inner)[:, None], mask=(atom < n)[None, :] & inside[:, None], other=0.0
            )
            product = tl.dot(left, right, product, input_precision="tf32x3")
        height = tl.load(heights + atom, mask=atom < n, other=-float("inf"))[None, :]
        best, best_at, next_, next_at = merge(height + product, first, column, best, best_at, next_, next_at)
        if sides == 2:
            under, under_at, under_next, under_next_at = merge(
                height - product, first, column, under, under_at, under_next, under_next_at
            )
    out = (tl.program_id(1).to(tl.int64) * sides * b + row) * 2
    tl.store(index + out, best_at, mask=row < b)
    tl.store(index + out + 1, next_at, mask=row < b)
    tl.store(scores + out, best, mask=row < b)
    tl.store(scores + out + 1, next_, mask=row < b)
    if sides == 2:
        out += 2 * b
        tl.store(index + out, under_at, mask=row < b)
        tl.store(index + out + 1, under_next_at, mask=row < b)
        tl.store(scores + out, under, mask=row < b)
        tl.store(scores + out + 1, under_next, mask=row < b)


class Triton(Exact):
    """Best and runner-up in the fused pass; more winners than two, or a single atom, go to ``dense``.

    ``splits``: runs of atoms that are searched side by side and merged at the end; by default enough to fill the GPU.
    """

    name = "triton"

    def __init__(self, atoms: Tensor, splits: int | None = None) -> None:
        if atoms.device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise InputError(
                f"the triton assigner searches on an NVIDIA GPU, the atoms are on {atoms.device}; use 'native' or "
                "'dense', or set TRITON_INTERPRET=1 to try it out, very slowly, on a CPU"
            )
        self.atoms, self.splits, self.dense = atoms.contiguous(), splits, Dense(atoms)

    def __call__(self, x: Tensor | Orbits, heights: Tensor, k: int = 2) -> Winners:
        n, d = self.atoms.shape
        if k > 2 or n < 2 or not len(x):
            return self.dense(x, heights, k)
        sides, request = (2, x.halves()) if isinstance(x, Orbits) else (1, x.contiguous())
        b, blocks = len(request), -(-len(request) // ROWS)
        splits = min(self.splits or -(-WAVES * self._processors() // blocks), -(-n // ATOMS))
        run = -(-n // (splits * ATOMS)) * ATOMS
        splits = -(-n // run)
        index = torch.empty(splits, sides, b, 2, dtype=torch.int32, device=request.device)
        score = torch.empty(splits, sides, b, 2, dtype=torch.float32, device=request.device)
        h = heights.to(torch.float32).contiguous()
        tile = {"rows": ROWS, "width": ATOMS, "depth": DEPTH}
        search[blocks, splits](request, self.atoms, h, index, score, b, n, d, run, sides, **tile, num_warps=WARPS)
        if sides == 2:
            g = x.z.shape[1]  # type: ignore[union-attr]
            index, score = (a.unflatten(2, (-1, g)).transpose(1, 2).flatten(1, 3) for a in (index, score))
        index, score = (a.flatten(1, -2).transpose(0, 1).flatten(1) for a in (index, score))  # (points, 2 splits)
        score, index = best_of(score, index, k)
        return Winners(index.long(), score)

    def _processors(self) -> int:
        if self.atoms.device.type != "cuda":
            return 1
        return torch.cuda.get_device_properties(self.atoms.device).multi_processor_count
