"""What all tests share: one thread each, so that results do not depend on how busy the machine is."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
