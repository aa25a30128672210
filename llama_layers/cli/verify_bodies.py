"""``llama-layers info --verify``: try every faster body that is here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

from llama_layers.arrays.dispatch import routes
from llama_layers.backends.cupy.detect import gpu_problem
from llama_layers.backends.numba.detect import compiled_problem
from llama_layers.backends.trust import Body, remember, tried
from llama_layers.bench.bodies import times_as_fast


@dataclass(frozen=True)
class Row:
    """The verdict on a body."""

    body: str
    """The name of what it computes; "all" for a route that is not here."""
    route: str
    """What computes it."""
    verdict: Literal["PASS", "FAIL", "not here"]
    """Whether it may be used."""
    error_over_limit: float | None = None
    """The largest of all trials."""
    times_as_fast: float | None = None
    """The time of the definition over its own."""
    problem: str | None = None
    """Why it may not, or is not here."""
    serves: Literal["first", "next"] | None = None
    """Its turn among those that may: next for arguments that the ones before it do not take."""


def verify(as_json: bool) -> int:
    """Try all bodies, remember what was found, and print it; 1 if one fails."""
    rows = _rows() + _missing()
    if as_json:
        print(json.dumps({"bodies": [asdict(row) for row in rows]}, indent=2))
    else:
        _print(rows)
    return int(any(row.verdict == "FAIL" for row in rows))


def _bodies() -> list[Body]:
    libraries = ["numpy"] if gpu_problem() else ["numpy", "cupy"]
    found = [route.values() for library in libraries for route in routes(library).values()]
    return [body for bodies in found for body in bodies if isinstance(body, Body)]


def _rows() -> list[Row]:
    rows, served = [], set()
    for body in _bodies():  # in the order in which they are asked
        row, operation = _tried(body), (body.library, body.name)
        if row.verdict == "PASS":
            row = replace(row, serves="next" if operation in served else "first")
            served.add(operation)
        rows.append(row)
    return rows


def _missing() -> list[Row]:
    reasons = {"numba": compiled_problem(), "CUDA": gpu_problem()}
    return [
        Row("all", route, "not here", problem=reason)
        for route, reason in reasons.items()
        if reason is not None
    ]


def _tried(body: Body) -> Row:
    result, lasts = tried(body)
    if lasts:
        remember(body, result)
    if not result.passed:
        return Row(body.name, body.route, "FAIL", result.ratio, None, result.problem)
    return Row(body.name, body.route, "PASS", result.ratio, times_as_fast(body))


def _print(rows: list[Row]) -> None:
    from rich.table import Table

    from llama_layers.cli.terminal import Terminal

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    headings = ("body", "by", "verdict", "serves", "error/limit", "speed over definition")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in headings[-2:] else "left")
    for row in rows:
        error = "" if row.error_over_limit is None else f"{row.error_over_limit:.3g}"
        speed = "" if row.times_as_fast is None else f"{row.times_as_fast:.1f} x"
        table.add_row(row.body, row.route, row.verdict, row.serves or "", error, speed)
    console = Terminal(highlight=False)
    console.print(table)
    for row in rows:
        if row.problem is not None:
            of = row.route if row.body == "all" else f"{row.body} by {row.route}"
            console.print(f"{of}: {row.problem}", markup=False, soft_wrap=True)
