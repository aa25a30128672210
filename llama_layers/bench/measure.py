"""A job, measured: engines in turns, with the machine's limits probed in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np

from llama_layers.bench.engine import Engine
from llama_layers.bench.engines import make_engines
from llama_layers.bench.job import Job
from llama_layers.bench.machine import Machine
from llama_layers.bench.result import Case, Result
from llama_layers.bench.threads import available_threads
from llama_layers.errors import BackendError

# Relative to the norm of the result. Other work, such as a transposed matrix, is off by about 1.4;
# a model of many layers in 16-bit formats by some 0.05.
TOLERANCES = {"float32": 1e-2, "bfloat16": 0.3, "float16": 0.3}


def measure(
    job: Job,
    names: Sequence[str],
    *,
    machine: Machine,
    rounds: int,
    progress: Callable[[], object] = lambda: None,
    meet: Callable[[], object] = lambda: None,
) -> Result:
    """Time our own engine and the others of these names, each once in a round at each size.

    `progress` is called before each round, and `meet` before each turn. Raises BackendError if the
    results of two engines differ.
    """

    def between() -> None:
        progress()
        machine.settle()
        meet()
        machine.probe()

    def timed(call: Callable[[], object]) -> float:
        meet()
        return machine.timed(call)

    with ExitStack() as closing:
        closing.enter_context(machine.pinned())
        threads = machine.threads or available_threads()
        engines, versions = make_engines(names, job, threads, closing)
        check_agreement(engines, job.sizes, job.dtype)
        seconds = run_rounds(
            engines,
            job.sizes,
            rounds=rounds,
            timed=timed,
            settle=machine.settle,
            between=between,
        )
    return Result(
        title=job.title(),
        threads=machine.threads,
        machine=machine.describe() | versions,
        reading=machine.reading,
        multiplying=machine.multiplying,
        numbers={engine.name: engine.numbers for engine in engines},
        cases=[
            Case(
                job.case(size),
                job.cost(size),
                job.tokens(size),
                {name: [s / job.units for s in times] for name, times in seconds[size].items()},
            )
            for size in job.sizes
        ],
    )


def check_agreement(engines: Sequence[Engine], sizes: Sequence[int], dtype: str) -> None:
    """Run each engine once, which warms it up; raise BackendError if its result differs.

    This sees that all do the same work. It is a quick look, and not a check by bounds.
    """
    for size in sizes:
        first = None
        for engine in engines:
            result = engine.to_numpy(engine.prepare(size)())
            numbers = np.asarray(result, np.float64).ravel()
            if first is None:
                first = numbers
            same_size = numbers.size == first.size
            off = np.linalg.norm(numbers - first) / np.linalg.norm(first) if same_size else np.inf
            if not off <= TOLERANCES[dtype]:
                raise BackendError(
                    f"{engine.name}: does other work at size {size}: expected the result of "
                    f"{engines[0].name} within {TOLERANCES[dtype]:g}, got {off:.2g} off"
                )


def run_rounds(
    engines: Sequence[Engine],
    sizes: Sequence[int],
    *,
    rounds: int,
    timed: Callable[[Callable[[], object]], float],
    settle: Callable[[], None],
    between: Callable[[], None],
) -> dict[int, dict[str, list[float]]]:
    """Time every engine once in each round, at each size.

    The engine that goes first changes from round to round, so that a change of the machine's
    speed falls on all of them. `settle` is called before each turn, since threads of the engine
    before spin for a while when their work is done; `between` is called before each round.

    Returns the seconds of each call, by size and name, in the order of the rounds.
    """
    found: dict[int, dict[str, list[float]]] = {
        size: {engine.name: [] for engine in engines} for size in sizes
    }
    for number in range(rounds):
        between()
        first = number % len(engines)
        for size in sizes:
            for engine in (*engines[first:], *engines[:first]):
                settle()
                call = engine.prepare(size)
                found[size][engine.name].append(timed(call))
    return found
