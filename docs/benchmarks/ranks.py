"""Two ranks of one thread against one process of two threads: decode and prefill of SmolLM2.

    python docs/benchmarks/ranks.py [--rounds N] [--model smollm2-135m]

The candidates take turns round by round, while the other waits without work. A third row shows one
process of two threads on the path that ranks take, since the compiled kernels for whole layers do
not serve a part of a model. Needs mpi4py and an ``mpiexec``, that of the wheel ``mpich`` for one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from llama_layers import KVCache, forward, load
from llama_layers.bench.machine import load as load_of_machine
from llama_layers.bench.machine import system
from llama_layers.layers.group import Group

PROMPT, TOKENS = 128, 16
MPIEXEC = Path(sys.executable).parent / "mpiexec"


class Alone:
    """A group of one: the path of ranks, without others."""

    rank, size = 0, 1

    def all_reduce(self, array: Any) -> Any:
        return array

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


def asked(group: Group | None) -> str:
    """The next line of stdin, which rank 0 gets and sends to the others: they sleep until then."""
    if group is None or group.size == 1:
        return sys.stdin.readline().strip()
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if group.rank:
        while not world.Iprobe():  # MPI itself would spin, and take a core from the others
            time.sleep(0.001)
        return world.recv()
    line = sys.stdin.readline().strip()
    for rank in range(1, group.size):
        world.send(line, rank)
    return line


def serve(path: str, group: Group | None) -> None:
    """Time what a line of stdin asks for, until there are no more."""
    model = load(path, dtype="float32", parallel=group)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, PROMPT + TOKENS))

    def prefill() -> float:
        meet()
        start = time.perf_counter()
        forward(model, ids[:, :PROMPT], last_only=True)
        return time.perf_counter() - start

    empty = KVCache.create(model, 1, PROMPT + TOKENS)
    filled = forward(model, ids[:, :PROMPT], cache=empty, last_only=True).cache

    def decode() -> float:
        cache = filled  # what comes after the prompt is overwritten each time
        meet()
        start = time.perf_counter()
        for token in range(PROMPT, PROMPT + TOKENS):
            cache = forward(model, ids[:, token : token + 1], cache=cache).cache
        return (time.perf_counter() - start) / TOKENS

    def meet() -> None:
        if group is not None:
            group.gather(None)

    jobs = {"prefill": prefill, "decode": decode}
    while job := asked(group):
        seconds = jobs[job]()
        if group is None or group.rank == 0:
            print(json.dumps(seconds), flush=True)


class Candidate:
    """A process, or ranks, that wait for work."""

    def __init__(self, name: str, threads: int, launcher: list[str], kind: str, path: str) -> None:
        self.name = name
        self._run = subprocess.Popen(
            [*launcher, sys.executable, __file__, "--serve", kind, "--model", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {
                "OMP_NUM_THREADS": str(threads),
                "OPENBLAS_NUM_THREADS": str(threads),
                "NUMBA_NUM_THREADS": str(threads),
            },
        )  # fmt: skip

    def seconds(self, job: str) -> float:
        """How long a job takes, while the others have none."""
        assert self._run.stdin is not None
        assert self._run.stdout is not None
        self._run.stdin.write(job + "\n")
        self._run.stdin.flush()
        return float(json.loads(self._run.stdout.readline()))

    def close(self) -> None:
        """End it."""
        assert self._run.stdin is not None
        self._run.stdin.close()
        self._run.wait()


def main() -> None:
    """Measure, or serve the process that measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--serve", choices=("whole", "alone", "rank"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve == "rank":
        from mpi4py import MPI

        from llama_layers.parallel.mpi import MPIGroup

        serve(args.model, MPIGroup(MPI.COMM_WORLD))
    elif args.serve:
        serve(args.model, Alone() if args.serve == "alone" else None)
    else:
        measure(args.model, args.rounds)


def measure(path: str, rounds: int) -> None:
    """Print a table: seconds of each candidate, best and median."""
    before = load_of_machine()
    candidates = [
        Candidate("one process, 2 threads", 2, [], "whole", path),
        Candidate("the same, without compiled layers", 2, [], "alone", path),
        Candidate("2 ranks, 1 thread each", 1, [str(MPIEXEC), "-n", "2"], "rank", path),
    ]
    jobs = ("decode", "prefill")
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        for candidate in candidates[turn % 3 :] + candidates[: turn % 3]:
            for job in jobs:
                seconds = candidate.seconds(job)
                if turn:  # the first warms up
                    times.setdefault((candidate.name, job), []).append(seconds)
    for candidate in candidates:
        candidate.close()
    print(f"| | decode, ms a token | prefill of {PROMPT}, ms |\n|---|--:|--:|")
    for candidate in candidates:
        cells = [
            f"{1e3 * min(found):.1f} ({1e3 * statistics.median(found):.1f})"
            for found in (times[candidate.name, job] for job in jobs)
        ]
        print(f"| {candidate.name} | {' | '.join(cells)} |")
    print(f"\nBest of {rounds} rounds, and the median; {path}, float32.")
    print(", ".join(f"{name} {text}" for name, text in (system() | before).items()))


if __name__ == "__main__":
    main()
