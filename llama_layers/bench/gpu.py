"""A GPU as the machine that is measured, through CuPy."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from llama_layers.arrays.types import Namespace
from llama_layers.backends.cupy import cublas
from llama_layers.backends.cupy.detect import device_name, dotted
from llama_layers.bench.job import Kind
from llama_layers.bench.machine import load, system
from llama_layers.bench.models import RandomWeights
from llama_layers.bench.result import Limit

# Sizes for probing the limits: more bytes than a cache holds, and matrices that keep all
# multiprocessors busy.
COPIED = 512 << 20
SQUARE = 8192
TRIES = 3
# The fewest and the most copies that keep the GPU busy meanwhile.
FEWEST_AHEAD, MOST_AHEAD = 16, 256


class Gpu:
    """The current device.

    A whole model is timed as its user waits for it: from an idle GPU to an idle GPU, by the
    processor's clock. A product takes less time than Python needs to launch it. So copies keep the
    GPU busy until all products are launched, and its own events measure the time; the copies also
    clear its cache.
    """

    threads = None

    def __init__(self, kind: Kind, dtype: str) -> None:
        self._cupy: Namespace = importlib.import_module("cupy")
        self._launched_ahead = kind == "qkv"
        self._load = load()
        self._copies = [self._cupy.zeros(COPIED, dtype=self._cupy.uint8) for _ in range(2)]
        weights = RandomWeights(dtype, "cupy")
        self._a, self._b = (weights.matrix(SQUARE, SQUARE) for _ in range(2))
        self._product = self._cupy.empty((SQUARE, SQUARE), dtype=self._a.dtype)
        self._multiply()  # once untimed: cuBLAS takes its memory
        self.reading = Limit(f"copies of {COPIED >> 20} MiB on the GPU, read and written", [])
        self.multiplying = Limit(
            f"{dtype} products of {SQUARE} x {SQUARE} matrices of random numbers in cuBLAS", []
        )

    def pinned(self) -> AbstractContextManager[object]:
        """Do nothing: a GPU has no such setting."""
        return nullcontext()

    def settle(self) -> None:
        """Wait until the GPU is idle."""
        self._cupy.cuda.Device().synchronize()

    def timed(self, call: Callable[[], object]) -> float:
        """Return the seconds that a call takes."""
        if self._launched_ahead:
            return self.timed_by_events(call)
        self.settle()
        start = time.perf_counter()
        call()
        self.settle()
        return time.perf_counter() - start

    def timed_by_events(self, call: Callable[[], object]) -> float:
        """Return the seconds that the GPU takes; time again if it had to wait for Python."""
        start, end = (self._cupy.cuda.Event() for _ in range(2))
        ahead = FEWEST_AHEAD
        while True:
            for _ in range(ahead):
                self._copy()
            start.record()
            call()
            waited = start.done
            end.record()
            end.synchronize()
            if not waited or ahead >= MOST_AHEAD:
                return float(self._cupy.cuda.get_elapsed_time(start, end)) / 1e3
            ahead *= 2

    def probe(self) -> None:
        """Try how fast it reads and multiplies."""
        for _ in range(TRIES):
            self.reading.rates.append(2 * COPIED / self.timed_by_events(self._copy))
            seconds = self.timed_by_events(self._multiply)
            self.multiplying.rates.append(2 * SQUARE**3 / seconds)

    def describe(self) -> dict[str, str]:
        """Describe the GPU and what it computes with."""
        runtime = self._cupy.cuda.runtime
        return {
            "GPU": device_name(),
            "driver": driver(),
            "CUDA": dotted(runtime.runtimeGetVersion()),
            "CuPy": self._cupy.__version__,
            **system(),
            **self._load,
        }

    def _copy(self) -> None:
        source, target = self._copies
        cuda = self._cupy.cuda
        cuda.runtime.memcpyAsync(
            *(target.data.ptr, source.data.ptr, COPIED, cuda.runtime.memcpyDeviceToDevice),
            cuda.get_current_stream().ptr,
        )

    def _multiply(self) -> None:
        cublas.matmul(self._a, self._b.T, self._product)


def driver() -> str:
    """Ask NVIDIA's tool for the version of its driver."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() or "unknown"
