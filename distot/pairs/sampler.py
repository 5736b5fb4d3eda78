"""The coupling in the place of torchcfm's ``OTPlanSampler``: the same calls, without a plan for each batch.

Legend: B samples, N latents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from distot.api import load
from distot.errors import InputError
from distot.pairs.coupling import Shelf
from distot.solution import Solution
from distot.store import Place


class PlanSampler:
    """Gives every noise vector its latent T(x0), by the coupling of the whole data set instead of that of a batch.

        sampler = distot.PlanSampler("run.zarr")  # OTPlanSampler(method="exact")
        x0, x1 = sampler.sample_plan(x0, x1)

    x1 and replace are taken for the sake of the call: a latent of the data set takes the place of x1. x0 must have the
    law of the source that was solved for. labels: (N,) of the latents, for ``sample_plan_with_labels``.

    Raises InputError for labels of another shape, StoreError as ``load`` does.
    """

    def __init__(self, solution: Solution | str | Place, labels: ArrayLike | Tensor | None = None) -> None:
        self.solution = solution if isinstance(solution, Solution) else load(solution)
        self.shelf = Shelf(self.solution.held.latents)
        self.labels = None if labels is None else torch.as_tensor(np.asarray(labels))
        count = self.solution.facts.shape[0]
        if self.labels is not None and self.labels.shape != (count,):
            raise InputError(f"labels must have shape ({count},), one for each latent, not {tuple(self.labels.shape)}")

    def sample_plan(self, x0: Tensor, x1: Any = None, replace: bool = True) -> tuple[Tensor, Tensor]:
        """(x0, T(x0)), shaped (B, ...) as x0 and on its device.

        Raises InputError for samples of another dimension than the latents, or NaN.
        """
        x0, latent, _ = self._sampled(x0)
        return x0, latent

    def sample_plan_with_labels(
        self, x0: Tensor, x1: Any = None, y0: Tensor | None = None, y1: Any = None, replace: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(x0, T(x0), y0, labels of T(x0)); the last one is None if the sampler has no labels."""
        x0, latent, index = self._sampled(x0)
        return x0, latent, y0, None if self.labels is None else self.labels[index].to(x0.device)

    def _sampled(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = self.solution.assign(x0.flatten(1) if x0.ndim > 2 else x0)
        return x0, self.shelf.take(index).to(x0).reshape(x0.shape), torch.from_numpy(index)
