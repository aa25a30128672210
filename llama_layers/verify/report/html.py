"""A report's blocks as one page that needs nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from llama_layers.files.output import check_output, write_atomically
from llama_layers.verify.report.comparison import Comparison
from llama_layers.verify.report.report import Report
from llama_layers.verify.report.template import render


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
    return render("report", report.blocks())


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
