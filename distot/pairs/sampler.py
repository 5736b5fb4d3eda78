"""The coupling in the place of torchcfm's ``OTPlanSampler``: the same calls, without a plan for each batch.

Legend: B samples, N latents, C classes.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from distot.api import load
from distot.classes import Classes
from distot.errors import DistotWarning, InputError
from distot.given import array
from distot.pairs.coupling import Shelf
from distot.solution import Solution
from distot.store import Place

TEXT = "np.unique(labels, return_inverse=True)[1] has numbers for text"


class PlanSampler:
    """Gives every noise vector its latent T(x0), by the coupling of the whole data set instead of that of a batch.

        sampler = distot.PlanSampler("run.zarr")  # OTPlanSampler(method="exact")
        x0, x1 = sampler.sample_plan(x0, x1)

    x1 and replace are taken for the sake of the call: a latent of the data set takes the place of x1. x0 must have the
    law of the source that was solved for.

    For a model that is told labels give the ``Classes`` that ``solve_classes`` or ``load_classes`` gave:
    ``sample_plan_with_labels`` then takes x0 to the latents of the label y1 that goes with it, and noise tells nothing
    of the label. With one map for all, ``labels`` (N,) of the latents, numbers, come out for those that were drawn; a
    model that is told these learns them from noise, which does not know them when the model is used.

    source: of a run that draws from your callable. Can be pickled, with the heights alone.

    Raises InputError for labels that are no N numbers, StoreError as ``load`` does.
    """

    def __init__(
        self,
        solution: Solution | Classes | str | Place,
        labels: ArrayLike | Tensor | None = None,
        *,
        source: object = None,
    ) -> None:
        found = solution if isinstance(solution, Solution | Classes) else load(solution, source=source)
        self.solution = found
        self.maps = dict(found) if isinstance(found, Classes) else {None: found}
        if labels is not None and isinstance(found, Classes):
            raise InputError("these classes know the labels of their latents; leave labels out")
        self.labels = None if labels is None else _numbers(labels, self.maps[None].facts.shape[0])
        if self.labels is not None:
            warnings.warn(
                "one map for all latents pairs noise with labels: a model that is told the label will have learnt it "
                "from noise, which tells nothing of it when you generate; give PlanSampler the classes that "
                "distot.solve_classes gives, and y1",
                DistotWarning,
                stacklevel=2,
            )

    @cached_property
    def shelves(self) -> dict[Any, Shelf]:
        return {label: Shelf(its.held.latents) for label, its in self.maps.items()}

    def sample_plan(self, x0: Tensor, x1: Any = None, replace: bool = True) -> tuple[Tensor, Tensor]:
        """(x0, T(x0)), shaped (B, ...) as x0 and on its device.

        Raises InputError for samples of another dimension than the latents, or NaN; and where there are classes, whose
        labels are wanted.
        """
        if isinstance(self.solution, Classes):
            raise InputError("each class has a map of its own: call sample_plan_with_labels(x0, x1, y1=labels)")
        return x0, self._taken(None, x0)[0]

    def sample_plan_with_labels(
        self, x0: Tensor, x1: Any = None, y0: Tensor | None = None, y1: Any = None, replace: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None, Any]:
        """(x0, T(x0), y0, labels of T(x0)).

        Of classes: y1 (B,) are the labels of x0, as the classes have them, and come back as they are; of text also the
        place among the labels, as ``ClassPairs`` has it. Else the labels are those of the latents, None if the sampler
        has none, and y1 is not looked at.
        Raises InputError for labels that no class has.
        """
        if not isinstance(self.solution, Classes):
            latent, index = self._taken(None, x0)
            return x0, latent, y0, None if self.labels is None else self.labels[index].to(x0.device)
        own = self._classes(y1, len(x0))
        latent = torch.empty_like(x0)
        for label, places in own.items():
            latent[places] = self._taken(label, x0[places])[0]
        return x0, latent, y0, y1

    def _taken(self, label: Any, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Latents shaped as x0, and their numbers, by the map of a label."""
        index = self.maps[label].assign(x0.flatten(1) if x0.ndim > 2 else x0)
        return self.shelves[label].take(index).to(x0).reshape(x0.shape), torch.from_numpy(index)

    def _classes(self, y1: Any, count: int) -> dict[Any, Tensor]:
        """Where the samples of each class are."""
        if y1 is None:
            raise InputError("give y1, a label for each sample: it says by which class's map that goes")
        given, labels = array(y1, "y1"), list(self.maps)
        if given.shape != (count,):
            raise InputError(f"y1 must have shape ({count},), a label for each sample, not {given.shape}")
        by_place = given.dtype.kind in "iu" and any(isinstance(label, str) for label in labels)
        names = range(len(labels)) if by_place else labels
        wanted = {label: np.flatnonzero(given == name) for label, name in zip(labels, names, strict=True)}
        if sum(map(len, wanted.values())) != count:
            known = np.isin(np.arange(count), np.concatenate(list(wanted.values())))
            few = ", ".join(map(repr, names[:10]))
            raise InputError(f"no class has the label {given[~known].tolist()[0]!r} of y1; there are {few}")
        return {label: torch.from_numpy(places) for label, places in wanted.items() if len(places)}

    def __getstate__(self) -> dict[str, Any]:
        its = self.solution
        few: Any = {label: found.slim() for label, found in self.maps.items()}
        whole = Classes(few, its.rows, its.share) if isinstance(its, Classes) else few[None]
        state = self.__dict__ | {"maps": few, "solution": whole}
        return {name: value for name, value in state.items() if name != "shelves"}


def _numbers(labels: object, count: int) -> Tensor:
    """Labels of latents as a tensor (N,). Raises InputError for others."""
    given = array(labels, "labels")
    if given.dtype.kind not in "biuf":
        raise InputError(f"labels must be numbers of shape ({count},), one for each latent, not {given.dtype}; {TEXT}")
    if given.shape != (count,):
        raise InputError(f"labels must have shape ({count},), one for each latent, not {given.shape}")
    if wrong := int((~np.isfinite(given)).sum()):
        raise InputError(f"{wrong:,} labels are NaN or infinite; give latents without a label one of their own")
    return torch.from_numpy(np.require(given, given.dtype.newbyteorder("="), ["C", "W"]))
