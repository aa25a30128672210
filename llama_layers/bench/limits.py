"""What this machine can do, probed in the same run as everything else: reading and multiplying."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from llama_layers.bench.threads import Threads

TRIES = 3


@dataclass
class Probe:
    """Both limits, by so many threads.

    Attributes
    ----------
    threads : Threads
        How many, and what sets them.
    clock : callable
        Gives seconds.
    nbytes : int
        Of the array that is read; a power of two, larger than any cache.
    square : int
        Rows and columns of the matrices that are multiplied.
    reading : list of float
        Bytes a second, of each try: dot products over an array that no cache holds. Each thread
        has its part of it, since NumPy lets go of the interpreter's lock meanwhile.
    multiplying : list of float
        Operations a second, of each try: NumPy's float32 product of square matrices that the
        last-level cache holds.
    """

    threads: Threads
    clock: Callable[[], float]
    nbytes: int
    square: int
    reading: list[float] = field(default_factory=list)
    multiplying: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        numbers = np.ones(self.nbytes // 4, np.float32)
        self._parts = [
            np.array_split(part, 2) for part in np.array_split(numbers, self.threads.count)
        ]
        self._square = np.ones((self.square, self.square), np.float32)

    def __call__(self) -> None:
        """Try both some times."""
        with self.threads.one_for_blas(), ThreadPoolExecutor(self.threads.count) as pool:
            for _ in range(TRIES):
                start = self.clock()
                list(pool.map(_dot, self._parts))
                self.reading.append(self.nbytes / (self.clock() - start))
        for _ in range(TRIES):
            start = self.clock()
            self._square @ self._square
            self.multiplying.append(2 * self.square**3 / (self.clock() - start))


def _dot(halves: list[np.ndarray]) -> None:
    shorter = halves[1].size  # array_split makes the first ones longer by one
    np.dot(halves[0][:shorter], halves[1])
