"""One thread for every test: results do not depend on how busy the machine is, and small problems run faster."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import faiss
import torch

torch.set_num_threads(1)
faiss.omp_set_num_threads(1)
