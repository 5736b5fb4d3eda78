"""What a run was computed with: versions and the machine, for its log and its report."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from math import ceil
from pathlib import Path
from types import FrameType

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
        "cores": cores(),
        "threads": torch.get_num_threads(),
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def cores() -> int:
    """Processors that this process may use: of the machine those that it is bound to, and what its container allows."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, ceil(min(bound, _quota())))


def _quota() -> float:
    """The least number of processors that a control group of this process allows; infinity if none does."""
    facts = Path("/proc/self/cgroup")
    least = float("inf")
    for line in facts.read_text().splitlines() if facts.exists() else []:
        _, kinds, name = line.split(":", 2)
        if kinds and "cpu" not in kinds.split(","):
            continue
        root = Path("/sys/fs/cgroup") if not kinds else Path("/sys/fs/cgroup/cpu")
        own = root / name.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(root):
                least = min(least, _allowed(group))
    return least


def _allowed(group: Path) -> float:
    """Processors that one control group allows, of version 2 or 1."""
    try:
        if (file := group / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else float("inf")
    except (OSError, ValueError):  # no such limit, or "max"
        return float("inf")


def callers(module: str) -> Iterator[FrameType]:
    """Calls that this one is inside of, innermost first, in modules whose name has ``module`` in it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if module in frame.f_globals.get("__name__", ""):
            yield frame
        frame = frame.f_back
