"""Conditional transport: cost ½|x - y|² + ½ beta |c(x) - c(y)|² is plain transport of longer vectors, math (30).

Legend: N latents, d dimension, m numbers of a condition.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distot.errors import InputError
from distot.given import numbers
from distot.source import Product, Samples, Source, as_source


def conditional(
    latents: ArrayLike, conditions: ArrayLike, beta: float, source: object = "gaussian"
) -> tuple[NDArray[np.float64], Source]:
    """Latents (N, d + m) and their source, for ``solve``, where a noise vector carries a condition of its own.

    latents: (N, d). conditions: (N, m), numbers that say what each latent is of, one-hot labels or embeddings for
    instance. beta: how much a unit of squared distance between conditions costs, in units of the cost; as it grows
    pairs agree in their conditions more and more. source: of the noise, dimension d; conditions are drawn from the rows
    of ``conditions``, independently of the noise. In what is solved conditions are multiplied by the root of beta:

        both, wide = distot.conditional(latents, one_hot, beta=10.0)
        for noise, latent, index in distot.Pairs(distot.solve(both, wide)):
            x, c = noise[:, :d], noise[:, d:] / 10.0**0.5

    Raises InputError for shapes that do not go together, or a beta that is not positive.
    """
    y, c = numbers(latents, "the array of latents"), numbers(conditions, "the array of conditions")
    if y.ndim != 2 or c.ndim != 2 or len(y) != len(c):
        raise InputError(f"latents (N, d) and conditions (N, m) must have as many rows; they are {y.shape}, {c.shape}")
    if not (np.isfinite(beta) and beta > 0):
        raise InputError(f"beta must be positive, it is {beta}; for no conditions solve the latents alone")
    scaled = np.sqrt(beta) * c
    return np.concatenate([y, scaled], axis=1), Product(as_source(source, y.shape[1]), Samples(scaled))
