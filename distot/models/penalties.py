"""What holds the latents Q_Z of an autoencoder to the noise P_Z = N(0, I): penalised optimal transport.

An autoencoder is trained on  E c(x, G(z)) + penalty,  c = ½|x - y|². Without a penalty this is the autoencoder of
AE-OT, whose noise is led to its latents afterwards. With one, noise is decoded as it comes: VEGAN cookbook, math (32).
Legend: B data of a batch, N in all, k dimension of the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from distot.api import solve
from distot.errors import InputError
from distot.models.autoencoder import Code, dense
from distot.solution import Solution

WARM = 10  # epochs until a divergence counts in full
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Penalty(nn.Module):
    """None at all; others inherit. What must outlive an interruption is in the module's state.

    weight: of the penalty, in units of the variance of the data, so that it means the same for all of them.
    """

    random: ClassVar[bool] = False
    """Whether the encoder must be random."""
    optimiser: torch.optim.Optimizer | None = None
    """Of its own parameters."""

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__()
        if not (np.isfinite(weight) and weight >= 0):
            raise InputError(f"the weight of a penalty is a number of at least 0, not {weight}")
        self.weight = weight

    def begin(self, epoch: int, latents: Callable[[], Tensor]) -> None:
        """Before each epoch, from 0 on; ``latents`` gives those of all data (N, k)."""

    def learn(self, z: Tensor, noise: Tensor) -> None:
        """Before each step, with latents (B, k) and as much noise."""

    def forward(self, code: Code, z: Tensor, noise: Tensor, index: Tensor, cost: Tensor, numbers: int) -> Tensor:
        """The penalty for codes of the data ``index`` (B,) and latents z (B, k) drawn from them.

        cost: mean of ½|x - G(z)|² over the batch, without gradient. numbers: in a datum.
        """
        return z.new_zeros(())


class Divergence(Penalty):
    """Kullback and Leibler's, of the code of each datum from the noise: the variational autoencoder.

    The Gaussian of the decoder has the variance that is likeliest for the batch, as that of sigma-VAE (Rybkin et al.,
    arXiv 2006.13202), so there is no weight to set. In the first epochs, whose likeliest variance is large, it counts
    less: else no latent would ever say anything of its datum.
    """

    random = True
    share = 1.0

    def begin(self, epoch: int, latents: Callable[[], Tensor]) -> None:
        self.share = min(1.0, epoch / WARM)

    def forward(self, code: Code, z: Tensor, noise: Tensor, index: Tensor, cost: Tensor, numbers: int) -> Tensor:
        assert code.log_variance is not None
        each = 0.5 * (code.mean.square() + code.log_variance.exp() - 1 - code.log_variance).sum(dim=1)
        return self.share * 2 * cost / numbers * each.mean()


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Inverse multiquadrics of points a (B, k), b (M, k): sum of C / (C + |a - b|²) over C = 2 k s, (B, M).

    With the scales s of WAE-MMD (Tolstikhin et al., arXiv 1711.01558), for noise of variance 1.
    """
    square = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    constants = [2.0 * a.shape[1] * scale for scale in SCALES]
    return torch.stack([constant / (constant + square) for constant in constants]).sum(dim=0)


def mmd(z: Tensor, noise: Tensor) -> Tensor:
    """Maximum mean discrepancy squared of two samples (B, k), (M, k) by ``kernel``, unbiased, may be negative.

    Raises InputError for fewer than two points of either.
    """
    b, m = len(z), len(noise)
    if min(b, m) < 2:
        raise InputError(f"the discrepancy is estimated from pairs; {b} and {m} points are too few")

    own, other, diagonal = kernel(z, z), kernel(noise, noise), float(len(SCALES))
    within = (own.sum() - b * diagonal) / (b * (b - 1)) + (other.sum() - m * diagonal) / (m * (m - 1))
    return within - 2 * kernel(z, noise).mean()


class Discrepancy(Penalty):
    """Maximum mean discrepancy of latents and noise: WAE-MMD."""

    def __init__(self, weight: float = 10.0) -> None:
        super().__init__(weight)

    def forward(self, code: Code, z: Tensor, noise: Tensor, index: Tensor, cost: Tensor, numbers: int) -> Tensor:
        return self.weight * mmd(z, noise)


class Adversary(Penalty):
    """A network that learns to tell latents from noise, and an encoder that deceives it: adversarial autoencoder."""

    def __init__(self, latent: int, weight: float = 0.1, width: int = 128, rate: float = 1e-3, seed: int = 0) -> None:
        super().__init__(weight)
        self.rate, self.seed = rate, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(*dense([latent, width, width, 1]))
        self.optimiser: torch.optim.Optimizer = torch.optim.Adam(self.net.parameters(), rate, betas=(0.5, 0.999))

    def learn(self, z: Tensor, noise: Tensor) -> None:
        says_latent, says_noise = self.net(z.detach()), self.net(noise)
        loss = functional.softplus(says_latent).mean() + functional.softplus(-says_noise).mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    def forward(self, code: Code, z: Tensor, noise: Tensor, index: Tensor, cost: Tensor, numbers: int) -> Tensor:
        return self.weight * functional.softplus(-self.net(z)).mean()


class Transport(Penalty):
    """½W2² between noise and the latents of all data: semi-discrete transport inside the training of an autoencoder.

    Every few epochs the transport from noise to the latents is solved, from the heights of the time before. Until then
    datum i is drawn to the centre x_i of the cell of noise that is its own: the gradient of ½W2² with respect to its
    latent is nu_i (y_i - x_i), by the envelope theorem, math (33). No adversary, and no bias of small batches.
    """

    def __init__(self, weight: float = 0.1, every: int = 2, until_chi2: float = 0.3, seed: int = 0) -> None:
        super().__init__(weight)
        if every < 1:
            raise InputError(f"every is a number of epochs, at least 1, not {every}")
        self.every, self.until_chi2, self.seed = every, until_chi2, seed
        self.centre = torch.empty(0, 0)  # (N, k) of the cells; NaN where no sample of noise came
        self.heights = torch.empty(0, dtype=torch.float64)  # (N,)
        self.solution: Solution | None = None  # the newest of this session

    def begin(self, epoch: int, latents: Callable[[], Tensor]) -> None:
        if epoch % self.every and len(self.centre):
            return
        z = latents().double().numpy()
        init = self.heights.numpy() if len(self.heights) == len(z) else None
        self.solution = solve(z, until_chi2=self.until_chi2, seed=self.seed, init=init, progress=False)
        self.centre = torch.from_numpy(self.solution.cells().centre).float()
        self.heights = torch.from_numpy(self.solution.heights)

    def get_extra_state(self) -> Tensor:
        return torch.cat([self.centre.double(), self.heights[:, None]], dim=1)

    def set_extra_state(self, state: Tensor) -> None:
        self.centre, self.heights = state[:, :-1].float(), state[:, -1].contiguous()

    def forward(self, code: Code, z: Tensor, noise: Tensor, index: Tensor, cost: Tensor, numbers: int) -> Tensor:
        centre = self.centre[index.cpu()].to(z.device)
        known = torch.isfinite(centre).all(dim=1, keepdim=True)
        away = torch.where(known, z - torch.where(known, centre, 0.0), 0.0)
        return self.weight * 0.5 * away.square().sum(dim=1).mean()


PENALTIES: dict[str, Callable[[int], Penalty]] = {
    "none": lambda k: Penalty(),
    "vae": lambda k: Divergence(),
    "mmd": lambda k: Discrepancy(),
    "aae": lambda k: Adversary(k),
    "transport": lambda k: Transport(),
}
