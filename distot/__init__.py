"""distot: semi-discrete optimal transport at scale, from a continuous source to N latents."""

from distot.api import assign_file, certify, load, resume, solve
from distot.certify import Certificate
from distot.classes import Classes, load_classes, solve_classes
from distot.classpairs import ClassPairs
from distot.conditional import conditional
from distot.errors import DistotError, DistotWarning, InputError, StoreError
from distot.pairfile import PairFile, write_pairs
from distot.pairs import Pairs
from distot.plansampler import PlanSampler
from distot.power import heights_to_weights, weights_to_heights
from distot.solution import Interrupted, Solution
from distot.source import Ball, Cube, Gaussian, Product, Sampler, Samples, Source, Sphere

__all__ = [
    "Ball",
    "Certificate",
    "ClassPairs",
    "Classes",
    "Cube",
    "DistotError",
    "DistotWarning",
    "Gaussian",
    "InputError",
    "Interrupted",
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
    "heights_to_weights",
    "load",
    "load_classes",
    "resume",
    "solve",
    "solve_classes",
    "weights_to_heights",
    "write_pairs",
]
