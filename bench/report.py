"""Where reports go, and the machine they were made on."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch

REPORTS = Path(__file__).parent / "reports"


def write(name: str, title: str, lines: list[str]) -> None:
    """Writes bench/reports/NAME.md and prints it."""
    flags = Path("/proc/cpuinfo")
    wide = "AVX-512" if flags.exists() and "avx512f" in flags.read_text() else "no AVX-512"
    head = [
        f"# {title}",
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores ({wide}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}. Compare figures within this run only.",
        "",
    ]
    REPORTS.mkdir(exist_ok=True)
    text = "\n".join(head + lines) + "\n"
    (REPORTS / f"{name}.md").write_text(text)
    print(text)
