"""distot: semi-discrete optimal transport at scale, from a continuous source to N latents."""

from distot import live
from distot.api import assign_file, certify, generate_file, load, resume, solve
from distot.cells import Cells
from distot.certify import Certificate
from distot.errors import DistotError, DistotWarning, InputError, StoreError
from distot.exact import ExactCells
from distot.generate import Generated, Mixing
from distot.power import heights_to_weights, weights_to_heights
from distot.report import report
from distot.solution import Interrupted, Solution
from distot.source import Ball, Cube, Gaussian, Sampler, Samples, Source, Sphere

__all__ = [
    "Ball",
    "Cells",
    "Certificate",
    "Cube",
    "DistotError",
    "DistotWarning",
    "ExactCells",
    "Gaussian",
    "Generated",
    "InputError",
    "Interrupted",
    "Mixing",
    "Sampler",
    "Samples",
    "Solution",
    "Source",
    "Sphere",
    "StoreError",
    "assign_file",
    "certify",
    "generate_file",
    "heights_to_weights",
    "live",
    "load",
    "report",
    "resume",
    "solve",
    "weights_to_heights",
]
