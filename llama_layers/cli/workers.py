"""Processes that take a part of the work, for ``--jobs``."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Executor

# What sets the number of threads of BLAS libraries and of numba, before they are loaded.
_THREADS = ("OPENBLAS", "OMP", "MKL", "BLIS", "NUMBA", "VECLIB_MAXIMUM")


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Add --jobs."""
    parser.add_argument(
        "--jobs",
        type=_count,
        default=1,
        metavar="N",
        help="how many processes share the work; each has one thread (default: 1)",
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 10_000):
        raise argparse.ArgumentTypeError(f"expected a positive number of processes, got {text!r}")
    return int(text)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C for a moment, and for good in processes that are started meanwhile."""
    if threading.current_thread() is not threading.main_thread():  # where Python forbids it
        yield
        return
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _begin() -> None:
    """Let a worker leave Ctrl-C, which a terminal sends to all, to the command, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_command, daemon=True).start()


def _end_with_command() -> None:
    """Wait until the process that began this one has ended, if only by SIGKILL, and end."""
    from multiprocessing import parent_process

    command = parent_process()
    assert command is not None  # this is a worker
    command.join()
    os._exit(1)


@contextmanager
def workers(count: int, module: str) -> Iterator[Executor | None]:
    """Give processes that import a module, which they start to do now; None where one is enough.

    They are not forked from this one, whose threads might hold locks.
    """
    if count == 1:
        yield None
        return
    from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
    from multiprocessing import active_children, get_all_start_methods, get_context

    usual = {name: os.environ.get(name) for name in (f"{of}_NUM_THREADS" for of in _THREADS)}
    os.environ.update(dict.fromkeys(usual, "1"))
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    try:
        if method == "forkserver":
            from multiprocessing import forkserver

            forkserver.set_forkserver_preload([module])
            with _interrupts_ignored():
                forkserver.ensure_running()
        with ProcessPoolExecutor(count, get_context(method), initializer=_begin) as pool:
            try:
                yield pool
            except KeyboardInterrupt:
                for process in active_children():  # which would finish what they have begun
                    process.terminate()
                raise
    except BrokenExecutor:
        raise ChildProcessError(
            "--jobs: one of the processes ended before its work was done: killed, perhaps because "
            "memory was short"
        ) from None
    finally:
        for name, value in usual.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
