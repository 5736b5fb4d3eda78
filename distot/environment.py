"""What a run was computed with: versions and the machine, for its log and its report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch


def environment(device: torch.device) -> dict[str, str | int]:
    """Versions, processors and operating system of this process; of a GPU its name. Nothing in it names the machine."""
    found: dict[str, str | int] = {
        "distot": version("distot"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": version("numpy"),
        "system": platform.platform(aliased=True, terse=True),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})
