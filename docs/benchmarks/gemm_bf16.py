"""Time the compiled product of many tokens against NumPy's and torch's.

Run ``python docs/benchmarks/gemm_bf16.py [--rounds 9] [--threads 2] [--tokens 32 128 512]``. Llama
2 7B's fused Q, K and V, 4096 to 12288. The engines take turns, round by round, so that a change of
the machine's speed falls on all of them: compare within a column. Packing x is part of our time.
Torch is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
from threadpoolctl import threadpool_limits

from llama_layers.backends.numba.kernels import gemm
from llama_layers.backends.numpy.linear import linear_2d

OUT, IN = 12288, 4096
FORMATS = [
    ("bfloat16", "bfloat16"),
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("float32", "float16"),
]


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 512])
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((OUT, IN), np.float32)
    weights = {name: wide.astype(dtype(name)) for _, name in FORMATS}
    pool = ThreadPoolExecutor(options.threads)
    print(f"x, weight: best / median milliseconds; GFLOP/s at best. {options.threads} threads.\n")
    print("| | " + " | ".join(f"{tokens} tokens" for tokens in options.tokens) + " |")
    print("|---" * (len(options.tokens) + 1) + "|")
    with threadpool_limits(options.threads):
        for x_name, w_name in FORMATS:
            if (reason := gemm.problem(x_name, w_name)) is not None:
                print(f"{x_name}, {w_name}: {reason}")
                continue
            columns = []
            for tokens in options.tokens:
                x = rng.standard_normal((tokens, IN), np.float32).astype(dtype(x_name))
                ways = engines(x, weights[w_name], pool, options.threads)
                columns.append(measured(ways, options.rounds, 2e-9 * tokens * OUT * IN))
            for way in columns[0]:
                cells = " | ".join(column[way] for column in columns)
                print(f"| {x_name}, {w_name}: {way} | {cells} |", flush=True)


def engines(
    x: np.ndarray, weight: np.ndarray, pool: ThreadPoolExecutor, threads: int
) -> dict[str, Callable[[], object]]:
    """What computes x @ weight.T."""

    def ours() -> np.ndarray:
        y = np.empty((len(x), len(weight)), x.dtype)
        packed = gemm.pack(x)
        parts = [
            pool.submit(gemm.multiply, thread, threads, packed, weight, None, y)
            for thread in range(threads)
        ]
        for part in parts:
            part.result()
        return y

    ways: dict[str, Callable[[], object]] = {"compiled": ours}
    if x.dtype == np.float32:
        ways["NumPy"] = lambda: linear_2d(np, x, weight, None)
    if x.dtype == weight.dtype and find_spec("torch"):
        torch = importlib.import_module("torch")
        torch.set_num_threads(threads)
        theirs = [tensor(torch, array) for array in (x, weight)]
        ways["torch"] = lambda: torch.nn.functional.linear(*theirs)
    return ways


def measured(ways: dict[str, Callable[[], object]], rounds: int, gigaflop: float) -> dict[str, str]:
    """Best and median of rounds in which each way has its turn."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, product in ways.items():
            start = time.perf_counter()
            product()
            seconds[way].append(time.perf_counter() - start)
    cells = {}
    for way, (_, *times) in seconds.items():  # the first round compiles and warms
        best, median = min(times), statistics.median(times)
        cells[way] = f"{best * 1e3:.1f} / {median * 1e3:.1f}; {gigaflop / best:.0f}"
    return cells


def dtype(name: str) -> Any:
    """A dtype that NumPy may not know by name."""
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def tensor(torch: Any, array: np.ndarray) -> Any:
    """The same numbers for torch, which takes no bfloat16 from NumPy."""
    if array.dtype == np.float32:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)


if __name__ == "__main__":
    main()
