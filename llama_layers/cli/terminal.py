"""The terminal that results are printed on."""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console


class Terminal(Console):
    """A rich console that leaves a reader's early end to the command line.

    Rich itself exits with 1 then, which here means that something diverged.
    """

    def on_broken_pipe(self) -> NoReturn:
        """Say so."""
        raise BrokenPipeError
