"""The number of threads of the BLAS libraries in this process."""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager
from typing import Any


def available_threads() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class BlasThreads:
    """The BLAS libraries, whose threads can be limited; other engines limit their own."""

    def __init__(self) -> None:
        try:
            self._controller: Any = importlib.import_module("threadpoolctl").ThreadpoolController()
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "bench needs threadpoolctl to set the number of threads: "
                "pip install 'llama-layers[bench]', or threadpoolctl alone"
            ) from None

    def limited_to(self, count: int) -> AbstractContextManager[object]:
        """Give every BLAS this number of threads, within a block."""
        return self._controller.limit(limits=count, user_api="blas")

    def names(self) -> str:
        """Name the BLAS libraries that are loaded, and the processor that they detected."""
        found = {
            " ".join(
                str(info[key])
                for key in ("internal_api", "version", "architecture")
                if info.get(key)
            )
            for info in self._controller.info()
            if info["user_api"] == "blas"
        }
        return ", ".join(sorted(found)) or "none that threadpoolctl knows: its threads are not set"
