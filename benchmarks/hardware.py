"""What a benchmark ran on, for its results."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from structmat import __version__


def hardware() -> dict[str, str]:
    """Name the processor, the accelerator, the threads and the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    facts = {
        "processor": models[0] if models else platform.processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "structmat": __version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def hardware_line(facts: dict[str, str]) -> str:
    """The same as one line of text."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())
