"""The pictures of a report's page: the map of all sites, and histograms."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from llama_layers.verify.layout import figure
from llama_layers.verify.report import EDGES, SITE_VERDICTS, SiteResult
from llama_layers.verify.summary import grouped
from llama_layers.verify.text import role_name

# What stands in the cell of a site.
_MARKS = {"PASS": "", "WARN": "!", "FAIL": "\u00d7", "SEEN": "\u25cb", "DIFFERS": "\u2260"}
_MEANINGS = {
    "PASS": "PASS: within what rounding allows",
    "WARN": "WARN: an engine's known rounding, or more than usual",
    "FAIL": "FAIL: beyond what rounding allows",
    "SEEN": "SEEN: inputs not recorded, differs as our own run does",
    "DIFFERS": "DIFFERS: inputs not recorded, differs by far more",
}


def bin_of(ratio: float) -> int:
    """The bin of an error over its limit; what is not a number is in the last."""
    return len(EDGES) if math.isnan(ratio) else bisect_left(EDGES, ratio)


def site_map(results: Sequence[SiteResult]) -> Iterator[str]:
    """Layers across, sites down, the largest error over its limit as the colour."""
    if not results:
        return
    layers = sorted({r.site.layer for r in results if r.site.layer is not None})
    roles = grouped(results, lambda result: result.site.role)
    targets = anchors(results)
    yield "<h2>Error over limit, by site and layer</h2>"
    yield from _legend(results)
    yield '<div class="scroll"><table class="map">'
    heads = "".join(f'<th scope="col">{layer}</th>' for layer in layers)
    yield f"<thead><tr><th></th>{heads}</tr></thead><tbody>"
    for role, found in roles.items():
        yield f'<tr><th scope="row">{escape(role_name(role))}</th>'
        if found[0].site.layer is None:
            yield _cell(found[0], targets[role], max(1, len(layers)))
        else:
            of_layer = {result.site.layer: result for result in found}
            for layer in layers:
                result = of_layer.get(layer)
                yield '<td class="none"></td>' if result is None else _cell(result, targets[role])
        yield "</tr>"
    yield "</tbody></table></div>"


def _cell(result: SiteResult, anchor: str, span: int = 1) -> str:
    judgement = result.judgement
    if judgement is None:
        shade, number = "unjudged", f"difference {figure(result.difference)}"
    else:
        shade = f"b{bin_of(judgement.ratio)}"
        number = f"error/limit {figure(judgement.ratio)} at {list(judgement.index)}"
    title = escape(f"{result.site.name}: {result.verdict}, {number}")
    mark = _MARKS[result.verdict]
    content = f'<a href="#{anchor}">{mark}</a>' if mark else ""
    colspan = f' colspan="{span}"' if span > 1 else ""
    return f'<td class="{shade}" title="{title}"{colspan}>{content}</td>'


def anchors(results: Iterable[SiteResult]) -> dict[str, str]:
    """What the worst elements of a role are reached by."""
    roles = grouped(results, lambda result: result.site.role)
    return {role: f"role-{i}" for i, role in enumerate(roles)}


def _legend(results: Sequence[SiteResult]) -> Iterator[str]:
    edges = [f"{edge:g}" for edge in EDGES]
    labels = [edges[0], *(f"\u2264 {edge}" for edge in edges[1:]), f"> {edges[-1]}"]
    scale = "".join(f'<span class="b b{i}">{label}</span>' for i, label in enumerate(labels))
    yield f'<div class="legend"><span>{scale}</span></div>'
    found = {result.verdict for result in results}
    marks = (
        f"<span><b>{_MARKS[verdict] or 'no mark'}</b> {_MEANINGS[verdict]}</span>"
        for verdict in SITE_VERDICTS
        if verdict in found
    )
    yield f'<div class="legend">{"".join(marks)}</div>'


def histogram(counts: Sequence[int]) -> str:
    """Bars, one a bin, with heights on a log scale, so that one wrong element is seen."""
    width, height, most = 18, 34, math.log1p(max(counts))
    bars = []
    for i, count in enumerate(counts):
        tall = height * math.log1p(count) / most if most else 0.0
        over = f"over {EDGES[-1]:g}" if i == len(EDGES) else f"up to {EDGES[i]:g}"
        bars.append(
            f'<rect class="bar b{i}" x="{i * width + 1}" y="{height - tall:.1f}" '
            f'width="{width - 2}" height="{tall:.1f}"><title>{count} elements {over}</title></rect>'
        )
    limit = width * (EDGES.index(1.0) + 1)
    return (
        f'<svg width="{width * len(counts)}" height="{height + 2}" role="img" '
        f'aria-label="{", ".join(map(str, counts))} elements">'
        f'{"".join(bars)}<line class="limit" x1="{limit}" x2="{limit}" y1="0" '
        f'y2="{height + 2}"/></svg>'
    )
