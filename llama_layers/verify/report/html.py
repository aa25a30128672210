"""A report's blocks as one page that needs nothing else."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llama_layers.files.output import check_output, write_atomically
from llama_layers.verify.report.comparison import Comparison
from llama_layers.verify.report.report import Report
from llama_layers.verify.report.results import EDGES
from llama_layers.verify.report.wording import role_name

if TYPE_CHECKING:
    from jinja2 import Template

# The mark in the cell of a site, and its meaning.
_MARKS = {
    "PASS": ("", "within what rounding allows"),
    "WARN": ("!", "an engine's known rounding, or more than usual"),
    "FAIL": ("\u00d7", "beyond what rounding allows"),
    "SEEN": ("\u25cb", "inputs not recorded, differs as our own run does"),
    "DIFFERS": ("\u2260", "inputs not recorded, differs by far more"),
}


def to_html(report: Report | Comparison, /) -> str:
    """Return a report as a page: one file that loads nothing and runs no script.

    Parameters
    ----------
    report : Report or Comparison
        What `check` or `compare` found.

    Returns
    -------
    str
        The page: the first failure and what explains it, a map of all layers and sites, how errors
        are spread, the worst elements, and what the trace says of itself.

    Examples
    --------
    >>> from llama_layers.verify import Report
    >>> to_html(Report(()))[:15]
    '<!DOCTYPE html>'
    """
    return _template().render(blocks=report.blocks())


def write_html(
    report: Report | Comparison, path: str | os.PathLike[str], /, *, force: bool = False
) -> None:
    """Write a report as a page, whole or not at all.

    Parameters
    ----------
    report : Report or Comparison
        What `check` or `compare` found.
    path : str or path
        The file.
    force : bool, optional
        Whether a file that exists may be replaced.

    Raises
    ------
    FileExistsError
        If the file exists, unless `force`.
    FileNotFoundError
        If its directory does not.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from llama_layers.verify import Report, write_html
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_html(Report(()), pathlib.Path(directory, "report.html"))
    """
    file, page = Path(path), to_html(report)
    check_output(file, force)
    write_atomically(file, lambda temporary: temporary.write_text(page, encoding="utf-8"))


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # which take time to load

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {
        "bin_of": bin_of,
        "bin_labels": _bin_labels(),
        "limit_bin": EDGES.index(1.0),
        "heights": _heights,
        "kind_of": lambda block: type(block).__name__.lower(),
        "marks": _MARKS,
        "role_name": role_name,
    }
    return environment.get_template("report.html.j2")


def bin_of(ratio: float) -> int:
    """Return the bin of an error over its limit; the last for NaN."""
    return len(EDGES) if math.isnan(ratio) else bisect_left(EDGES, ratio)


def _bin_labels() -> list[str]:
    first, *edges = (f"{edge:g}" for edge in EDGES)
    return [first, *(f"\u2264 {edge}" for edge in edges), f"> {edges[-1]}"]


def _heights(counts: Sequence[int]) -> list[float]:
    """Return the heights of bars up to 1, on a log scale, so that one wrong element is seen."""
    highest = math.log1p(max(counts))
    return [math.log1p(count) / highest if highest else 0.0 for count in counts]
