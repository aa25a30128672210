"""The number of threads, set for everything in the process that has threads of its own."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


def available_threads() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Threads:
    """A number of threads, and the BLAS libraries that it is set for.

    Engines that have threads of their own are told the number where they are made.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        try:
            self._controller: Any = importlib.import_module("threadpoolctl").ThreadpoolController()
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "bench needs threadpoolctl to set the number of threads: "
                "pip install 'llama-layers[bench]', or threadpoolctl alone"
            ) from None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Every BLAS has so many threads."""
        with self._controller.limit(limits=self.count, user_api="blas"):
            yield

    def one_for_blas(self) -> AbstractContextManager[Any]:
        """Every BLAS has one thread: where there are threads that call it."""
        limit: AbstractContextManager[Any] = self._controller.limit(limits=1, user_api="blas")
        return limit

    def blas(self) -> str:
        """The BLAS libraries that are loaded, and what processor they take this one for."""
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
