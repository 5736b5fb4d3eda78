"""The Wasserstein distance from a generator to a data set as a loss: its critic is N numbers, and no network.

Between samples x of a generator and N data y_i with masses nu_i, the dual of optimal transport at the cost c is

    max over g of  E_x[ min_i c(x, y_i) - g_i ] + sum_i nu_i g_i,      c = ½|x - y|² or |x - y|,

concave in g. At the maximum its gradient with respect to x is that of c(x, y_w), w the datum whose cell holds x
(envelope theorem), so a generator follows it by minimisation alone; math (33).
Legend: B samples, N data, d dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from distot.api import solve
from distot.errors import InputError
from distot.given import numbers
from distot.solution import Solution

DECAY, PRIOR = 0.95, 5.0  # of margins and counts from step to step; samples that a mean margin is worth
RATE, MOMENTUM = 0.2, 0.5
STRIDE = 3  # levels of the tree that are passed over from one that takes part to the next
TINY = 1e-12
ROWS = 2048

Sampler = Callable[[int], Tensor]
"""n -> samples (n, d)."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float


class Critic(nn.Module):
    """½W2² (``cost`` "w2") or W1 ("w1") between samples and data (N, d), for samples that change.

    ``ascend`` adapts the potentials g to samples of the generator as it is, one step a call; called on samples it is
    the dual value, differentiable with respect to them. Searches cost 2 N d flops a sample, and B N numbers of memory.
    Raises InputError for data that are not (N, d), N >= 2, or another cost.
    """

    def __init__(
        self, data: ArrayLike | Tensor, mass: ArrayLike | None = None, cost: Literal["w2", "w1"] = "w2"
    ) -> None:
        super().__init__()
        y = data if isinstance(data, Tensor) else torch.from_numpy(numbers(data, "the array of data"))
        y = y.float().flatten(1)
        if y.ndim != 2 or len(y) < 2 or not bool(torch.isfinite(y).all()):
            raise InputError(f"data must be (N, d) finite numbers with N >= 2, not {tuple(y.shape)}")
        if cost not in ("w2", "w1"):
            raise InputError(f"the cost is w2, ½|x - y|², or w1, |x - y|; not {cost!r}")
        nu = torch.ones(len(y)) if mass is None else torch.from_numpy(numbers(mass, "mass")).float()
        if nu.shape != (len(y),) or not bool((nu > 0).all()):
            raise InputError(f"mass must be {len(y)} positive numbers, one for each datum")
        self.cost = cost
        order = halves(y - y.mean(dim=0))
        self.depth = (len(y) - 1).bit_length()
        self.register_buffer("order", order)
        self.register_buffer("centre", y.mean(dim=0))
        self.register_buffer("y", (y - y.mean(dim=0))[order])  # leaf by leaf, as all that follows
        self.register_buffer("place", (torch.arange(len(y)) << self.depth) // len(y))  # leaves of the tree they lie in
        self.register_buffer("nu", (nu / nu.sum())[order])
        self.register_buffer("potential", torch.zeros(len(y)))
        self.register_buffer("speed", torch.zeros(len(y)))
        self.levels = [*range(self.depth, 0, -STRIDE)]  # with 2^level nodes
        for level in self.levels:  # decaying sums over samples of each node
            self.register_buffer(f"won{level}", torch.zeros(1 << level))
            self.register_buffer(f"margin{level}", torch.zeros(1 << level))

    order: Tensor
    centre: Tensor
    y: Tensor
    place: Tensor
    nu: Tensor
    potential: Tensor
    speed: Tensor

    @property
    def g(self) -> Tensor:
        """The potentials (N,), in the order of the data, with sum_i nu_i g_i = 0."""
        return torch.empty_like(self.potential).index_copy_(0, self.order, self.potential)

    def scores(self, x: Tensor) -> Tensor:
        """g_i - c(x, y_i) up to a constant of x, (B, N), leaf by leaf."""
        at = x.detach() - self.centre
        if self.cost == "w2":
            return torch.addmm(self.potential - 0.5 * self.y.square().sum(dim=1), at, self.y.T)
        return self.potential - torch.cdist(at, self.y)

    def forward(self, x: Tensor) -> Tensor:
        """The dual value of samples (B, d): at most ½W2² or W1 for any g, but for the chance in B samples."""
        return self._each(x).mean() + self.nu @ self.potential

    @torch.no_grad()
    def map(self, x: Tensor) -> Tensor:
        """The datum whose cell holds each sample, (B, d).

        For samples G(z) of a generator E c(G(z), map) bounds the distance from above, and does so for any later G with
        the data of today: it is what a generator may minimise until the potentials are brought up to date.
        """
        index = torch.cat([self.scores(part).argmax(dim=1) for part in self._checked(x).split(ROWS)])
        return self.y[index] + self.centre

    @torch.no_grad()
    def ascend(self, x: Tensor, rate: float = RATE) -> None:
        """One step towards the maximum by samples (B, d): data that get too much sink, those that get too little rise.

        Steps are in units of the margin, as those of the solver, math (14), and are taken for the data and for the
        nodes of a tree of them, math (16): masses between clusters move by the margins between clusters.
        """
        scores = self.scores(self._checked(x))
        best, index = scores.max(dim=1)
        pyramid = scores
        if len(self.y) < 1 << self.depth:
            pyramid = scores.new_full((len(x), 1 << self.depth), float("-inf"))
            pyramid[:, self.place] = scores
        wanted = torch.zeros(1 << self.depth, device=x.device).index_add_(0, self.place, self.nu)
        leaf, step = self.place[index], torch.zeros_like(self.potential)
        rivals, levels = torch.full_like(best, float("-inf")), []
        for level in range(self.depth, 0, -1):
            node = leaf >> (self.depth - level)
            levels.append((level, node, pyramid.gather(1, (node ^ 1)[:, None])[:, 0], wanted))
            pyramid, wanted = torch.maximum(pyramid[:, ::2], pyramid[:, 1::2]), wanted[::2] + wanted[1::2]
        for level, node, sibling, mass in reversed(levels):  # the best of other nodes: siblings of all nodes above
            rivals = torch.maximum(rivals, sibling)
            if level in self.levels:
                won, margin = self.get_buffer(f"won{level}"), self.get_buffer(f"margin{level}")
                hits = torch.bincount(node, minlength=len(mass)).float()
                won.mul_(DECAY).add_(hits)
                margin.mul_(DECAY).index_add_(0, node, best - rivals)
                unit = (margin + PRIOR * margin.sum() / won.sum()) / (won + PRIOR)
                off = (hits / len(x) / mass.clamp_min(TINY) - 1).clamp(max=1 / rate)
                step += (rate * unit * off)[self.place >> (self.depth - level)]
        self.speed.mul_(MOMENTUM).sub_(step)
        self.potential += self.speed
        self.potential -= self.nu @ self.potential

    def fit(self, sample: Sampler, steps: int = 200, batch: int = 1024) -> None:
        """Steps of falling rate for a generator that holds still; the answer is their average."""
        mean = torch.zeros_like(self.potential)
        for step in range(steps):
            self.ascend(sample(batch), RATE * min(1.0, 2 - 2 * step / steps))
            if 2 * step >= steps:
                mean += self.potential / (steps - steps // 2)
        self.potential.copy_(mean)
        self.speed.zero_()

    def solve(
        self, sample: Sampler, until_chi2: float = 0.1, seed: int = 0, max_samples: int | None = None
    ) -> Solution:
        """Sets g by the solver, whose certificate has W2² with its error. Raises InputError for the cost "w1"."""
        if self.cost != "w2":
            raise InputError("the solver is for the cost w2; fit does without it")

        def draw(random: np.random.Generator, n: int) -> np.ndarray[Any, Any]:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(random.integers(1 << 62)))
                return sample(n).double().cpu().numpy()

        y = (self.y + self.centre).double().cpu().numpy()
        squares = 0.5 * (y**2).sum(axis=1)
        found = solve(
            y,
            draw,
            self.nu.double().cpu().numpy(),
            until_chi2,
            max_samples,
            seed=seed,
            init=self.potential.double().cpu().numpy() - squares if bool(self.potential.any()) else None,
            progress=False,
        )
        potential = torch.from_numpy(found.heights + squares)
        self.potential.copy_(potential - self.nu.double().cpu() @ potential)
        self.speed.zero_()
        return found

    @torch.no_grad()
    def estimate(self, sample: Sampler, n: int = 20_000) -> Estimate:
        """The dual value of n fresh samples: a lower bound on ½W2² or W1 in the mean, with its standard error."""
        each = self._each(sample(n)).double()
        return Estimate(float(each.mean() + self.nu @ self.potential), float(each.std() / n**0.5))

    def _each(self, x: Tensor) -> Tensor:
        """min_i c(x, y_i) - g_i (B,)."""
        parts = self._checked(x).detach().split(ROWS)
        index = torch.cat([self.scores(part).argmax(dim=1) for part in parts])
        square = (x - self.centre - self.y[index]).square().sum(dim=1)
        price = 0.5 * square if self.cost == "w2" else square.clamp_min(TINY).sqrt()
        return price - self.potential[index]

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.y.shape[1] or len(x) == 0:
            raise InputError(f"samples must have shape (B, {self.y.shape[1]}), not {tuple(x.shape)}")
        return x


def halves(y: Tensor) -> Tensor:
    """An order of points (N, d) in which each half, quarter, and so on lies together: halved along principal axes."""
    if len(y) <= 2:
        return torch.arange(len(y), device=y.device)
    centred = y - y.mean(dim=0)
    axis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    order = (centred @ axis).argsort(stable=True)
    first, second = order[: (len(y) + 1) // 2], order[(len(y) + 1) // 2 :]
    return torch.cat([first[halves(y[first])], second[halves(y[second])]])
