"""How good generated data are, beside data that training has not seen; no downloaded weights, no images of others.

Distances and neighbours are those of features: of vectors the numbers themselves, of images the last hidden layer of a
small classifier that is trained on the spot. Legend: N real data, M generated ones, d features, B data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import sqrtm
from scipy.spatial import KDTree
from torch import Tensor, nn
from torch.nn import functional

from distot.api import solve
from distot.errors import InputError
from distot.models.autoencoder import Spec, encoder
from distot.models.datasets import REACH, Data, floats
from distot.models.kantorovich import Estimate

FEATURES = 32
LEAST = 200  # steps of training of a classifier
DROPPED, SMOOTHING = 0.3, 0.1  # features left out in training, and of labels: they keep features comparable
ROWS = 2048


@dataclass(frozen=True)
class Scores:
    """Of generated data.

    covered: share of the classes or modes that have at least half of what is due to them; worst: largest relative error
    of the share of one; between: share of samples that belong to none, of a toy. frechet: squared distance of Fréchet
    between Gaussians of the features. precision, recall (Kynkäänniemi et al., arXiv 1904.06991), density, coverage
    (Naeem et al., arXiv 2002.09797). sliced: sliced W2; w2_squared: W2² of the features, a lower bound.
    """

    covered: float
    worst: float
    between: float
    frechet: float
    precision: float
    recall: float
    density: float
    coverage: float
    sliced: Estimate
    w2_squared: Estimate


class Judge:
    """Scores generated data against ``data.fresh``. What it learns or measures of these is a function of ``seed``.

    count: real data to compare with, at most.
    """

    def __init__(self, data: Data, seed: int = 0, count: int = 5000) -> None:
        self.data, self.seed = data, seed
        order = torch.randperm(len(data.fresh), generator=torch.Generator().manual_seed(seed))[:count]
        self.classifier = None if data.core else Classifier(data, seed)
        self.real = self.features(data.fresh[order])

    def features(self, x: Tensor) -> Tensor:
        """(B, d) float64 of data (B, ...)."""
        if self.classifier is not None:
            return self.classifier.features(x).double()
        return x.flatten(1).double()

    def labels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The class or mode of each datum (B,), and whether it belongs to it at all (B,)."""
        core = self.data.core
        if core is None:
            assert self.classifier is not None
            return self.classifier(x).argmax(dim=1), torch.ones(len(x), dtype=torch.bool)
        away, nearest = KDTree(core.points).query(x.double().numpy())
        return torch.from_numpy(core.mode[nearest]), torch.from_numpy(away <= REACH)

    def __call__(self, x: Tensor) -> Scores:
        """Scores of generated data (M, ...). Raises InputError for another shape, NaN, or fewer than 100."""
        if tuple(x.shape[1:]) != self.data.shape or len(x) < 100:
            raise InputError(f"at least 100 data of shape {self.data.shape} are judged, not {tuple(x.shape)}")
        if not bool(torch.isfinite(floats(x)).all()):
            raise InputError("generated data contain NaN or Inf")
        label, inside = self.labels(x)
        wanted = self.data.shares
        share = torch.bincount(label[inside], minlength=len(wanted)) / len(x)
        ratio = share / wanted.clamp_min(1e-12)
        every = self.features(x)
        fake = every[: len(self.real)]  # as many as real ones, for counts of neighbours depend on it
        precision, recall = precision_recall(self.real, fake)
        density, coverage = density_coverage(self.real, fake)
        return Scores(
            covered=float((ratio >= 0.5).double().mean()),
            worst=float((ratio - 1).abs().max()),
            between=1 - float(inside.double().mean()),
            frechet=frechet(self.real, every),
            precision=precision,
            recall=recall,
            density=density,
            coverage=coverage,
            sliced=sliced_w2(self.real, every, self.seed),
            w2_squared=w2_squared(self.real, every, self.seed),
        )


class Classifier(nn.Module):
    """A small network that tells the classes of a data set apart; its last hidden layer gives features."""

    def __init__(self, data: Data, seed: int = 0, epochs: int = 4) -> None:
        super().__init__()
        images = len(data.shape) == 3
        spec = Spec(data.shape, FEATURES, "convolutional" if images else "dense", width=32 if images else 256)
        counts = torch.bincount(data.labels, minlength=data.classes)
        if int(counts.min()) == 0:
            empty = (counts == 0).nonzero()[:, 0].tolist()
            raise InputError(f"classes {empty} of {data.name} have no members; number the labels from 0 without gaps")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(encoder(spec, FEATURES), nn.SiLU())
            self.head = nn.Linear(FEATURES, data.classes)
        random, batch = torch.Generator().manual_seed(seed), 256
        steps = max(LEAST, epochs * len(data.values) // batch)
        adam = torch.optim.AdamW(self.parameters(), 2e-3, weight_decay=1e-2)
        for step in range(steps):
            adam.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
            index = torch.randint(len(data.values), (batch,), generator=random)
            seen = torch.rand(batch, FEATURES, generator=random) >= DROPPED
            feature = self.body(floats(data.values[index])) * seen / (1 - DROPPED)
            loss = functional.cross_entropy(self.head(feature), data.labels[index], label_smoothing=SMOOTHING)
            adam.zero_grad()
            loss.backward()
            adam.step()
        self.eval()
        self.accuracy = float((self(data.fresh).argmax(dim=1) == data.fresh_labels).double().mean())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes (B, classes)."""
        return torch.cat([self.head(self.body(floats(part))) for part in x.split(ROWS)])

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(B, FEATURES)."""
        return torch.cat([self.body(floats(part)) for part in x.split(ROWS)])


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians with the moments of two samples (N, d), (M, d)."""
    first, second = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    root = sqrtm(first)
    root = np.real(root)
    middle = np.linalg.eigvalsh(root @ second @ root)
    both = np.trace(first) + np.trace(second) - 2 * np.sqrt(np.maximum(middle, 0)).sum()
    return float((a.mean(dim=0) - b.mean(dim=0)).square().sum()) + float(both)


def _each(a: Tensor, b: Tensor, of: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """``of`` the distances of each part of a (N, d) from all of b."""
    spans = [slice(first, first + ROWS) for first in range(0, len(a), ROWS)]
    return torch.cat([of(torch.cdist(a[span], b), span) for span in spans])


def _radii(a: Tensor, k: int) -> Tensor:
    """Distance of each point (N, d) from its k-th neighbour (N,)."""
    if len(a) <= k:
        raise InputError(f"{len(a)} data are too few for their {k} nearest neighbours")
    return _each(a, a, lambda away, _: away.kthvalue(k + 1, dim=1).values)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fakes (M, d) in a ball of real data (N, d) to the k-th neighbour, and of real data in one of fakes."""

    def share(of: Tensor, among: Tensor) -> float:
        radii = _radii(among, k)
        return float(_each(of, among, lambda away, _: (away <= radii).any(dim=1)).double().mean())

    return share(fake, real), share(real, fake)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Balls of real data to the k-th neighbour that a fake lies in, over k; share of the balls that hold a fake."""
    radii = _radii(real, k)
    hits = _each(real, fake, lambda away, span: (away <= radii[span, None]).sum(dim=1))
    return float(hits.double().sum() / (k * len(fake))), float((hits > 0).double().mean())


def sliced_w2(a: Tensor, b: Tensor, seed: int = 0, directions: int = 256) -> Estimate:
    """Root of the mean of W2² of projections on random directions of two samples (N, d), (M, d).

    The error is that of so many directions. Two samples of the same law have a distance, too, some N^-½.
    """
    random, n = torch.Generator().manual_seed(seed), min(len(a), len(b))
    way = functional.normalize(torch.randn(a.shape[1], directions, generator=random, dtype=torch.float64), dim=0)
    level = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    first, second = (torch.quantile(x.double() @ way, level, dim=0) for x in (a, b))
    square = (first - second).square().mean(dim=0)
    value = math.sqrt(float(square.mean()))
    return Estimate(value, float(square.std()) / directions**0.5 / max(2 * value, 1e-12))


def w2_squared(real: Tensor, fake: Tensor, seed: int = 0, until_chi2: float = 0.1) -> Estimate:
    """W2² from the generated data (M, d) to the real ones (N, d), by distot: a lower bound, and its error.

    Two samples of the same law have a distance, too, which falls but slowly with their number where d is large.
    """
    found = solve(
        real.numpy(), fake.numpy(), until_chi2=until_chi2, max_samples=50 * len(real), seed=seed, progress=False
    ).certificate
    return Estimate(found.w2_squared_bound, found.w2_squared_bound_error)
