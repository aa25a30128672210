"""Causes of several layers, joined into one: "layer i has the weights of layer i + 1"."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from llama_layers.layers.sites import Site
from llama_layers.verify.report.results import SiteResult
from llama_layers.verify.report.wording import roles_and_layers

# A whole number by itself, or at an end of a run "0..11"; no part of "3.25" or "1e+06".
_NUMBER = re.compile(r"(?<![\w-])(?<!\d\.)(?<!e\+)\d+(?!\w|\.\d)")


def joined_causes(failures: Sequence[SiteResult]) -> Iterator[str]:
    """Sentences for the likeliest cause of each role, where sites of several layers have it.

    Whole numbers in the words of a cause may go up with the layer. What is told of the first site
    is not told again.
    """
    by_role: dict[tuple[str, str], dict[Site, str]] = defaultdict(dict)
    for result in failures:
        if result.explanations and result.site.layer is not None:
            cause = result.explanations[0]
            by_role[result.site.role, cause.name][result.site] = cause.detail
    told = {(c.name, said) for c in failures[0].explanations[:1] for said in (c.detail, "")}
    places: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for (_, name), details in by_role.items():
        said = _by_layer({site.layer or 0: detail for site, detail in details.items()})
        if len(details) > 1 and (name, said) not in told:
            places[name, said].extend(details)
    for (name, said), where in places.items():
        yield f"{name}, at {roles_and_layers(where)}" + (f": {said}" if said else ".")


def _by_layer(details: dict[int, str]) -> str:
    """The words that all layers share, with i for a number that is the layer and a constant.

    Nothing where they share no words.
    """
    layers = list(details)
    templates = {_NUMBER.sub("{}", detail.replace("{", "(")) for detail in details.values()}
    if len(templates) > 1:
        return ""
    rows = [[int(n) for n in _NUMBER.findall(detail)] for detail in details.values()]
    words = []
    for numbers in zip(*rows, strict=True):
        if len(set(numbers)) == 1:
            words.append(str(numbers[0]))
            continue
        offsets = {number - layer for number, layer in zip(numbers, layers, strict=True)}
        if len(offsets) > 1:
            return ""
        (offset,) = offsets
        words.append(f"i {'-' if offset < 0 else '+'} {abs(offset)}" if offset else "i")
    return templates.pop().format(*words)
