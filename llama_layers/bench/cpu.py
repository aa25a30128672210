"""A processor as the machine that is measured: its clock, and how fast it reads and multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from importlib.metadata import version

import numpy as np

from llama_layers.backends.numba.detect import compiled_problem
from llama_layers.bench.machine import load, system
from llama_layers.bench.result import Limit
from llama_layers.bench.threads import BlasThreads

# OpenBLAS's idle threads spin for about 0.1 s before they sleep, and take a core from others.
REST = 0.15
# Sizes for probing the limits: more bytes than caches hold, and matrices that they do hold.
READ_BYTES = 256 << 20
SQUARE = 1024
TRIES = 3


class Cpu:
    """A processor, with a number of its threads.

    Each thread reads its part of an array by dot products, which release the interpreter's lock.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._blas = BlasThreads()
        self._load = load()
        numbers = np.ones(READ_BYTES // 4, np.float32)
        self._parts = [np.array_split(part, 2) for part in np.array_split(numbers, threads)]
        self._square = np.ones((SQUARE, SQUARE), np.float32)
        self.reading = Limit("dot products over an array that no cache holds", [])
        self.multiplying = Limit(f"float32 products of {SQUARE} x {SQUARE} matrices in NumPy", [])

    def pinned(self) -> AbstractContextManager[object]:
        """Set the number of threads of every BLAS."""
        return self._blas.limited_to(self.threads)

    def settle(self) -> None:
        """Wait until idle threads sleep."""
        time.sleep(REST)

    def timed(self, call: Callable[[], object]) -> float:
        """Return the seconds that a call takes."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def probe(self) -> None:
        """Try a few times how fast it reads and multiplies."""
        with self._blas.limited_to(1), ThreadPoolExecutor(self.threads) as pool:
            for _ in range(TRIES):
                seconds = self.timed(lambda: list(pool.map(_dot, self._parts)))
                self.reading.rates.append(READ_BYTES / seconds)
        for _ in range(TRIES):
            seconds = self.timed(lambda: self._square @ self._square)
            self.multiplying.rates.append(2 * SQUARE**3 / seconds)

    def describe(self) -> dict[str, str]:
        """Describe the processor and what it computes with."""
        compiled = compiled_problem() or f"by numba {version('numba')}"
        return {
            **system(),
            "BLAS": self._blas.names(),
            "our compiled bodies": compiled,
            **self._load,
        }


def _dot(halves: list[np.ndarray]) -> None:
    shorter = halves[1].size  # array_split makes the first ones longer by one
    np.dot(halves[0][:shorter], halves[1])
