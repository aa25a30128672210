"""Lines and tables of plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def wrapped(text: str, width: int) -> str:
    """A paragraph whose lines but the first are indented. No word is broken."""
    return _filled(text, width, "")


def paragraph(text: str, width: int) -> str:
    """A paragraph whose lines are all indented. No word is broken."""
    return _filled(text, width, "  ")


def _filled(text: str, width: int, first: str) -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Rows with columns as wide as they must be; those named by their places stand to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def figure(number: float) -> str:
    """A ratio or a difference in two digits: 0.41, 17, 1.2e+04; more, where it is just above 1.

    A ratio just below 1 is no near miss: what is rounded correctly comes as near as that.
    """
    if 0.995 <= number < 1:
        return "1.00"
    for digits in range(2, 17):
        text = f"{number:.{digits}g}"
        if text != "1":
            break
    return text


def apart(first: float, second: float) -> tuple[str, str]:
    """Two numbers in so many digits, six at least, that they do not look the same."""
    for digits in range(6, 17):
        texts = f"{first:.{digits}g}", f"{second:.{digits}g}"
        if texts[0] != texts[1]:
            return texts
    return repr(first), repr(second)


def counted(number: int, what: str) -> str:
    """A number of things: 1 site, 2 sites."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
