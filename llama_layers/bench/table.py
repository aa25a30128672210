"""A benchmark as tables, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from llama_layers.bench.own_engine import NAME
from llama_layers.bench.result import Case, Limit, Result


def headings(result: Result) -> list[str]:
    """The headings of the columns, with a ratio if there are other engines."""
    tokens = ["tokens/s"] if result.cases[0].tokens else []
    ratio = ["time / ours"] if len(result.numbers) > 1 else []
    return ["", "best, ms", "median, ms", "of the limit", *tokens, *ratio]


def rows(result: Result, case: Case) -> Iterator[list[str]]:
    """Yield a row for the limit and one for each engine, in one case."""
    compared = len(result.numbers) > 1
    seconds, by = result.limit(case)
    ends = [""] if compared else []
    yield [f"limit: {by}", milliseconds(seconds), "", "", *rate(case, seconds), *ends]
    for name in case.seconds:
        best, median = case.best(name), case.median(name)
        if compared:
            ratios = " / ".join(f"{ratio:.2f}" for ratio in case.ratios(name))
            ends = ["" if name == NAME else ratios]
        share = f"{100 * result.share(case, name):.0f} %"
        yield [name, milliseconds(best), milliseconds(median), share, *rate(case, best), *ends]


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds, with three digits or more."""
    value = seconds * 1e3
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def rate(case: Case, seconds: float) -> list[str]:
    """Tokens per second, where that means something."""
    return [] if case.tokens is None else [f"{case.tokens / seconds:.1f}"]


def describe(result: Result) -> dict[str, str]:
    """Describe what was measured, on which machine and how."""
    turns = "in turns, " + ("1 round" if result.rounds == 1 else f"{result.rounds} rounds")
    threads = {"threads": f"{result.threads} for each, {turns}"}
    return {
        **({"times": turns} if result.threads is None else threads),
        **result.numbers,
        "reading": _rates(result.reading, "B/s"),
        "multiplying": _rates(result.multiplying, "FLOP/s"),
        "machine": ", ".join(f"{name} {text}" for name, text in result.machine.items()),
    }


def notes(result: Result) -> list[str]:
    """Explain the figures."""
    found = [
        "limit: weights and cached keys and values read once, or multiplied, whichever takes "
        "longer, at the best rate of this run."
    ]
    if len(result.numbers) > 1:
        found.append("time / ours: best / median; above 1 where ours is shorter.")
    if any(result.share(case, name) > 1 for case in result.cases for name in case.seconds):
        found.append(
            "Above 100 %: products of 16-bit numbers, a cache, or a better moment than the limit "
            "was probed in."
        )
    return found


def print_result(console: Console, result: Result) -> None:
    """Print a benchmark."""
    console.print(result.title, style="bold", markup=False)
    about = Table.grid(padding=(0, 2, 0, 0))
    for fact in describe(result).items():
        about.add_row(*fact)
    console.print(Padding(about, (0, 0, 1, 2)))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, heading in enumerate(headings(result)):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for case in result.cases:
        table.add_row(case.name, style="bold")
        for row in rows(result, case):
            table.add_row("  " + row[0], *row[1:], style="cyan" if row[0] == NAME else None)
    console.print(table)
    console.print()
    for note in notes(result):
        console.print(note, markup=False)


def markdown(result: Result) -> str:
    """Format a benchmark as a section of a page."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    heads = headings(result)
    lines = [f"{result.title}.\n\n", line(["", *heads]), "|---" * (len(heads) + 1) + "|\n"]
    for case in result.cases:
        for number, row in enumerate(rows(result, case)):
            lines.append(line(["" if number else case.name, *row]))
    about = (f"- {name}: {fact}\n" for name, fact in describe(result).items())
    return "".join([*lines, "\n", *about])


def _rates(limit: Limit, unit: str) -> str:
    """The best rate, the worst, and how it was measured."""
    scale, prefix = (1e12, "T") if limit.best >= 1e13 else (1e9, "G")
    return (
        f"{limit.best / scale:.0f} (the worst of {len(limit.rates)} tries "
        f"{min(limit.rates) / scale:.0f}) {prefix}{unit}: {limit.what}"
    )
