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
from distot.assign import Winners, plain
from distot.errors import InputError
from distot.solution import Solution

DECAY, PRIOR = 0.95, 5.0  # of margins and counts from step to step; samples that a mean margin is worth
RATE, MOMENTUM = 0.3, 0.9
TINY = 1e-12

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
    the dual value, differentiable with respect to them. Searches cost 2 N d flops a sample, and for "w1" B N numbers of
    memory. Raises InputError for data that are not (N, d), N >= 2, or another cost.
    """

    def __init__(
        self, data: ArrayLike | Tensor, mass: ArrayLike | None = None, cost: Literal["w2", "w1"] = "w2"
    ) -> None:
        super().__init__()
        y = torch.as_tensor(np.asarray(data) if not isinstance(data, Tensor) else data).float().flatten(1)
        if y.ndim != 2 or len(y) < 2 or not bool(torch.isfinite(y).all()):
            raise InputError(f"data must be (N, d) finite numbers with N >= 2, not {tuple(y.shape)}")
        if cost not in ("w2", "w1"):
            raise InputError(f"the cost is w2, ½|x - y|², or w1, |x - y|; not {cost!r}")
        nu = torch.ones(len(y)) if mass is None else torch.as_tensor(np.asarray(mass)).float()
        if nu.shape != (len(y),) or not bool((nu > 0).all()):
            raise InputError(f"mass must be {len(y)} positive numbers, one for each datum")
        self.cost = cost
        self.register_buffer("centre", y.mean(dim=0))
        self.register_buffer("y", y - y.mean(dim=0))
        self.register_buffer("nu", nu / nu.sum())
        self.register_buffer("g", torch.zeros(len(y)))
        self.register_buffer("speed", torch.zeros(len(y)))
        self.register_buffer("won", torch.zeros(len(y)))  # decaying counts, and margins
        self.register_buffer("margin", torch.zeros(len(y)))

    centre: Tensor
    y: Tensor
    nu: Tensor
    g: Tensor
    speed: Tensor
    won: Tensor
    margin: Tensor

    def winners(self, x: Tensor, k: int = 1) -> Winners:
        """The data whose cells hold samples (B, d), and the k best of g_i - c(x, y_i) up to a constant of x."""
        at = x.detach() - self.centre
        if self.cost == "w2":
            return plain(self.y)(at, self.g - 0.5 * self.y.square().sum(dim=1), k)
        best = (self.g - torch.cdist(at, self.y)).topk(k, dim=1)
        return Winners(best.indices, best.values)

    def forward(self, x: Tensor) -> Tensor:
        """The dual value of samples (B, d): at most ½W2² or W1 for any g, but for the chance in B samples."""
        index = self.winners(self._checked(x)).index[:, 0]
        return (self._price(x, index) - self.g[index]).mean() + self.nu @ self.g

    @torch.no_grad()
    def ascend(self, x: Tensor, rate: float = RATE) -> None:
        """One step towards the maximum by samples (B, d): data that get too much sink, those that get too little rise.

        Steps are in units of the margin, as those of the solver, math (14); data that get nothing are raised to where
        they would win their first sample, math (13).
        """
        near = self.winners(self._checked(x), k=2)
        index, n = near.index[:, 0], len(self.y)
        hits = torch.bincount(index, minlength=n).float()
        self.won.mul_(DECAY).add_(hits)
        self.margin.mul_(DECAY).index_add_(0, index, near.margin.float())
        mean = self.margin.sum() / self.won.sum()
        unit = (self.margin + PRIOR * mean) / (self.won + PRIOR)
        self.speed.mul_(MOMENTUM).sub_(rate * unit * (hits / len(x) / self.nu - 1).clamp(max=1 / rate))
        self.g += self.speed
        starved = ((self.won < 0.5) & (self.nu * len(x) / (1 - DECAY) > 2)).nonzero()[:, 0]
        for part in starved.split(max(1, (1 << 24) // len(x))):
            phi = self._price(x, index) - self.g[index]
            at = x - self.centre
            away = torch.cdist(at, self.y[part])
            gap = (away if self.cost == "w1" else 0.5 * away.square()) - phi[:, None]
            self.g[part] = torch.maximum(self.g[part], gap.min(dim=0).values)
        self.g -= self.nu @ self.g

    def fit(self, sample: Sampler, steps: int = 200, batch: int = 1024) -> None:
        """Steps of falling rate for a generator that holds still; the answer is their average."""
        mean = torch.zeros_like(self.g)
        for step in range(steps):
            self.ascend(sample(batch), RATE * min(1.0, 2 - 2 * step / steps))
            if 2 * step >= steps:
                mean += self.g / (steps - steps // 2)
        self.g.copy_(mean)
        self.speed.zero_()

    def solve(
        self, sample: Sampler, until_chi2: float = 0.1, seed: int = 0, max_samples: int | None = None
    ) -> Solution:
        """Sets g by the solver, whose certificate has W2² with its error. Raises InputError for the cost "w1"."""
        if self.cost != "w2":
            raise InputError("the solver is for the cost w2; fit does without it")

        def draw(random: np.random.Generator, n: int) -> np.ndarray[Any, Any]:
            torch.manual_seed(int(random.integers(1 << 62)))
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                return sample(n).double().cpu().numpy()

        y = (self.y + self.centre).double().cpu().numpy()
        warm = (self.g.double() - 0.5 * (self.y + self.centre).double().square().sum(dim=1)).cpu().numpy()
        found = solve(
            y,
            draw,
            self.nu.double().cpu().numpy(),
            until_chi2,
            max_samples,
            seed=seed,
            init=warm if bool(self.g.any()) else None,
            progress=False,
        )
        g = torch.from_numpy(found.heights) + 0.5 * torch.from_numpy(y).square().sum(dim=1)
        self.g.copy_(g - self.nu.double().cpu() @ g)
        return found

    @torch.no_grad()
    def estimate(self, sample: Sampler, n: int = 20_000) -> Estimate:
        """The dual value of n fresh samples: a lower bound on ½W2² or W1 in the mean, with its standard error."""
        x = self._checked(sample(n))
        index = self.winners(x).index[:, 0]
        each = (self._price(x, index) - self.g[index]).double()
        return Estimate(float(each.mean() + self.nu @ self.g), float(each.std() / n**0.5))

    def _price(self, x: Tensor, index: Tensor) -> Tensor:
        """c(x, y_w) (B,)."""
        square = (x - self.centre - self.y[index]).square().sum(dim=1)
        return 0.5 * square if self.cost == "w2" else square.clamp_min(TINY).sqrt()

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.y.shape[1] or len(x) == 0:
            raise InputError(f"samples must have shape (B, {self.y.shape[1]}), not {tuple(x.shape)}")
        return x
