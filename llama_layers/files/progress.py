"""Progress of long work, on stderr, where somebody may be watching."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int, *, count: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar, and give a function to call with what was done since the last call.

    That is a number of bytes, or of items if `count` is true.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    done_of_all = (MofNCompleteColumn(),) if count else (DownloadColumn(), TimeRemainingColumn())
    columns = (TextColumn(what), BarColumn(), *done_of_all)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def status(line: str) -> Iterator[None]:
    """Show a line until the work is done."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(line):
        yield


def announce(message: str) -> None:
    """Write a line to stderr, if that is a terminal or a notebook."""
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        print(f"llama_layers: {message}", file=sys.stderr)
