"""A comparison as plain text: the verdict first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from llama_layers.verify.comparison import SUSPECT, Comparison, SiteDifference
from llama_layers.verify.layout import counted, figure, table, wrapped
from llama_layers.verify.summary import grouped
from llama_layers.verify.text import role_name, roles_and_layers


def comparison_text(comparison: Comparison, *, every: bool, width: int) -> str:
    """All of a comparison: `Comparison.text` says what the arguments are."""
    parts = [
        wrapped(headline(comparison), width),
        _suspects(comparison, width),
        _roles(comparison),
        _sites(comparison) if every else "",
        "\n".join(wrapped(line, width) for line in _remarks(comparison)),
    ]
    return "\n\n".join(part for part in parts if part)


def headline(comparison: Comparison) -> str:
    """The verdict and the first suspect, or else the largest difference, in a sentence."""
    first = comparison.first
    if first is not None:
        return f"DIVERGE: first at {first.site.name}: {what_is_wrong(first)}"
    sites = counted(len(comparison.results), "site")
    if all(result.identical for result in comparison.results):
        return f"AGREE: {sites}, bitwise equal"
    largest = max(comparison.results, key=lambda result: result.difference)
    amplifies = max(comparison.results, key=lambda result: result.factor)
    return (
        f"AGREE: {sites}; the largest difference is "
        f"{figure(largest.difference)}, at {largest.site.name}; none differs by more than "
        f"{figure(amplifies.factor)} times what it inherits and may round"
    )


def what_is_wrong(result: SiteDifference) -> str:
    """How far a suspect differs, in words."""
    if math.isinf(result.difference) and result.odd:
        return f"NaN or Inf in one trace and not in the other; inputs: {', '.join(result.inputs)}"
    return (
        f"difference {figure(result.difference)}, {figure(result.factor)} times what it inherits "
        f"from {', '.join(result.inputs)} ({figure(result.inherited)}) and may round "
        f"({figure(result.roundoff)})"
    )


def _suspects(comparison: Comparison, width: int) -> str:
    suspects = comparison.suspects
    if not suspects:
        return ""
    if len(suspects) == 1:
        return "No other site is suspect."
    where = ", ".join(roles_and_layers(suspect.site for suspect in suspects))
    return wrapped(f"{len(suspects)} sites are suspect: {where}.", width)


def _roles(comparison: Comparison) -> str:
    """A line for each role, with its largest difference and the site that adds the most."""
    rows = [["site", "sites", "suspect", "difference", "layer", "factor", "layer"]]
    for role, results in grouped(comparison.results, lambda r: r.site.role).items():
        largest = max(results, key=lambda result: result.difference)
        amplifies = max(results, key=lambda result: result.factor)
        rows.append(
            [
                role_name(role),
                str(len(results)),
                str(sum(result.suspect for result in results) or ""),
                figure(largest.difference),
                _layer(largest),
                figure(amplifies.factor),
                _layer(amplifies),
            ]
        )
    return table(rows)


def _layer(result: SiteDifference) -> str:
    return "" if result.site.layer is None else str(result.site.layer)


def _sites(comparison: Comparison) -> str:
    """A line for each site."""
    rows = [["site", "suspect", "difference", "inherited", "added", "factor"]]
    for result in comparison.results:
        numbers = (result.difference, result.inherited, result.added, result.factor)
        rows.append([result.site.name, "yes" if result.suspect else "", *map(figure, numbers)])
    return table(rows)


def _remarks(comparison: Comparison) -> Iterator[str]:
    """What else is to be known."""
    dtypes = grouped(comparison.results, lambda result: result.dtypes)
    yield (
        "Computed in "
        + "; ".join(
            (a if a == b else f"{a} and {b}")
            + (f" at {counted(len(results), 'site')}" if len(dtypes) > 1 else "")
            for (a, b), results in dtypes.items()
        )
        + "."
    )
    odd = [result for result in comparison.results if result.odd and not result.suspect]
    if odd:
        where = ", ".join(roles_and_layers(result.site for result in odd))
        yield f"NaN or Inf at {counted(len(odd), 'site')}, alike in both or inherited: {where}."
    if not comparison.same_tokens:
        yield "Not both traces have input_ids: they were taken to be of the same tokens."
    for which, names in (("first", comparison.only_a), ("second", comparison.only_b)):
        if names:
            yield f"Only in the {which} trace: {_names(names)}."
    yield (
        f"A suspect differs by more than {SUSPECT:g} times what it inherits and may round. That is "
        "experience, and no bound: check, with a model, has one for each element."
    )


def _names(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
