"""Causes of several layers, joined into one: "layer i has the weights of layer i + 1"."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from llama_layers.verify.report.results import SiteResult
from llama_layers.verify.report.wording import listed

# A whole number by itself, or at an end of a run "0..11"; no part of "3.25" or "1e-05".
_NUMBER = re.compile(r"(?<![\w-])(?<!\d\.)\d+(?!\w|\.\d)")


def joined_causes(failures: Sequence[SiteResult]) -> Iterator[str]:
    """Sentences for the likeliest cause of each role, where sites of several layers have it.

    Whole numbers in the words of a cause may go up with the layer.
    """
    by_role: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for result in failures:
        if result.explanations and result.site.layer is not None:
            cause = result.explanations[0]
            by_role[result.site.role, cause.name][result.site.layer] = cause.detail
    for (role, name), details in by_role.items():
        if len(details) < 2:
            continue
        where = f"{name}, at {role} in {_layers(sorted(details))}"
        yield f"{where}: {said}" if (said := _by_layer(details)) else f"{where}."


def _by_layer(details: dict[int, str]) -> str | None:
    """The words that all layers share, with i for a number that is the layer and a constant."""
    layers = list(details)
    templates = {_NUMBER.sub("{}", detail.replace("{", "(")) for detail in details.values()}
    if len(templates) > 1:
        return None
    rows = [[int(n) for n in _NUMBER.findall(detail)] for detail in details.values()]
    words = []
    for numbers in zip(*rows, strict=True):
        if len(set(numbers)) == 1:
            words.append(str(numbers[0]))
            continue
        offsets = {number - layer for number, layer in zip(numbers, layers, strict=True)}
        if len(offsets) > 1:
            return None
        (offset,) = offsets
        words.append(f"i {'-' if offset < 0 else '+'} {abs(offset)}" if offset else "i")
    return templates.pop().format(*words)


def _layers(layers: list[int]) -> str:
    """Numbers of layers, the runs among them by their ends."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    said = [f"{a}-{b}" if b > a else str(a) for a, b in runs]
    return f"layers {' and '.join([listed(said[:-1], 8), said[-1]] if said[:-1] else said)}"
