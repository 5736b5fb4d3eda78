"""What a run is to do: its options, the batch, and when to check and stop.

Legend: n atoms, M samples so far. Knobs have units and defaults here and nowhere else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from distot import assign
from distot.errors import InputError
from distot.masses import LEVEL, Estimate, upper
from distot.power import cost_of
from distot.store import LOST, Run, restored

MOST_WARM = 100  # samples per atom that a warm start is taken to be worth at most
MOST = 2**63  # what counts stay below
COUNTS = ("max_samples", "certificate_samples", "seed", "top_k")
POSITIVE = ("until_chi2", "max_samples", "max_seconds", "certificate_samples", "epsilon", "memory")
BATCH_SHARE, BATCH_LEAST = 5, 32  # the first steps draw n / (5 work^½) samples of this work each, at least 32
BATCH_GROWTH = 8  # a step t first batches into the run draws max(1, t^½ / 8) first batches


@dataclass(frozen=True)
class Options:
    """What the user may choose. Raises InputError on construction for values that make no sense."""

    until_chi2: float | None = 0.05  # stop when chi2 is below this with 95 % confidence; None: run to the budget
    max_samples: int | None = None  # search work for the heights, in plain samples; the certificate comes on top
    max_seconds: float | None = None  # of this process, the certificate included
    seed: int = 0
    device: str = "auto"
    assigner: str = "auto"
    recall: float | None = None  # share of winners that the search may be content with until late; None: exact
    checkpoint_seconds: float = 60.0  # interval between checkpoints of a run folder
    certificate_samples: int | None = None  # None: see certify.default_samples
    epsilon: float | None = None  # temperature of the entropic problem, in units of the cost ½|x - y|²; None: plain OT
    top_k: int = 32  # winners of a sample that share it at that temperature
    memory: float | None = None  # GiB that latents may take in each process; None: a share of what is available
    exact: bool = False  # finish by Newton's method on exact masses, in the plane
    cost: str = "quadratic"  # ½|x - y|², or "log": -log<x, y> on the unit sphere

    def __post_init__(self) -> None:
        if not 0 <= self.seed < MOST:
            raise InputError(f"seed must be between 0 and 2^63 - 1, it is {self.seed}")
        for name in COUNTS:
            object.__setattr__(self, name, count(name, getattr(self, name)))
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not _real(value) > 0:
                raise InputError(f"{name} must be positive, or None; it is {value!r}")
        if not _real(self.checkpoint_seconds) >= 0:
            raise InputError(f"checkpoint_seconds must be 0 or more, it is {self.checkpoint_seconds!r}")
        assign.check(self.assigner, self.recall)
        if cost_of(self.cost).spherical:
            self._check_spherical()
        if self.top_k < 2:
            raise InputError(f"top_k must be at least 2, it is {self.top_k}")
        if self.exact and self.epsilon is not None:
            raise InputError(
                f"exact masses are those of the plain problem; leave epsilon={self.epsilon:g} or exact away"
            )
        if self.certificate_samples == 1:
            raise InputError("certificate_samples must be at least 2: chi2 is estimated from pairs")
        if self.until_chi2 is None and self.max_samples is None and self.max_seconds is None:
            raise InputError("nothing would ever stop this run: give until_chi2, max_samples or max_seconds")

    def _check_spherical(self) -> None:
        if self.exact:
            raise InputError("exact masses are computed for the cost 'quadratic' alone; leave exact out")
        if self.epsilon is not None:
            raise InputError(
                "the entropic problem (epsilon) is solved for the cost 'quadratic' alone; leave epsilon out"
            )
        if self.assigner == "lists" or self.recall is not None:
            raise InputError(
                "assigner 'lists' and a recall are for the cost 'quadratic' alone; at the cost 'log' leave recall out, "
                "and take auto, native, dense, faiss or triton"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def options_of(run: Run) -> Options:
    """The options of a run. Raises StoreError if they are damaged, or of another version."""
    return restored(Options, run.config["options"], f"{run.path / 'config.json'}", LOST)


def count(name: str, value: Any) -> int | None:
    """A whole number below MOST, or None. Raises InputError for anything else."""
    if value is None:
        return None
    if not (_real(value) == _real(value) // 1 and abs(value) < MOST):
        raise InputError(f"{name} must be a whole number below 2^63, it is {value!r}")
    return int(value)


def _real(value: Any) -> float:
    """A number as it is, NaN for anything else."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return value if real and abs(value) < float("inf") else float("nan")


def first_batch(n: int, work: float) -> int:
    """Samples in the first steps, each of which costs ``work`` plain samples: cheap ones come in larger batches."""
    return max(BATCH_LEAST, int(n / BATCH_SHARE * work**-0.5))


def batch(n: int, work: float, time: float) -> int:
    """Samples in a step that begins ``time`` first batches into the run: more as the steps get shorter."""
    return int(first_batch(n, work) * max(1.0, time**0.5 / BATCH_GROWTH))


def moment(n: int, work: float, chi2: float) -> float:
    """The time, in first batches, at which a run from scratch would have this chi2: where a warm start goes on."""
    return min(n / chi2, MOST_WARM * n) / first_batch(n, work)


@dataclass(frozen=True)
class Check:
    """One look at chi2 of the average: at how many samples, what came out, and the limit used to stop."""

    samples: int  # all search work in plain samples, this look included
    looked: int  # work of this look
    step: int
    chi2: float
    error: float
    close: bool  # only a close look can end a run
    upper: float  # the stop rule's own limit; after k close looks it pays for all of them

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StopRule:
    """Looks at chi2 on fresh samples now and then, and closely when the goal should be met.

    Only close looks can end a run. The k-th spends 0.05 / 2^k of the error, so all together call a run finished
    wrongly with probability at most 5 %. A close look is as large as balances its cost against the samples that its
    error bar makes the solver overshoot; a glance aims at an error of a fifth of chi2 for at most 1/60 of the samples.
    """

    n: int
    goal: float | None
    work: float = 1.0  # of a sample, in plain samples

    def first(self, samples: int) -> int:
        """Work at which to look first."""
        return samples + max(1, round(5 * self.n * self.work))

    def close(self, samples: int, history: tuple[Check, ...]) -> bool:
        """Whether the look that is due is a close one."""
        return bool(history) and self.wanted(history) <= samples

    def size(self, samples: int, history: tuple[Check, ...]) -> int:
        """Samples of the look that is due."""
        glance = max(64, min(int(samples / (60 * self.work)), self._look(0.2 * self._limit(samples), history)))
        return max(glance, self._look(self._error(history), history)) if self.close(samples, history) else glance

    def judge(self, found: Estimate, samples: int, looked: int, step: int, history: tuple[Check, ...]) -> Check:
        """The look that was due after work of ``samples`` and cost ``looked`` more, with its limit."""
        limit = upper(found, 1 - self._spent(history))
        return Check(samples + looked, looked, step, found.value, found.error, self.close(samples, history), limit)

    def done(self, history: tuple[Check, ...]) -> bool:
        """Whether the last look ends the run."""
        return self.goal is not None and bool(history) and history[-1].close and history[-1].upper <= self.goal

    def next(self, history: tuple[Check, ...]) -> int:
        """Work at which to look again: when the goal should be met if that is near, else at 1.7 times as many.

        After a close look that failed, no sooner than when the steps have cost half of what the next one will.
        """
        last, wanted = history[-1].samples, self.wanted(history)
        failed = self.goal is not None and history[-1].close
        soon = 0.5 * self.work * self._look(self._error(history), history) if failed else 0.03 * last
        return int(max(last + soon, wanted if wanted < 1.8 * last else 1.7 * last))

    def wanted(self, history: tuple[Check, ...]) -> float:
        """Work at which a close look should find the goal met; infinity without a goal.

        chi2 falls like 1 / M in the end, a little faster while the average still forgets where it began.
        """
        if self.goal is None:
            return float("inf")
        if not history:
            return 2.0 * self.work * self.n / self.goal
        last = history[-1]
        spent = last.samples - sum(check.looked for check in history)  # looks do not make chi2 smaller
        reach = NormalDist().inv_cdf(1 - self._spent(history)) * self._error(history)
        left = self.goal - reach  # the upper limit is at the goal where v + reach + reach² / (2 v) = goal
        room = 0.5 * (left + np.sqrt(left**2 - 2 * reach**2))
        usual = 1.5 * self._limit(spent)  # give or take 40 %: the weight of a rough glance
        trust = 1 / (1 + (last.error / (0.4 * usual)) ** 2)
        expected = max(trust * last.chi2 + (1 - trust) * usual, self._limit(spent))
        return last.samples + spent * float((expected / (room - self._error(history))) ** 0.9 - 1)

    def _spent(self, history: tuple[Check, ...]) -> float:
        """Probability of a wrong end that the look after ``history`` may add."""
        k = 1 + sum(check.close for check in history)
        return max((1 - LEVEL) * 0.5**k, 1e-12)

    def _limit(self, samples: int) -> float:
        """About the least chi2 to hope for after so much work, math (11)."""
        return 1.2 * self.work * self.n / max(samples, 1)

    def _look(self, error: float, history: tuple[Check, ...]) -> int:
        """Samples whose chi2 has this standard error: sqrt(2 n) / error for independent points at the solution.

        Elsewhere, or for orbits, more by the factor which the last close look found.
        """
        more = 1.2
        if close := [check for check in history if check.close]:
            more = min(max(close[-1].error * close[-1].looked / self.work / np.sqrt(2 * self.n), 1.0), 8.0)
        return int(np.ceil(more * np.sqrt(2 * self.n) / error))

    def _error(self, history: tuple[Check, ...]) -> float:
        """Standard error that a close look after ``history`` should have: less as its limit has to reach further.

        At first goal / r with r = 1.2 n^¼, optimal for e ~ 0.9 / work; r >= 8 leaves room below the goal.
        """
        assert self.goal is not None
        reach = NormalDist().inv_cdf(1 - self._spent(())) / NormalDist().inv_cdf(1 - self._spent(history))
        return float(self.goal / min(64.0, max(8.0, 1.2 * self.n**0.25)) * reach)
