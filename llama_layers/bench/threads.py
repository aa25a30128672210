"""The number of threads of the BLAS libraries in this process."""

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

    Engines with threads of their own get the number when they are made.
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
        """Give every BLAS this number of threads."""
        with self._controller.limit(limits=self.count, user_api="blas"):
            yield

    def one_for_blas(self) -> AbstractContextManager[Any]:
        """Give every BLAS one thread, for threads that call it."""
        limit: AbstractContextManager[Any] = self._controller.limit(limits=1, user_api="blas")
        return limit

    def blas(self) -> str:
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
