"""Pairs of noise and data by the optimal coupling, for flow matching.

noise.py draws numbered samples, coupling.py finds their latents, balance.py gives every latent exactly its share,
loader.py hands batches out to ranks and workers; dataset.py, file.py and classes.py are the loaders that users see.
"""

from distot.pairs.classes import ClassPairs
from distot.pairs.dataset import Pairs
from distot.pairs.file import PairFile, write_pairs
from distot.pairs.sampler import PlanSampler

__all__ = ["ClassPairs", "PairFile", "Pairs", "PlanSampler", "write_pairs"]
