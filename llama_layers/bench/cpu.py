"""A processor as the machine that is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

from llama_layers.backends.numba.detect import compiled_problem
from llama_layers.bench.limits import Probe
from llama_layers.bench.machine import load, system
from llama_layers.bench.result import Limit
from llama_layers.bench.threads import Threads

# OpenBLAS's idle threads spin for about 0.1 s before they sleep, and take a core from others.
REST = 0.15
# What the limits are probed with: more than caches hold, and matrices that they do hold.
READ_BYTES = 256 << 20
SQUARE = 1024


class Cpu:
    """So many of its threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = Threads(threads)
        self._load = load()
        self._probe = Probe(self._pool, time.perf_counter, READ_BYTES, SQUARE)

    def reserved(self) -> AbstractContextManager[Any]:
        """Every BLAS has so many threads."""
        return self._pool.applied()

    def rest(self) -> None:
        """Wait until idle threads sleep."""
        time.sleep(REST)

    def timed(self, call: Callable[[], Any]) -> float:
        """The seconds that a call takes."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def probe(self) -> None:
        """Try how fast it reads and multiplies."""
        self._probe()

    def limits(self) -> tuple[Limit, Limit]:
        """Reading and multiplying, as they were probed."""
        return (
            Limit("dot products over an array that no cache holds", self._probe.reading),
            Limit(
                f"float32 products of {SQUARE} x {SQUARE} matrices in NumPy",
                self._probe.multiplying,
            ),
        )

    def facts(self) -> dict[str, str]:
        """What it is, and what it computes with."""
        compiled = compiled_problem() or f"by numba {version('numba')}"
        return {
            **system(),
            "BLAS": self._pool.blas(),
            "our compiled bodies": compiled,
            **self._load,
        }
