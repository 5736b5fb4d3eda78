"""What a run is to do: its options, the batch, and when to check and stop.

Legend: n atoms, M samples so far. Knobs have units and defaults here and nowhere else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from distot.certify import LEVEL, Estimate
from distot.errors import InputError

BATCH_SHARE, BATCH_LEAST = 5, 32  # a step draws n / 5 samples, at least 32


@dataclass(frozen=True)
class Options:
    """What the user may choose. Raises InputError on construction for values that make no sense."""

    until_chi2: float | None = 0.05  # stop when chi2 is below this with 95 % confidence; None: run to the budget
    max_samples: int | None = None  # search work for the heights, in plain samples; the certificate comes on top
    max_seconds: float | None = None  # of this process, the certificate included
    seed: int = 0
    device: str = "auto"
    assigner: str = "auto"
    checkpoint_seconds: float = 60.0  # interval between checkpoints of a run folder
    certificate_samples: int | None = None  # None: see certify.default_samples

    def __post_init__(self) -> None:
        positive = {k: getattr(self, k) for k in ("until_chi2", "max_samples", "max_seconds", "certificate_samples")}
        for name, value in positive.items():
            if value is not None and not (np.isfinite(value) and value > 0):
                raise InputError(f"{name} must be positive, or None for no limit; it is {value}")
        if not (np.isfinite(self.checkpoint_seconds) and self.checkpoint_seconds >= 0):
            raise InputError(f"checkpoint_seconds must be 0 or more, it is {self.checkpoint_seconds}")
        if self.certificate_samples == 1:
            raise InputError("certificate_samples must be at least 2: chi2 is estimated from pairs")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be between 0 and 2^63 - 1, it is {self.seed}")
        if self.until_chi2 is None and self.max_samples is None and self.max_seconds is None:
            raise InputError("nothing would ever stop this run: give until_chi2, max_samples or max_seconds")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def batch(n: int) -> int:
    """Samples in a step."""
    return max(BATCH_LEAST, n // BATCH_SHARE)


@dataclass(frozen=True)
class Check:
    """One look at chi2 of the average: at how many samples, what came out, and the limit used to stop."""

    samples: int  # all search work, this look included
    looked: int  # fresh samples of this look
    step: int
    chi2: float
    error: float
    upper: float  # the stop rule's own limit, which pays for having looked before

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StopRule:
    """Looks at chi2 on fresh samples now and then, and closely when the goal is near.

    The k-th look spends 0.05 · 6 / (pi k)² of the error, so all looks together call a run finished wrongly with
    probability at most 5 %. A close look is as large as balances its cost against the samples that its error bar
    makes the solver overshoot; far from the goal a look costs 1 % of the samples so far.
    """

    n: int
    goal: float | None

    def first(self, samples: int) -> int:
        """Samples at which to look first."""
        return samples + 5 * self.n

    @property
    def close_look(self) -> int:
        """Samples for an error of goal / r, r = 1.4 n^¼ between 4 and 64."""
        if self.goal is None:
            return 0
        ratio = min(64.0, max(4.0, 1.4 * self.n**0.25))
        return max(64, int(np.ceil(ratio * np.sqrt(2 * self.n) / self.goal)))

    def size(self, samples: int, history: tuple[Check, ...]) -> int:
        """Samples of the look that is due."""
        glance = max(64, samples // 100, int(4 * np.sqrt(2 * self.n)))
        near = self.goal is not None and bool(history) and self.wanted(history) <= samples
        return max(glance, self.close_look) if near else glance

    def limit(self, found: Estimate, history: tuple[Check, ...]) -> float:
        """Upper limit of chi2 for the look that follows ``history``."""
        spent = (1 - LEVEL) * 6 / (np.pi * (len(history) + 1)) ** 2
        return found.value + NormalDist().inv_cdf(1 - spent) * found.error

    def next(self, history: tuple[Check, ...]) -> int:
        """Samples at which to look again: after doubling, or when the goal should be met, not before 3 % more."""
        last = history[-1]
        return int(max(1.03 * last.samples, min(2.0 * last.samples, self.wanted(history))))

    def wanted(self, history: tuple[Check, ...]) -> float:
        """Samples at which a close look should find the goal met, as chi2 falls like 1 / M."""
        if self.goal is None:
            return float("inf")
        if not history:
            return 2.0 * self.n / self.goal
        last = history[-1]
        error = np.sqrt(2 * self.n) / self.close_look
        z = NormalDist().inv_cdf(1 - (1 - LEVEL) * 6 / (np.pi * (len(history) + 1)) ** 2)
        room = self.goal - z * error
        hopeful = max(last.chi2 - last.error, (self.n - 1) / last.samples) if last.error > 0.2 * self.goal else last.chi2
        return last.samples * hopeful / room if room > 0 else 2.0 * last.samples
