"""A check's report as one page that needs nothing else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from llama_layers.errors import escaped, one_line
from llama_layers.files.output import check_output, write_atomically
from llama_layers.verify.html_pictures import anchors, histogram, site_map
from llama_layers.verify.html_style import STYLE
from llama_layers.verify.layout import apart, figure
from llama_layers.verify.report import SITE_VERDICTS, Element, Report, SiteResult
from llama_layers.verify.summary import RoleSummary, by_role, grouped
from llama_layers.verify.text import (
    LEGEND,
    UNEXPLAINED,
    UNLOCATED,
    headline,
    is_unexplained,
    missing_sites,
    notes,
    role_name,
    roles_and_layers,
    so_computed,
)

# How many roles show their worst elements without a click.
_OPEN = 3


def to_html(report: Report, /) -> str:
    """A report as a page: one file that loads nothing and runs no script.

    Parameters
    ----------
    report : Report
        What `check` found.

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
    verdict = report.verdict
    parts = [
        f'<h1><span class="badge">{verdict}</span> {escape(headline(report)[len(verdict) + 2 :])}'
        "</h1>",
        *_first(report),
        *site_map(report.results),
        *_roles(report.results),
        *_remarks(report),
        *_worst(report.results),
        *_every(report.results),
        *_origin(report),
    ]
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{verdict}: check of a trace</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            *parts,
            "</body>",
            "</html>",
            "",
        )
    )


def write_html(report: Report, path: str | os.PathLike[str], /, *, force: bool = False) -> None:
    """Write a report as a page, whole or not at all.

    Parameters
    ----------
    report : Report
        What `check` found.
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

    def write(temporary: Path) -> None:
        temporary.write_text(page, encoding="utf-8")

    write_atomically(file, write)


def _first(report: Report) -> Iterator[str]:
    """The first failure, and what explains it."""
    first = report.first
    if first is None:
        return
    yield '<section class="panel">'
    yield from _likely(report, first)
    yield from _facts(
        {
            "site": first.site.name,
            "recomputed from": ", ".join(first.inputs) or "input_ids",
            "shape": str(list(first.shape)),
            "computed in": f"{first.dtype}, sums in {first.accumulate}",
            "failing sites": ", ".join(roles_and_layers(r.site for r in report.failures)),
        }
    )
    if first.worst:
        yield "<h3>Its worst elements</h3>"
        yield from _elements(first.worst)
    yield "</section>"


def _likely(report: Report, first: SiteResult) -> Iterator[str]:
    if is_unexplained(report, first):
        yield f"<p>{UNEXPLAINED}</p>"
    for i, explanation in enumerate(first.explanations):
        yield f"<h3>{'Or' if i else 'Likely cause'}: {escape(explanation.name)}</h3>"
        yield f"<p>{escape(explanation.detail)}</p>"
        yield f'<p class="dim">{so_computed(first, explanation)}</p>'
    if first.judgement is None:
        yield f"<p>{UNLOCATED}</p>"


def _facts(facts: dict[str, str]) -> Iterator[str]:
    yield "<dl>"
    for name, fact in facts.items():
        yield f"<dt>{escape(name)}</dt><dd><code>{escape(fact)}</code></dd>"
    yield "</dl>"


def _elements(elements: Iterable[Element]) -> Iterator[str]:
    rows = []
    for element in elements:
        port, exact = apart(element.computed, element.exact)
        error = abs(element.computed - element.exact)
        ratio = error / element.limit if element.limit else math.inf if error else 0.0
        rows.append([str(list(element.index)), port, exact, figure(element.limit), figure(ratio)])
    yield from _table(("element", "port", "exact", "allowed error", "error/limit"), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Iterator[str]:
    """A table of plain text; the columns after some are numbers, to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ("num" if i < left else "num right" for i in range(len(cells)))
        return "".join(
            f'<{tag} class="{side}">{escape(cell)}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        )

    yield '<div class="scroll"><table class="lines">'
    yield f"<thead><tr>{line('th', heads)}</tr></thead><tbody>"
    yield from (f"<tr>{line('td', row)}</tr>" for row in rows)
    yield "</tbody></table></div>"


def _roles(results: Sequence[SiteResult]) -> Iterator[str]:
    """A line for each kind of site, with how its errors are spread over all layers."""
    summaries = by_role(results)
    if not summaries:
        return
    histograms = grouped((r for r in results if r.histogram), lambda result: result.site.role)
    yield "<h2>How errors are spread</h2>"
    yield (
        '<p class="dim">All elements of all layers, by error over limit, on log scales; the dashed '
        f"line is the limit. {LEGEND}</p>"
    )
    heads = ("site", "verdicts", "error/limit", "error/usual", "worst layer", "histogram")
    yield '<div class="scroll"><table class="lines"><thead><tr>'
    yield "".join(f"<th>{head}</th>" for head in heads)
    yield "</tr></thead><tbody>"
    for summary in summaries:
        found = histograms.get(summary.role, [])
        counts = [sum(bins) for bins in zip(*(r.histogram for r in found), strict=True)]
        cells = "".join(f'<td class="num">{escape(cell)}</td>' for cell in _numbers(summary))
        yield f"<tr>{cells}<td>{histogram(counts) if counts else ''}</td></tr>"
    yield "</tbody></table></div>"


def _numbers(summary: RoleSummary) -> list[str]:
    verdicts = [f"{summary.counts[v]} {v}" for v in SITE_VERDICTS if summary.counts[v]]
    ratios, layer = ["", ""], None
    if summary.worst is not None and summary.worst.judgement is not None:
        ratios[0], layer = figure(summary.worst.judgement.ratio), summary.worst.site.layer
    if summary.usual is not None and summary.usual.judgement is not None:
        ratios[1] = figure(summary.usual.judgement.usual_ratio)
    return [
        role_name(summary.role), ", ".join(verdicts), *ratios, "" if layer is None else str(layer)
    ]  # fmt: skip


def _remarks(report: Report) -> Iterator[str]:
    said = [*notes(report), *missing_sites(report)]
    if said:
        yield "<h2>Notes</h2>"
        yield from (f"<p>{escape(remark)}</p>" for remark in said)


def _worst(results: Sequence[SiteResult]) -> Iterator[str]:
    """The worst elements of the worst layer for each kind of site."""
    targets = anchors(results)
    if not results:
        return
    yield "<h2>Worst elements</h2>"
    shown = 0
    for summary in by_role(results):
        worst = summary.worst or summary.farthest
        assert worst is not None  # each role has a site
        opened = worst.verdict == "FAIL" and shown < _OPEN
        shown += opened
        yield f"<details{' open' if opened else ''}>"
        yield f"<summary>{escape(worst.site.name)}: {worst.verdict}</summary>"
        yield f'<div id="{targets[summary.role]}">'  # inside, since a link to it opens it then
        yield f"<p>{escape(worst.note)}</p>" if worst.note else ""
        if worst.worst:
            yield from _elements(worst.worst)
        yield "</div></details>"


def _every(results: Sequence[SiteResult]) -> Iterator[str]:
    if not results:
        return
    yield f"<h2>All sites</h2><details><summary>{len(results)} sites</summary>"
    rows = []
    for result in results:
        judgement = result.judgement
        ratios = (
            ["", "", ""]
            if judgement is None
            else [
                figure(judgement.ratio),
                figure(judgement.usual_ratio),
                str(list(judgement.index)),
            ]
        )
        rows.append([result.site.name, result.verdict, *ratios, figure(result.difference)])
    heads = ("site", "verdict", "error/limit", "error/usual", "at", "difference of the whole")
    yield from _table(heads, rows, left=2)
    yield "</details>"


def _origin(report: Report) -> Iterator[str]:
    """What the trace says of itself, and how it was checked."""
    yield "<h2>The check</h2>"
    yield from _facts(
        {
            "weights": report.weights or "not said",
            "further roundings": report.profile,
            "seconds": f"{report.seconds:.1f}",
        }
    )
    if report.metadata:
        yield "<h2>What the trace says of itself</h2>"
        yield from _facts(
            {one_line(name): escaped(_laid_out(text)) for name, text in report.metadata.items()}
        )


def _laid_out(text: str) -> str:
    """JSON with spaces that lines can be broken at; other text as it is."""
    try:
        return json.dumps(json.loads(text)) if text.startswith("{") else text
    except (ValueError, RecursionError):
        return text
