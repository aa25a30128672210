"""Time three ways to write one linear map in NumPy: the table of docs/cpu.md.

Run ``python docs/benchmarks/linear_layouts.py [--rounds 15]`` on a quiet machine. The ways take
turns, round by round, so that a change of the machine's speed falls on all of them; the limits
are probed in the same rounds: no product is done before W is read, at the fastest rate that
anything here read it, or before its operations are, at the rate of a large square product.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

OUT, IN = 12288, 4096  # the fused Q, K and V of Llama-2 7B
ROWS = (1, 2, 8, 32, 128)
SQUARE = 2048


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    rng = np.random.default_rng(0)
    out_in = rng.standard_normal((OUT, IN), np.float32)
    in_out = np.ascontiguousarray(out_in.T)
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "`x @ W.T`, W [out, in]": lambda x: x @ out_in.T,
        "`(W @ x.T).T`, W [out, in]": lambda x: (out_in @ x.T).T,
        "`x @ W`, W [in, out]": lambda x: x @ in_out,
    }
    inputs = {s: rng.standard_normal((s, IN), np.float32) for s in ROWS}
    half = out_in.reshape(2, -1)
    square = rng.standard_normal((SQUARE, SQUARE), np.float32)

    seconds: dict[tuple[str, int], list[float]] = {(way, s): [] for way in ways for s in ROWS}
    reading: list[float] = []
    multiplying: list[float] = []
    for _ in range(rounds + 1):
        reading.append(timed(lambda: half[0] @ half[1]))
        multiplying.append(timed(lambda: square @ square))
        for s, x in inputs.items():
            for way, product in ways.items():
                seconds[way, s].append(timed(lambda product=product, x=x: product(x)))
    for times in (reading, multiplying, *seconds.values()):
        del times[0]  # the first round warms caches and threads

    print(f"{cpu()}, {threads()} thread(s); NumPy {np.__version__}, {blas()};")
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()};")
    print(f"float32, {IN} to {OUT}; {rounds} rounds. Milliseconds, best / median.\n")
    print("| | " + " | ".join(f"S = {s}" for s in ROWS) + " |")
    print("|---" * (len(ROWS) + 1) + "|")
    for way in ways:
        cells = (both(seconds[way, s], 1e3, 1) for s in ROWS)
        print(f"| {way} | " + " | ".join(cells) + " |")
    gigabytes, gigaflop = out_in.nbytes / 1e9, 2 * SQUARE**3 / 1e9
    fastest_read = min(*reading, *(min(seconds[way, 1]) for way in ways))
    fastest_work = min(multiplying) / gigaflop
    limits = (max(fastest_read, 2 * s * OUT * IN / 1e9 * fastest_work) for s in ROWS)
    print("| limit | " + " | ".join(f"{limit * 1e3:.1f}" for limit in limits) + " |")
    print(f"\nReading (a dot product of {gigabytes:.2f} GB): {rates(reading, gigabytes)} GB/s.")
    print(f"sgemm {SQUARE}^3: {rates(multiplying, gigaflop)} GFLOP/s. Best / median.")


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def both(times: list[float], scale: float, digits: int) -> str:
    """Best and median."""
    return f"{min(times) * scale:.{digits}f} / {statistics.median(times) * scale:.{digits}f}"


def rates(times: list[float], work: float) -> str:
    """Best and median rate of doing some work."""
    return f"{work / min(times):.0f} / {work / statistics.median(times):.0f}"


def cpu() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def blas() -> str:
    """Name and version of the library that multiplies."""
    found = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{found['name']} {found['version']}"


def threads() -> str:
    """How many threads BLAS may use."""
    return os.environ.get("OPENBLAS_NUM_THREADS") or str(len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
