"""Generative models in latent space: autoencoders, penalised optimal transport, neural potentials, and their judge."""

from distot.models.autoencoder import Autoencoder, Code, Spec
from distot.models.datasets import Core, Data, load
from distot.models.evaluation import Classifier, Judge, Scores
from distot.models.kantorovich import Critic, Estimate
from distot.models.penalties import Adversary, Discrepancy, Divergence, Penalty, Transport, mmd
from distot.models.potential import Fit, Potential, fit, fit_batches
from distot.models.training import Epoch, Training, train

__all__ = [
    "Adversary",
    "Autoencoder",
    "Classifier",
    "Code",
    "Core",
    "Critic",
    "Data",
    "Discrepancy",
    "Divergence",
    "Epoch",
    "Estimate",
    "Fit",
    "Judge",
    "Penalty",
    "Potential",
    "Scores",
    "Spec",
    "Training",
    "Transport",
    "fit",
    "fit_batches",
    "load",
    "mmd",
    "train",
]
