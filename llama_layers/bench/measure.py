"""A job, measured: contestants in turns, with the machine's limits probed in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from llama_layers.bench.agreement import check_agreement
from llama_layers.bench.contestants import PEERS, contestants
from llama_layers.bench.job import Job
from llama_layers.bench.machine import Machine
from llama_layers.bench.result import Case, Result
from llama_layers.bench.rounds import run_rounds
from llama_layers.bench.threads import available_threads


def measure(
    job: Job,
    names: Sequence[str],
    *,
    machine: Machine,
    rounds: int,
    progress: Callable[[], None] = lambda: None,
) -> Result:
    """Time ourselves and some peers.

    Parameters
    ----------
    job : QKVJob or ModelJob
        What to compute, with weights on the machine.
    names : sequence of str
        The peers, of `contestants.PEERS`.
    machine : Machine
        What computes it.
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
    with ExitStack() as closing:
        closing.enter_context(machine.reserved())
        taking_part = contestants(names, job, machine.threads or available_threads(), closing)
        check_agreement(taking_part, job.sizes, job.dtype)

        def between() -> None:
            progress()
            machine.rest()
            machine.probe()

        seconds = run_rounds(
            taking_part,
            job.sizes,
            rounds=rounds,
            timed=machine.timed,
            rest=machine.rest,
            between=between,
        )
    packages: dict[str, str] = {}
    for name in names:
        packages |= PEERS[name].versions()
    reading, multiplying = machine.limits()
    return Result(
        title=job.title(),
        threads=machine.threads,
        machine=machine.facts() | packages,
        reading=reading,
        multiplying=multiplying,
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
