"""The machine that a benchmark runs on, and its description."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Protocol

from llama_layers.backends.machine import processor
from llama_layers.bench.result import Limit
from llama_layers.bench.threads import available_threads
from llama_layers.version import __version__


class Machine(Protocol):
    """A processor or a GPU: its clock, its limits as they were probed, and what it is."""

    reading: Limit
    multiplying: Limit

    @property
    def threads(self) -> int | None:
        """The threads of every engine; None where nobody sets them."""

    def pinned(self) -> AbstractContextManager[object]:
        """Hold the settings under which engines are made and timed."""

    def settle(self) -> None:
        """Wait until earlier work no longer disturbs."""

    def timed(self, call: Callable[[], object]) -> float:
        """Return the seconds that a call takes."""

    def probe(self) -> None:
        """Try how fast it reads and multiplies."""

    def describe(self) -> dict[str, str]:
        """Describe the machine and what it computes with."""


def system() -> dict[str, str]:
    """Describe the processor, the system and the versions."""
    return {
        "processor": f"{processor()}, {available_threads()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "NumPy": version("numpy"),
        "llama_layers": __version__,
    }


def load() -> dict[str, str]:
    """The number of threads that wanted to run in the last minute, where the system tells."""
    return {"load before": f"{os.getloadavg()[0]:.1f}"} if hasattr(os, "getloadavg") else {}
