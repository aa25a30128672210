"""Open thousands of files that are wrong, and call functions with arguments that do not fit.

    python tests/fuzz --seed 0 --count 10000 checkpoints ggufs tokenizer_files traces
    python tests/fuzz --seconds 10

The kinds run at once, as many as there are cores. An input must be refused by a ValueError, a
TypeError or an OSError, or read as an independent reader reads it; within two seconds, and within
ten times its size of memory. What fails is printed with the seed that makes it again. The exit
status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

KINDS = "checkpoints ggufs tokenizer_files traces".split()
FORK = multiprocessing.get_context("fork")
HANG_SECONDS = 2  # of processor time: other processes must not make a file seem slow
SLACK = 100 << 20  # of memory: buffers and caches that no single file accounts for


class Hang(BaseException):
    """Raised within a call that takes too long."""


def main() -> int:
    """Fuzz what was asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=[*KINDS, "api"], metavar="KIND")
    parser.add_argument("--seed", type=int, default=0, help="of the first input (default: 0)")
    parser.add_argument("--count", type=int, default=1000, help="of each kind (default: 1000)")
    parser.add_argument("--seconds", type=float, help="end each kind after this time")
    args = parser.parse_args()
    if unknown := set(args.kinds) - {*KINDS, "api"}:
        parser.error(f"expected {', '.join([*KINDS, 'api'])}, got {', '.join(unknown)}")
    with ProcessPoolExecutor(os.cpu_count(), FORK) as pool:  # a kind has work for one core
        return int(sum(pool.map(partial(failures, args=args), args.kinds)) > 0)


def failures(kind: str, args: argparse.Namespace) -> int:
    """Fuzz one kind in a process of its own, or several if inputs end it; how many failed."""
    if kind == "api":
        return api_failures(args)
    done, accepted = FORK.Value("q", args.seed), FORK.Value("q", 0)
    failed, start = FORK.Value("q", 0), time.monotonic()
    ends = None if args.seconds is None else start + args.seconds
    while done.value < args.seed + args.count and (ends is None or time.monotonic() < ends):
        child = FORK.Process(
            target=_fuzz, args=(kind, args.seed + args.count, ends, done, accepted, failed)
        )
        child.start()
        child.join()
        if child.exitcode:  # the input ended the process
            print(f"{kind} --seed {done.value}: exit status {child.exitcode}", flush=True)
            failed.value += 1
            done.value += 1
    print(
        f"{kind}: {done.value - args.seed} inputs, {accepted.value} accepted, "
        f"{failed.value} failed, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return failed.value


def api_failures(args: argparse.Namespace) -> int:
    """Call public functions, with the compiled bodies and without; how many calls failed."""
    from tests.fuzz import api

    start, done, found = time.monotonic(), 0, 0
    while done < args.count and (args.seconds is None or time.monotonic() < start + args.seconds):
        batch = min(api.BATCH if args.seconds is None else 100, args.count - done)
        problems = api.run(args.seed + done, batch)
        done += batch
        found += len(problems)
        for problem in problems:
            print(f"api {problem}", flush=True)
    print(f"api: {done} calls, {found} failed, {time.monotonic() - start:.0f} s", flush=True)
    return found


def _fuzz(kind: str, stop: int, ends: float | None, done: Any, accepted: Any, failed: Any) -> None:
    module = importlib.import_module(f"tests.fuzz.{kind}")
    signal.signal(signal.SIGPROF, _hang)
    while done.value < stop and (ends is None or time.monotonic() < ends):
        try:
            accepted.value += one(module, done.value)
        except BaseException as error:  # among them what is not an Exception: a panic, a hang
            if isinstance(error, KeyboardInterrupt):
                raise
            failed.value += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(
                f"{kind} --seed {done.value}: {type(error).__name__}: {str(error)[:300]!r} "
                f"({Path(where.filename).name}:{where.lineno})",
                flush=True,
            )
        done.value += 1


def one(module: Any, seed: int) -> bool:
    """Make an input and run it; whether it was accepted."""
    directory = Path(mkdtemp())
    try:
        path = module.mutated(np.random.default_rng(seed), directory)
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
        try:
            accepted = module.run(path)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        assert grown <= 10 * size + SLACK, f"{grown >> 20} MiB for a file of {size} bytes"
        return bool(accepted)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _hang(*_: object) -> None:
    raise Hang(f"over {HANG_SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())
