"""The results of a check as tables, a map and remarks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from llama_layers.verify.report.blocks import Cell, Elements, Map, Table
from llama_layers.verify.report.results import SITE_VERDICTS, Element, SiteResult
from llama_layers.verify.report.roles import RoleSummary, by_role
from llama_layers.verify.report.wording import (
    apart,
    counted,
    figure,
    grouped,
    layer_ranges,
    role_name,
    roles_and_layers,
)

LEGEND = "Beyond 1 no rounding explains it. What is rounded once, as a sum, can reach 1.00."
# How many roles show their worst elements without a click.
_OPEN = 3


def role_tables(results: Sequence[SiteResult]) -> Iterator[Table]:
    """Make a line for each role: in one table those with limits, in another those without."""
    summaries = by_role(results)
    judged = [(s, s.worst, s.usual) for s in summaries if s.worst is not None]
    if judged:
        verdicts = [v for v in SITE_VERDICTS if any(s.counts[v] for s, *_ in judged)]
        rows = [["site", *verdicts, "error/limit", "error/usual", "layer"]]
        rows += [
            [role_name(s.role), *_counts(s, verdicts), *_largest(worst, usual)]
            for s, worst, usual in judged
        ]
        yield Table(rows, remark=LEGEND, histograms=[s.histogram for s, *_ in judged])
    others = [(s, s.farthest) for s in summaries if s.farthest is not None]
    if others:
        verdicts = [v for v in ("SEEN", "DIFFERS") if any(s.counts[v] for s, _ in others)]
        rows = [["without recorded inputs", *verdicts, "difference", "our own run", "layer"]]
        rows += [
            [
                role_name(s.role),
                *_counts(s, verdicts),
                "unknown" if math.isnan(farthest.difference) else figure(farthest.difference),
                "" if farthest.yardstick is None else figure(farthest.yardstick),
                _layer(farthest),
            ]
            for s, farthest in others
        ]
        yield Table(rows)


def _counts(summary: RoleSummary, verdicts: Iterable[str]) -> list[str]:
    return [str(summary.counts[verdict] or "") for verdict in verdicts]


def _largest(worst: SiteResult, usual: SiteResult | None) -> list[str]:
    """Return the largest errors of a role, and the layer to look at: if one warns, that one."""
    assert worst.judgement is not None  # it is the worst of those that have one
    assert usual is not None
    assert usual.judgement is not None
    ratio, usual_ratio = worst.judgement.ratio, usual.judgement.usual_ratio
    return [
        figure(ratio),
        figure(usual_ratio),
        _layer(usual if ratio <= 1 < usual_ratio else worst),
    ]


def _layer(result: SiteResult) -> str:
    return "" if result.site.layer is None else str(result.site.layer)


def site_table(results: Iterable[SiteResult]) -> Table:
    """Make a line for each site."""
    rows = [["site", "verdict", "error/limit", "error/usual", "difference", "at"]]
    for result in results:
        ratio = usual_ratio = at = ""
        if result.judgement is not None:
            ratio, usual_ratio = map(figure, (result.judgement.ratio, result.judgement.usual_ratio))
            at = str(list(result.judgement.index))
        difference = figure(result.difference)
        rows.append([result.site.name, result.verdict, ratio, usual_ratio, difference, at])
    return Table(rows, left=(0, 1, 5), long=True)


def site_map(results: Sequence[SiteResult]) -> Map:
    """Make a map of all sites by role and layer."""
    layers = sorted({r.site.layer for r in results if r.site.layer is not None})
    rows: dict[str, list[Cell | None]] = {}
    for role, found in grouped(results, lambda result: result.site.role).items():
        by_layer = {result.site.layer: _cell(result) for result in found}
        rows[role] = [by_layer[None]] if None in by_layer else [by_layer.get(i) for i in layers]
    return Map(layers, rows)


def _cell(result: SiteResult) -> Cell:
    ratio, said = None, f"difference {figure(result.difference)}"
    if result.judgement is not None:
        ratio = result.judgement.ratio
        said = f"error/limit {figure(ratio)} at {list(result.judgement.index)}"
    return Cell(result.verdict, ratio, f"{result.site.name}: {result.verdict}, {said}")


def worst_elements(results: Iterable[SiteResult]) -> Iterator[Elements]:
    """Show the worst elements of the worst layer of each role."""
    shown = 0
    for summary in by_role(results):
        worst = summary.worst or summary.farthest
        assert worst is not None  # each role has a site
        opened = worst.verdict == "FAIL" and shown < _OPEN
        shown += opened
        yield Elements(
            f"{worst.site.name}: {worst.verdict}",
            element_rows(worst.worst),
            role=summary.role,
            remark=worst.note,
            opened=opened,
        )


def element_rows(elements: Sequence[Element]) -> list[list[str]]:
    """Make a line for each element, below the heads; nothing without elements."""
    rows = [["element", "port", "exact", "allowed error", "error/limit"]] if elements else []
    for element in elements:
        port, exact = apart(element.computed, element.exact)
        limit, ratio = figure(element.limit), figure(element.ratio)
        rows.append([str(list(element.index)), port, exact, limit, ratio])
    return rows


def notes(results: Iterable[SiteResult]) -> Iterator[str]:
    """Say once what is said of several sites, and of which."""
    noted = (result for result in results if result.note)
    for (verdict, note), found in grouped(noted, lambda r: (r.verdict, r.note)).items():
        yield f"{verdict} {roles_and_layers(result.site for result in found)}: {note}."


def missing_sites(results: Iterable[SiteResult], missing: Iterable[str]) -> Iterator[str]:
    """Say which sites were not recorded, in a line for all roles that lack the same layers."""
    split = [_split(name) for name in missing]
    recorded = {result.site.layer for result in results}
    layers = (recorded | {layer for layer, _ in split}) - {None}
    lacking = {
        role: tuple(layer for layer, _ in found if layer is not None)
        for role, found in grouped(split, lambda pair: pair[1]).items()
    }
    for numbers, roles in grouped(lacking, lambda role: lacking[role]).items():
        names = ", ".join(map(role_name, roles))
        if not numbers:
            yield f"Not recorded: {names}."
        elif len(numbers) == len(layers):
            yield f"Not recorded in any of {counted(len(layers), 'layer')}: {names}."
        else:
            yield f"Not recorded in {layer_ranges(numbers)}: {names}."


def _split(name: str) -> tuple[int | None, str]:
    """Split the name of a site into its layer and its role."""
    if not name.startswith("model.layers."):
        return None, name
    number, _, role = name.removeprefix("model.layers.").partition(".")
    return int(number), role or "layer"
