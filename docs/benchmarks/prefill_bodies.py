"""Time prefills with the portable definitions and with NumPy's own bodies: a table of docs/cpu.md.

Run ``python docs/benchmarks/prefill_bodies.py [tokens ...]``. SmolLM2 135M is taken from the cache
of downloads; see ``llama-layers pull smollm2-135m``. Projections are the same in both, and not
compiled. Both take turns, round by round, so that a change of the machine's speed falls on both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from linear_layouts import cpu, threads

from llama_layers import forward, load
from llama_layers.arrays.dispatch import only
from llama_layers.backends import numpy as backend
from llama_layers.backends.numpy import attention, linear, pointwise
from llama_layers.layers import attention as attend
from llama_layers.layers import mlp as feed_forward
from llama_layers.layers import norm, rope

PORTABLE: dict[str, Callable[..., Any]] = {
    "attend": attend.attend.__wrapped__,
    "gate_with_silu": feed_forward.gate_with_silu.__wrapped__,
    "normalise": norm.normalise.__wrapped__,
    "rotate": rope.rotate.__wrapped__,
    "activations": lambda xp, x: x,
}
OWN: dict[str, Callable[..., Any]] = {
    "attend": attention.attend,
    "gate_with_silu": pointwise.gate_with_silu,
    "normalise": pointwise.normalise,
    "rotate": pointwise.rotate,
    "activations": backend.activations,
}


def main() -> None:
    """Measure, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = load("smollm2-135m", dtype="float32")
    print(f"{cpu()}, {threads()} thread(s); NumPy {np.__version__}; best / median, ms.\n")
    for count in options.tokens:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, count))
        found: dict[str, list[dict[str, float]]] = {"portable": [], "own": []}
        for _ in range(options.rounds + 1):
            for way, bodies in (("portable", PORTABLE), ("own", OWN)):
                with timed(bodies) as seconds:
                    start = time.perf_counter()
                    forward(model, ids, last_only=True)
                    seconds["all"] = time.perf_counter() - start
                seconds["other"] = 2 * seconds["all"] - sum(seconds.values())
                found[way].append(dict(seconds))
        print(f"| {count} tokens | portable | own | ratio of the best |\n|---|---|---|---|")
        for part in ("all", *sorted(set(found["own"][0]) - {"all", "activations"})):
            cells = [[run[part] * 1e3 for run in found[way][1:]] for way in found]
            ratio = min(cells[0]) / min(cells[1])
            texts = (f"{min(cell):.0f} / {statistics.median(cell):.0f}" for cell in cells)
            print(f"| {part} | {' | '.join(texts)} | {ratio:.2f} |")
        print(flush=True)


@contextmanager
def timed(bodies: dict[str, Callable[..., Any]]) -> Iterator[dict[str, float]]:
    """Count the seconds spent in each body while they are the ones chosen."""
    seconds: dict[str, float] = defaultdict(float)

    def counted(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = body(*arguments)
            seconds[name] += time.perf_counter() - start
            return result

        return call

    chosen = {"linear_2d": linear.linear_2d, **bodies}
    with only({n: counted(n, body) for n, body in chosen.items()}):
        yield seconds


if __name__ == "__main__":
    main()
