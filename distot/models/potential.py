"""Latent-space optimal transport: a smooth Kantorovich potential, learnt by one minimisation, and its map.

The potential of a solved problem is piecewise linear and its map takes N values. A network phi that is fitted to it has
a map T(x) = x - grad phi(x) in closed form, which makes new latents: LSOT (arXiv 1809.05964), math (34). What it is
fitted to is known beforehand, so there is a minimum and no game.
Legend: B samples, N latents, d dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from distot.api import solve
from distot.errors import InputError
from distot.given import array, numbers
from distot.models.autoencoder import dense
from distot.solution import Solution
from distot.source import Key, Stream

ROWS = 4096


class Potential(nn.Module):
    """phi(x) = -<m, x> + ½ <x, A x> + s net(x) for samples x (B, d): a network on top of a quadratic form.

    m: mean of the latents; s: the root of their mean variance.
    """

    def __init__(self, mean: Tensor, scale: float, width: int = 128, seed: int = 0) -> None:
        super().__init__()
        dim = len(mean)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(*dense([dim, width, width, width, 1]))
        self.form = nn.Parameter(torch.zeros(dim, dim))
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", torch.tensor(float(scale)))

    mean: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """phi (B,)."""
        quadratic = 0.5 * (x * (x @ (self.form + self.form.T))).sum(dim=1)
        value: Tensor = quadratic - x @ self.mean + self.scale * self.net(x)[:, 0]
        return value

    def slope(self, x: Tensor) -> Tensor:
        """Its gradient (B, d), differentiable in the weights."""
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            return torch.autograd.grad(self(at).sum(), at, create_graph=self.training)[0]

    def map(self, x: ArrayLike | Tensor) -> Tensor:
        """T(x) = x - grad phi(x), (B, d) float32. Raises InputError for another d."""
        values = (x if isinstance(x, Tensor) else torch.from_numpy(numbers(x, "the array of samples"))).float()
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            raise InputError(f"samples must have shape (B, {len(self.mean)}), not {tuple(values.shape)}")
        values = values.to(self.mean.device)
        return torch.cat([part - self.slope(part).detach() for part in values.split(ROWS)]).cpu()


@dataclass(frozen=True)
class Fit:
    """How a potential is fitted: ``pool`` samples whose duals are known, ``steps`` steps on ``batch`` of them."""

    pool: int = 100_000
    steps: int = 3000
    batch: int = 512
    rate: float = 3e-3
    width: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.pool, self.steps, self.batch, self.width) < 1 or self.batch < 2:
            raise InputError("pool, steps and width must be at least 1, and batch at least 2")


def fit(solution: Solution, how: Fit | None = None) -> Potential:
    """The potential of a solved problem, as a network. Raises InputError at the cost "log", or at a fixed epsilon."""
    return _fit([solution], how or Fit())


def fit_batches(
    latents: ArrayLike,
    source: object = "gaussian",
    how: Fit | None = None,
    *,
    problems: int = 20,
    size: int = 1000,
    until_chi2: float = 0.05,
) -> Potential:
    """The mean of the potentials of ``problems`` small problems, of ``size`` latents each, as a network.

    For latents that are too many to be solved for. The mean is biased towards a map of less spread, the more the
    smaller ``size`` is; with a run of all latents at hand ``fit`` is better. Raises InputError.
    """
    how = how or Fit()
    y = array(latents, "the array of latents")
    if y.ndim != 2 or not 2 <= size <= len(y):
        raise InputError(f"latents are (N, d), and 2 <= size <= N; they are {y.shape}, and size is {size}")
    random = np.random.default_rng(how.seed)
    parts = [y[random.choice(len(y), size, replace=False)] for _ in range(problems)]
    return _fit([solve(part, source, until_chi2=until_chi2, seed=how.seed, progress=False) for part in parts], how)


def _fit(solutions: Sequence[Solution], how: Fit) -> Potential:
    x, u, y = (
        torch.cat(parts)
        for parts in zip(*(_duals(its, how, i, len(solutions)) for i, its in enumerate(solutions)), strict=True)
    )
    centred = y - y.mean(dim=0)
    scale = math.sqrt(float(centred.square().mean()))
    if scale == 0:
        raise InputError("all latents are equal: there is nothing to fit")
    model = Potential(y.mean(dim=0), scale, how.width, how.seed).train()
    phi, slope = 0.5 * x.square().sum(dim=1) - u, x - y
    adam, random = torch.optim.Adam(model.parameters(), how.rate), torch.Generator().manual_seed(how.seed)
    for step in range(how.steps):
        adam.param_groups[0]["lr"] = how.rate * 0.5 * (1 + math.cos(math.pi * step / how.steps))
        index = torch.randint(len(x), (how.batch,), generator=random)
        at = x[index].requires_grad_()
        value = model(at)
        off = value - phi[index]
        bend = torch.autograd.grad(value.sum(), at, create_graph=True)[0] - slope[index]
        loss = (off - off.mean()).square().mean() + bend.square().sum(dim=1).mean()
        adam.zero_grad()
        (loss / scale**2).backward()
        adam.step()
    return model.eval()


def _duals(solution: Solution, how: Fit, number: int, of: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples x (n, d) of the source, u_h(x) (n,) about its mean, and T_h(x) (n, d)."""
    if solution.options.epsilon is not None:
        raise InputError("a potential is fitted to a plain solution; this one is for a fixed epsilon")
    solution.quadratic_only("fitting a potential")
    key = Key(how.seed, Stream.CELLS, 1 + number, 0)
    x = solution.problem.source.draw(key, max(2, how.pool // of))
    y = torch.from_numpy(np.asarray(solution.map(x), dtype=np.float32))
    u = torch.from_numpy(solution.potential(x))
    return x.float(), (u - u.mean()).float(), y
