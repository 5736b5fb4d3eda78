"""distot: semi-discrete optimal transport at scale, from a continuous source to N latents."""

from distot import signals

if signals.command():  # before the imports that take time
    signals.quit_at_once()

from distot import live
from distot.api import assign_file, certify, generate_file, load, resume, solve
from distot.cells import Cells
from distot.certify import Certificate
from distot.classes import Classes, load_classes, solve_classes
from distot.conditional import conditional
from distot.errors import DistotError, DistotWarning, InputError, StoreError
from distot.exact import ExactCells
from distot.generate import Generated, Mixing
from distot.pairs import ClassPairs, PairFile, Pairs, PlanSampler, write_pairs
from distot.power import heights_to_weights, weights_to_heights
from distot.report import report
from distot.solution import Interrupted, Solution
from distot.source import Ball, Cube, Gaussian, Product, Sampler, Samples, Source, Sphere

__all__ = [
    "Ball",
    "Cells",
    "Certificate",
    "ClassPairs",
    "Classes",
    "Cube",
    "DistotError",
    "DistotWarning",
    "ExactCells",
    "Gaussian",
    "Generated",
    "InputError",
    "Interrupted",
    "Mixing",
    "PairFile",
    "Pairs",
    "PlanSampler",
    "Product",
    "Sampler",
    "Samples",
    "Solution",
    "Source",
    "Sphere",
    "StoreError",
    "assign_file",
    "certify",
    "conditional",
    "generate_file",
    "heights_to_weights",
    "live",
    "load",
    "load_classes",
    "report",
    "resume",
    "solve",
    "solve_classes",
    "weights_to_heights",
    "write_pairs",
]
