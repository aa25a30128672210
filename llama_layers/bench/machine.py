"""What a run was made on and with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from llama_layers.bench.threads import Threads, available_threads


def machine(threads: Threads, packages: dict[str, str]) -> dict[str, str]:
    """Processor, system and versions."""
    return {
        "processor": f"{processor()}, {available_threads()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "NumPy": version("numpy"),
        "BLAS": threads.blas(),
        "llama_layers": version("llama-layers"),
        **packages,
    }


def load() -> dict[str, str]:
    """How many threads wanted to run in the last minute, where the system tells."""
    return {"load before": f"{os.getloadavg()[0]:.1f}"} if hasattr(os, "getloadavg") else {}


def processor() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
