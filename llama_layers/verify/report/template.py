"""The HTML of a report's blocks: a page, or a part of a notebook."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from llama_layers.verify.report.blocks import Block
from llama_layers.verify.report.results import EDGES
from llama_layers.verify.report.wording import role_name

if TYPE_CHECKING:
    from jinja2 import Environment

# The mark in the cell of a site, and its meaning.
_MARKS = {
    "PASS": ("", "within what rounding allows"),
    "WARN": ("!", "an engine's known rounding, or more than usual"),
    "FAIL": ("\u00d7", "beyond what rounding allows"),
    "SEEN": ("\u25cb", "inputs not recorded, differs as our own run does"),
    "DIFFERS": ("\u2260", "inputs not recorded, differs by far more"),
}


def render(name: str, blocks: Sequence[Block]) -> str:
    """Render blocks as HTML: "report" is a page, "notebook" what stands in one."""
    return _templates().get_template(f"{name}.html.j2").render(blocks=blocks)


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # which take time to load

    environment = Environment(
        loader=PackageLoader("llama_layers.verify.report", "."),
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
    return environment


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
