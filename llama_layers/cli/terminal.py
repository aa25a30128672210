"""The terminal that results are printed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.theme import Theme

# Lines longer than this are hard to read.
_WIDEST = 100


class Terminal(Console):
    """A rich console that leaves a reader's early end to the command line.

    Rich itself exits with 1 then, which here means that something diverged.
    """

    def on_broken_pipe(self) -> NoReturn:
        """Raise BrokenPipeError."""
        raise BrokenPipeError


class _Verdicts(RegexHighlighter):
    """Verdicts in colour, which say nothing that the words do not."""

    highlights = (
        r"\b(?P<good>PASS|AGREE)\b",
        r"\b(?P<doubtful>WARN|NONE)\b",
        r"\b(?P<bad>FAIL|DIFFERS|DIVERGE)\b",
        r"(?m)^(?P<cause>Likely cause: .*)$",
    )


_THEME = Theme({"good": "green", "doubtful": "yellow", "bad": "bold red", "cause": "bold"})


def print_report(text: Callable[[int], str]) -> None:
    """Print a report as wide as the terminal, with its verdicts in colour."""
    console = Terminal(theme=_THEME)
    report = _Verdicts()(text(min(console.width, _WIDEST)))
    console.print(report, soft_wrap=True)
