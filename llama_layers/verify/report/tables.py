"""The results of a check as tables, a map and remarks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from llama_layers.verify.report.blocks import Cell, Elements, Map, Table
from llama_layers.verify.report.results import SITE_VERDICTS, Element, SiteResult, SiteVerdict
from llama_layers.verify.report.wording import (
    apart,
    counted,
    ended,
    figure,
    grouped,
    layer_of,
    layer_ranges,
    role_name,
    roles_and_layers,
)

LEGEND = (
    "Above 1, rounding cannot explain the error. "
    "A result that is rounded once, such as a sum, can reach 1.00."
)
# How many roles show their worst elements without a click.
_OPEN = 3
# At how many places sites are told to be wrong; the table of all sites has the others.
_PLACES = 8


def role_tables(results: Iterable[SiteResult]) -> Iterator[Table]:
    """Make a line for each role: in one table those with limits, in another those without."""
    judged = [result for result in results if result.judgement is not None]
    others = [result for result in results if result.judgement is None]
    if judged:
        verdicts, roles = _verdicts(judged), _by_role(judged)
        rows = [["site", *verdicts, "error/limit", "error/usual", "layer"]]
        for role, found in roles.items():
            worst, usual = _worst(found), max(found, key=lambda result: result.usual_ratio)
            warns = worst.ratio <= 1 < usual.usual_ratio  # then the layer that warns is told
            ratios = (figure(worst.ratio), figure(usual.usual_ratio))
            layer = layer_of((usual if warns else worst).site)
            rows.append([role_name(role), *_counts(found, verdicts), *ratios, layer])
        yield Table(rows, remark=LEGEND, histograms=list(map(_histogram, roles.values())))
    if others:
        verdicts, roles = _verdicts(others), _by_role(others)
        rows = [["without recorded inputs", *verdicts, "difference", "our own run", "layer"]]
        for role, found in roles.items():
            worst = _worst(found)
            difference = "unknown" if math.isnan(worst.difference) else figure(worst.difference)
            own = "" if worst.yardstick is None else figure(worst.yardstick)
            counts = _counts(found, verdicts)
            rows.append([role_name(role), *counts, difference, own, layer_of(worst.site)])
        yield Table(rows)


def _by_role(results: Iterable[SiteResult]) -> dict[str, list[SiteResult]]:
    return grouped(results, lambda result: result.site.inside)


def _verdicts(results: Iterable[SiteResult]) -> list[SiteVerdict]:
    found = {result.verdict for result in results}
    return [verdict for verdict in SITE_VERDICTS if verdict in found]


def _counts(results: Iterable[SiteResult], verdicts: Iterable[SiteVerdict]) -> list[str]:
    counts = Counter(result.verdict for result in results)
    return [str(counts[verdict] or "") for verdict in verdicts]


def _worst(results: Sequence[SiteResult]) -> SiteResult:
    """Return the result with the largest error over its limit, or else the largest difference."""
    judged = [result for result in results if result.judgement is not None]
    if judged:
        return max(judged, key=lambda result: (result.verdict == "FAIL", result.ratio))
    return max(results, key=lambda r: -1.0 if math.isnan(r.difference) else r.difference)


def _histogram(results: Iterable[SiteResult]) -> list[int]:
    histograms = [result.histogram for result in results if result.histogram]
    return [sum(counts) for counts in zip(*histograms, strict=True)]


def site_table(results: Iterable[SiteResult]) -> Table:
    """Make a line for each site."""
    rows = [["site", "verdict", "error/limit", "error/usual", "difference", "at", "wrong"]]
    for result in results:
        ratio = usual_ratio = at = ""
        if result.judgement is not None:
            ratio, usual_ratio = figure(result.ratio), figure(result.usual_ratio)
            at = str(list(result.judgement.index))
        difference = figure(result.difference)
        wrong = "" if result.place is None else str(result.place)
        rows.append([result.site.name, result.verdict, ratio, usual_ratio, difference, at, wrong])
    return Table(rows, left=(0, 1, 5, 6), long=True)


def site_map(results: Sequence[SiteResult]) -> Map:
    """Make a map of all sites by role and layer."""
    layers = sorted({r.site.layer for r in results if r.site.layer is not None})
    rows: dict[str, list[Cell | None]] = {}
    for role, found in _by_role(results).items():
        by_layer = {result.site.layer: _cell(result) for result in found}
        rows[role] = [by_layer[None]] if None in by_layer else [by_layer.get(i) for i in layers]
    return Map(layers, rows)


def _cell(result: SiteResult) -> Cell:
    ratio, said = None, f"difference {figure(result.difference)}"
    if result.judgement is not None:
        ratio = result.ratio
        said = f"error/limit {figure(ratio)} at {list(result.judgement.index)}"
    if result.place is not None:
        said += f"; wrong: {result.place}"
    return Cell(result.verdict, ratio, f"{result.site.name}: {result.verdict}, {said}")


def worst_elements(results: Iterable[SiteResult]) -> Iterator[Elements]:
    """Show the worst elements of the worst layer of each role."""
    shown = 0
    for role, found in _by_role(results).items():
        worst = _worst(found)
        opened = worst.verdict == "FAIL" and shown < _OPEN
        shown += opened
        title, rows = f"{worst.site.name}: {worst.verdict}", element_rows(worst.worst)
        where = "" if worst.place is None else f"Wrong: {ended(str(worst.place))} "
        yield Elements(title, rows, f"{where}{worst.note}", role, opened)


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


def places(failures: Iterable[SiteResult]) -> Iterator[str]:
    """Say where sites are wrong, once for those that are wrong at the same places."""
    placed = ((result, result.place) for result in failures if result.place is not None)
    found = grouped(placed, lambda pair: (pair[0].verdict, pair[1].words))
    for (verdict, words), pairs in list(found.items())[:_PLACES]:
        yield f"{verdict} {roles_and_layers(result.site for result, _ in pairs)}: {ended(words)}"
    if more := sum(map(len, list(found.values())[_PLACES:])):
        yield f"{counted(more, 'more site')} at other places."


def missing_sites(results: Iterable[SiteResult], missing: Iterable[str]) -> Iterator[str]:
    """Say which sites were not recorded, in a line for all roles that lack the same layers."""
    split = [site_and_layer(name) for name in missing]
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


def site_and_layer(name: str) -> tuple[int | None, str]:
    """Split the name of a site into its layer and its role."""
    if not name.startswith("model.layers."):
        return None, name
    number, _, role = name.removeprefix("model.layers.").partition(".")
    return int(number), role or "layer"
