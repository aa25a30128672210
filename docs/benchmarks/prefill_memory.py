"""Measure the peak memory of SmolLM2 prefills, which grows linearly with the prompt.

Run ``python docs/benchmarks/prefill_memory.py [2048 4096 8192]`` after
``llama-layers pull smollm2-135m``. Each length runs in a process of its own, since a peak never
falls; the longest takes minutes.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time

import numpy as np

from llama_layers import forward, load


def main() -> None:
    """Measure, and print a Markdown table."""
    lengths = [int(argument) for argument in sys.argv[1:]] or [2048, 4096, 8192]
    spawn = multiprocessing.get_context("spawn")
    print("| tokens | peak resident, MiB | seconds |\n| --- | --- | --- |")
    for length in lengths:
        with spawn.Pool(1) as pool:
            peak, seconds = pool.apply(prefill, (length,))
        print(f"| {length} | {peak:.0f} | {seconds:.1f} |", flush=True)


def prefill(length: int) -> tuple[float, float]:
    """The peak resident memory of this process after one prefill, and the time that it took."""
    model = load("smollm2-135m")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length))
    start = time.perf_counter()
    forward(model, ids, last_only=True)
    seconds = time.perf_counter() - start
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, seconds


if __name__ == "__main__":
    main()
