"""What a run is made on and with."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from llama_layers.backends.machine import processor
from llama_layers.bench.result import Limit
from llama_layers.bench.threads import available_threads


class Machine(Protocol):
    """A processor or a GPU: its clock, its limits, and what it is."""

    @property
    def threads(self) -> int | None:
        """Of every contestant; None where nobody sets them."""

    def reserved(self) -> AbstractContextManager[Any]:
        """While contestants are made and timed."""

    def rest(self) -> None:
        """Wait until what was done before disturbs no more."""

    def timed(self, call: Callable[[], Any]) -> float:
        """The seconds that a call takes."""

    def probe(self) -> None:
        """Try how fast it reads and multiplies."""

    def limits(self) -> tuple[Limit, Limit]:
        """Reading and multiplying, as they were probed."""

    def facts(self) -> dict[str, str]:
        """What it is, and what it computes with."""


def system() -> dict[str, str]:
    """Processor, system and versions, which say something of every machine."""
    return {
        "processor": f"{processor()}, {available_threads()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "NumPy": version("numpy"),
        "llama_layers": own_version(),
    }


def own_version() -> str:
    """Of this package, if it is installed."""
    try:
        return version("llama-layers")
    except PackageNotFoundError:
        return "not installed, from its sources"


def load() -> dict[str, str]:
    """How many threads wanted to run in the last minute, where the system tells."""
    return {"load before": f"{os.getloadavg()[0]:.1f}"} if hasattr(os, "getloadavg") else {}
