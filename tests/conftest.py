"""One thread for every test: results do not depend on how busy the machine is, and small problems run faster.

Without a GPU, Triton kernels run in its interpreter.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"  # else Ray writes a token to the home folder
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import faiss
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
faiss.omp_set_num_threads(1)
