"""A job, measured: contestants in turns, with the machine's limits probed in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from llama_layers.bench.agreement import check_agreement
from llama_layers.bench.contestants import PEERS, contestants
from llama_layers.bench.job import Job
from llama_layers.bench.limits import Probe
from llama_layers.bench.machine import load, machine
from llama_layers.bench.result import Case, Limit, Result
from llama_layers.bench.rounds import run_rounds
from llama_layers.bench.threads import Threads

# OpenBLAS's idle threads spin for about 0.1 s before they sleep, and take a core from others.
REST = 0.15
# What the limits are probed with: more than caches hold, and matrices that they do hold.
READ_BYTES = 256 << 20
SQUARE = 1024


def measure(
    job: Job,
    names: Sequence[str],
    *,
    threads: int,
    rounds: int,
    progress: Callable[[], None] = lambda: None,
) -> Result:
    """Time ourselves and some peers.

    Parameters
    ----------
    job : QKVJob or ModelJob
        What to compute.
    names : sequence of str
        The peers, of `contestants.PEERS`.
    threads : int
        Of each of them.
    rounds : int
        How often each is timed, at each size.
    progress : callable, optional
        Called before each round.

    Returns
    -------
    Result
        What was found.

    Raises
    ------
    BackendError
        If a contestant does other work.
    """
    pool, before = Threads(threads), load()
    with ExitStack() as closing:
        closing.enter_context(pool.applied())
        taking_part = contestants(names, job, threads, closing)
        check_agreement(taking_part, job.sizes, job.dtype)
        probe = Probe(pool, time.perf_counter, READ_BYTES, SQUARE)

        def between() -> None:
            progress()
            time.sleep(REST)
            probe()

        seconds = run_rounds(
            taking_part,
            job.sizes,
            rounds=rounds,
            clock=time.perf_counter,
            rest=lambda: time.sleep(REST),
            between=between,
        )
    packages: dict[str, str] = {}
    for name in names:
        packages |= PEERS[name].versions()
    return Result(
        title=job.title(),
        threads=threads,
        machine=machine(pool, packages) | before,
        reading=Limit("dot products over an array that no cache holds", probe.reading),
        multiplying=Limit(
            f"float32 products of {SQUARE} x {SQUARE} matrices in NumPy",
            probe.multiplying,
        ),
        numbers={contestant.name: contestant.numbers for contestant in taking_part},
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
