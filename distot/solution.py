"""What a solve gives: heights, how good they are, why it stopped, and the map that they define."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distot.assign import Assigner
from distot.atoms import Rows
from distot.cells import Cells, Sums, by_latent, measure
from distot.certify import Certificate, certify, default_samples
from distot.entropic import potential
from distot.errors import InputError
from distot.exact import ExactCells, exact_cells
from distot.generate import Generated, Generator, Mixing
from distot.given import numbers
from distot.grid import Axis
from distot.identity import heights_of, map_of, masses_of
from distot.power import Array, heights_to_weights
from distot.problem import Problem
from distot.schedule import Check, Options, count
from distot.solver import Progress, entropic_part
from distot.source import BLOCK
from distot.store import Latents, Place, Run, as_place, check_out, restored

REASONS = {
    "until_chi2": "the goal was reached: chi2 is below {until_chi2} with 95 % confidence",
    "max_samples": "the budget of {max_samples:,} samples is spent",
    "max_seconds": "the time of {max_seconds:g} s is up",
    "interrupted": "it was interrupted",
    "exact": "all masses are exact, to nine digits or as many as the heights have",
    "sampled": "sampling has ended, and Newton's method has not made the masses exact",
    None: "it is not finished",
}


@dataclass(frozen=True)
class Facts:
    """What is known of a solution without its heights."""

    options: Options
    shape: tuple[int, int]  # (N, d)
    samples: int
    history: tuple[Check, ...]
    reason: str | None
    notes: tuple[str, ...]
    run: Run | None


@dataclass(frozen=True)
class Held:
    """The rest of a solution: what is in memory."""

    problem: Problem
    assigner: Assigner
    progress: Progress
    latents: Rows
    mass: NDArray[Any] | None
    whole: bool = True  # progress is all that a run needs to go on, and not the heights alone


class Hold(Protocol):
    """Gives what a solution holds, when it is asked for; can be pickled."""

    def __call__(self) -> Held: ...

    def slim(self) -> Hold:
        """The same, of which a pickle has of all progress the heights alone."""
        ...


class Solution:
    """Heights of the semi-discrete OT problem between a source and N latents, with all that belongs to them.

    A pickle has the heights, and of latents in a store the absolute path; latents in memory are in it, unless the run
    folder has them. They are read and compared with their fingerprint when they are needed.
    """

    def __init__(self, facts: Facts, certificate: Certificate | None, hold: Hold) -> None:
        self.facts, self._certificate, self.hold = facts, certificate, hold
        self._sums: Sums | None = None
        self.scratch: object = None  # temporary files that must live as long as this does

    @cached_property
    def held(self) -> Held:
        """Latents and heights; a solution found by other processes reads them on first use."""
        return self.hold()

    def slim(self) -> Solution:
        """The same solution, whose pickle leaves out what only ``save`` needs: of N numbers it has one."""
        found = Solution(self.facts, self._certificate, self.hold.slim())
        found.scratch = self.scratch
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("held", "scratch")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"scratch": None})

    @property
    def problem(self) -> Problem:
        return self.held.problem

    @property
    def options(self) -> Options:
        return self.facts.options

    @property
    def run(self) -> Run | None:
        return self.facts.run

    @property
    def notes(self) -> tuple[str, ...]:
        return self.facts.notes

    def __repr__(self) -> str:
        return (
            f"Solution(N={self.facts.shape[0]}, d={self.facts.shape[1]}, samples={self.samples}, "
            f"reason={self.reason!r})"
        )

    @property
    def heights(self) -> Array:
        """h (N,) float64 in user units with sum_i nu_i h_i = 0; -inf for zero mass; equal latents share one."""
        target = self.problem.target
        average = self.held.progress.state.average.cpu().numpy()
        return target.spread(self.problem.frame.heights_out(average, target.tilt, target.mass))

    @property
    def weights(self) -> Array:
        """Laguerre weights w (N,) of ``heights``, math (6): the potential g of POT and OTT, math (7).

        Raises InputError at the cost "log", which has none.
        """
        self.quadratic_only("weights")
        return heights_to_weights(self.heights, self._latents(np.arange(self.facts.shape[0])))

    @property
    def kept(self) -> Certificate | None:
        """The certificate, if there is one yet."""
        return self._certificate

    @property
    def certificate(self) -> Certificate:
        """Computed on first use if the solve was interrupted before it had one."""
        if self._certificate is None:
            self._certificate = self.certify()
        return self._certificate

    @property
    def samples(self) -> int:
        """All search work for the heights, in plain samples: start, steps and looks at chi2, not the certificate."""
        return self.facts.samples

    @property
    def efficiency(self) -> float:
        """Sample efficiency e = (n - 1) / (M chi2), math (11), with chi2 of the certificate or its error if larger."""
        found = self.certificate
        return (found.atoms - 1) / (max(self.samples, 1) * max(found.chi2, found.chi2_error))

    @property
    def history(self) -> tuple[Check, ...]:
        """The looks at chi2 during the solve."""
        return self.facts.history

    @property
    def reason(self) -> str | None:
        """Why it stopped: "until_chi2" (the goal), "max_samples", "max_seconds", "interrupted"; None if unfinished.

        With ``exact``: "exact"; "sampled" if Newton's method was stopped or failed.
        """
        return self.facts.reason

    @property
    def explanation(self) -> str:
        """``reason`` in words."""
        return REASONS[self.reason].format(**self.options.to_dict())

    def certify(self, samples: int | None = None, seed_step: int = 0) -> Certificate:
        """A certificate from ``samples`` fresh samples; another ``seed_step`` means other, independent samples.

        Raises InputError for fewer than two samples or a negative ``seed_step``.
        """
        samples = count("samples", samples)
        if samples is not None and samples < 2:
            raise InputError(f"a certificate needs at least 2 samples, chi2 is estimated from pairs; not {samples}")
        count("seed_step", seed_step)
        if seed_step < 0:
            raise InputError(f"seed_step must be 0 or more, not {seed_step}")
        soft = entropic_part(self.problem, self.options)
        held = self.held
        return certify(held.problem, held.assigner, held.progress.state.average, samples, soft=soft, step=seed_step)

    def exact_cells(self) -> ExactCells:
        """Exact power cells of these heights, whether the masses are exact or not: masses, centres, costs, polygons.

        In the plane, for a Gaussian, Cube or Ball. Takes about a second for 20,000 latents. Raises InputError
        otherwise, and at a fixed epsilon, where there are no cells; planar.Uneven where float64 does not do.
        """
        if self.options.epsilon is not None:
            raise InputError("the entropic plan shares samples among latents and has no cells; solve without epsilon")
        held = self.held
        return exact_cells(held.problem, held.latents, held.progress.state.average.cpu().numpy())

    def assign(self, x: ArrayLike | Tensor) -> NDArray[np.int64]:
        """Index of the latent whose power cell holds each sample x (B, d) -> (B,), math (2).

        Equal latents count as one; the lowest of their indices is given. At a fixed epsilon it is the likeliest one.
        Raises InputError for a wrong shape or NaN.
        """
        target, frame = self.problem.target, self.problem.frame
        heights = self.held.progress.state.average
        found = [
            self.held.assigner(frame.source_in(part).to(heights.device), heights, k=1).index[:, 0].cpu()
            for part in self._checked(x).split(BLOCK)
            if len(part)
        ]
        winner = torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
        return target.split.pick(torch.from_numpy(target.original), winner).numpy()

    def map(self, x: ArrayLike | Tensor) -> NDArray[Any]:
        """The OT map T(x) = y_i (B, d), math (5): the latents themselves, in their own dtype."""
        return self._latents(self.assign(x))

    def potential(self, x: ArrayLike | Tensor) -> Array:
        """The Brenier potential u_h(x) = max_i <x, y_i> + h_i (B,) in float64, math (1), with h as in ``heights``.

        At a fixed epsilon it is epsilon log sum_i exp((<x, y_i> + h_i) / epsilon); at the cost "log"
        max_i log<x, y_i> + h_i, math (28). Raises InputError as ``assign``.
        """
        values = self._checked(x)
        soft, frame, target = entropic_part(self.problem, self.options), self.problem.frame, self.problem.target
        average = self.held.progress.state.average
        if soft is None:
            index = self.assign(values)
            best = np.einsum("bd,bd->b", values.numpy(), self._latents(index).astype(np.float64))
            return self.problem.cost.score(best) + self.heights[index]
        parts = [
            potential(self.problem, frame.source_in(part).to(average.device), average, soft.epsilon).cpu()
            for part in values.split(BLOCK)
        ]
        constant = float(target.mass @ (frame.unit * average.cpu().numpy() - target.tilt))
        found = frame.unit * torch.cat([torch.empty(0, dtype=torch.float64), *parts]).numpy()
        return found + values.numpy() @ frame.target_centre - constant

    def cells(self, samples: int | None = None) -> Cells:
        """Mass, centre, cost and margin of every power cell, from 10 fresh samples for each latent, or ``samples``.

        A run folder may hold them already (``distot generate`` keeps what it needs there). Raises InputError for fewer
        than two samples.
        """
        samples = count("samples", samples)
        if samples is not None and samples < 2:
            raise InputError(f"statistics of cells need at least 2 samples, not {samples}")
        return by_latent(self.problem, self.sums(samples), self.held.mass)

    def sums(self, samples: int | None = None) -> Sums:
        """What ``cells`` is made of; without a number of samples, those of the run folder or of an earlier call."""
        held = self.held
        if samples is not None:
            return measure(held.problem, held.assigner, held.progress.state.average, samples)
        if self._sums is None and self.run is not None:
            self._sums = stored_sums(self.run, held)
        if self._sums is None:
            self._sums = self.sums(default_samples(held.problem.target.n))
        return self._sums

    def generate(
        self,
        n: int,
        *,
        k: int | None = None,
        threshold: float | None = None,
        quantile: float = 0.9,
        balance: bool = False,
        seed: int | None = None,
    ) -> Generated:
        """n new latents by the extended map of AE-OT, math (15), from noise that only ``seed`` decides (the solve's).

        k, threshold, quantile, balance: which cells may mix, see ``distot.Mixing``. The first call measures the cells,
        see ``cells``. Raises InputError if k exceeds the number of different latents, or all noise is refused.
        """
        if n < 1:
            raise InputError(f"the number of samples must be at least 1, not {n}")
        mixing = Mixing(k, threshold, quantile, balance)
        return self.generator(mixing, seed).take(n)

    def generator(self, mixing: Mixing, seed: int | None = None) -> Generator:
        """What ``generate`` draws from. Raises InputError at the cost "log"."""
        self.quadratic_only("generation")
        held = self.held
        seed = held.problem.seed if seed is None else seed
        return Generator(held.problem, held.assigner, held.progress.state.average, self.sums(), mixing, seed)

    def decided(self) -> dict[str, Any]:
        """All that decides the map, in values and short hashes, for who goes on with what it gave."""
        held, rows = self.held, self.held.latents
        mass = problem_mass(held.mass, rows)
        return map_of(held.problem, mass, held.progress.state.average, self.options.epsilon)

    def quadratic_only(self, what: str) -> None:
        """Raises InputError at another cost."""
        if self.options.cost != "quadratic":
            raise InputError(
                f"{what} is for the cost 'quadratic' alone; this was solved for the cost {self.options.cost!r}"
            )

    def _checked(self, x: ArrayLike | Tensor) -> Tensor:
        """Samples (B, d) float64 on the CPU. Raises InputError for a wrong shape or NaN."""
        dim = self.problem.target.dim
        values = torch.from_numpy(numbers(x, "the array of samples"))
        if values.ndim != 2 or values.shape[1] != dim:
            raise InputError(f"samples must have shape (B, {dim}), not {tuple(values.shape)}")
        if not bool(torch.isfinite(values).all()):
            raise InputError("samples contain NaN or Inf; remove or mend them")
        return values

    def _latents(self, index: NDArray[np.int64]) -> NDArray[Any]:
        latents = self.held.latents
        return latents.take(index) if isinstance(latents, Latents) else np.asarray(latents)[index]

    def save(self, path: str | Place) -> Place:
        """Writes a self-contained run folder, with a copy of the latents, for ``distot.load`` and ``distot resume``.

        Raises StoreError if ``path`` exists or cannot be written, InputError for what ``slim`` has left out.
        """
        if not self.held.whole:
            raise InputError("this solution came from another process with heights alone; save it where it was made")
        held, progress = self.held, self.held.progress
        config, arrays = describe(held.problem, self.options, "latents.zarr", held.mass, held.latents)
        check_out(as_place(path), None if self.run is None else self.run.path, getattr(held.latents, "path", None))
        run = Run.create(path, config, arrays, (held.latents, None))
        with run.lock():
            run.save_checkpoint(progress.state.step, progress.part(held.problem), progress.scalars(), Axis())
            if self._certificate is not None:
                of = {"step": progress.state.step, "heights": heights_of(held.problem, progress.state.average)}
                run.save_json("certificate.json", self._certificate.to_dict() | of)
        return run.path


def stored_sums(run: Run, held: Held) -> Sums | None:
    """What a run folder holds on the cells of own atoms, if it is on these heights."""
    problem = held.problem
    saved = run.cells.load(problem.grid.world)
    heights = heights_of(problem, held.progress.state.average)
    return Sums.stored(saved, problem) if saved is not None and saved.scalars.get("heights") == heights else None


def stored_certificate(run: Run) -> tuple[Certificate, dict[str, Any]] | None:
    """The certificate in a run folder, and what it says of its heights, for ``belongs``. Raises StoreError if it is
    damaged."""
    stored = run.load_json("certificate.json")
    if stored is None:
        return None
    of: dict[str, Any] = {name: stored.pop(name) for name in ("step", "heights") if name in stored}
    remedy = "delete it, distot certify makes it anew"
    return restored(Certificate, stored, str(run.path / "certificate.json"), remedy), of


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a solve; ``solution`` holds all that had been computed."""

    def __init__(self, message: str, solution: Solution, signal: int) -> None:
        super().__init__(message)
        self.solution = solution
        self.signal = signal


def problem_mass(mass: NDArray[Any] | None, rows: Rows) -> NDArray[Any] | None:
    """The masses in effect: those given, or else the store's own; None for equal ones."""
    return rows.mass if mass is None and isinstance(rows, Latents) else mass


def describe(
    problem: Problem, options: Options, latents: str, mass: NDArray[Any] | None, rows: Rows
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """config.json of a run, and the arrays that belong to it."""
    spec, source_arrays = problem.source.spec()
    arrays = {f"source-{name}": np.asarray(values) for name, values in source_arrays.items()}
    if mass is not None:
        arrays["mass"] = np.asarray(mass)
    config = {
        "distot": version("distot"),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "latents": latents,
        "fingerprint": problem.target.fingerprint,
        "shape": [problem.target.latents, problem.target.dim],
        "mass": mass is not None,
        "masses": masses_of(problem_mass(mass, rows), problem.target.latents),
        "merged": problem.target.merge,
        "init": False,
        "source": spec,
        "source_arrays": sorted(source_arrays),
        "options": options.to_dict(),
    }
    return config, arrays
