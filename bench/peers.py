"""The same problem for peers: POT and OTT with published settings, each to user heights (6) after M samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import ot
from numpy.typing import NDArray
from ott.geometry.semidiscrete_pointcloud import SemidiscretePointCloud
from ott.problems.linear.semidiscrete_linear_problem import SemidiscreteLinearProblem
from ott.solvers.linear.semidiscrete import SemidiscreteSolver

from distot.power import weights_to_heights
from distot.source import Ball, Cube, Gaussian, Key, Samples, Source, Sphere, Stream

Array = NDArray[np.float64]

BATCH = 1000
RATES = (0.05, 0.2)  # of Adam
FRESH = 0.01  # weight of the newest iterate in OTT's moving average; its default of 0.99 hardly averages


def pot(y: Array, samples: int, source: Source, mass: Array) -> Array:
    """``solve_semidiscrete`` with its defaults, which are DRAG, but for the batch."""
    step = iter(range(samples))

    def draw(batch: int) -> Array:
        return source.draw(Key(0, Stream.STEP, next(step), 0), batch).numpy()

    g = ot.semidiscrete.solve_semidiscrete(
        y, sampler_source=draw, a_target=mass, max_iter=max(1, samples // BATCH), batch_size=min(BATCH, samples)
    )
    return weights_to_heights(np.asarray(g), y)


def ott(y: Array, samples: int, source: Source, mass: Array, rate: float) -> Array:
    """``SemidiscreteSolver`` with Adam at a constant rate and a moving average of iterates, no regularisation."""
    steps = max(1, samples // BATCH)
    cloud = SemidiscretePointCloud(partial(_draw, source), jnp.asarray(y, dtype=jnp.float32), epsilon=0.0)
    solver = SemidiscreteSolver(
        num_iterations=steps,
        batch_size=min(BATCH, samples),
        optimizer=optax.adam(rate),
        error_eval_every=steps,
        error_num_repeats=1,
        threshold=0.0,
        potential_ema=FRESH,
    )
    found = jax.jit(solver)(jr.key(0), SemidiscreteLinearProblem(cloud, jnp.asarray(mass, dtype=jnp.float32)))
    return weights_to_heights(np.asarray(found.g, dtype=np.float64), y)


def _draw(source: Source, rng: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
    """Samples of the source by JAX."""
    match source:
        case Gaussian():
            return jr.normal(rng, shape, dtype)
        case Cube():
            return jr.uniform(rng, shape, dtype)
        case Ball():
            return jr.ball(rng, shape[1], shape=shape[:1], dtype=dtype)
        case Sphere():
            z = jr.normal(rng, shape, dtype)
            return z / jnp.linalg.norm(z, axis=1, keepdims=True)
        case Samples():
            rows = jnp.asarray(source.rows, dtype=dtype)
            return rows[jr.randint(rng, shape[:1], 0, len(rows))]
    raise TypeError(f"no JAX sampler for {type(source).__name__}")
