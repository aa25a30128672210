"""The picture of a benchmark: how near to the limit each engine came."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from llama_layers.bench.result import Result
from llama_layers.bench.table import milliseconds

COLOURS = ("#3b6fb6", "#d9822b", "#4a9a5b", "#b0517d", "#7a6fb0", "#8a7a5c")


def draw(path: Path, result: Result) -> None:
    """Write a picture: a bar for each case and engine, in percent of the limit's speed."""
    names = list(result.numbers)
    bars = len(result.cases) * len(names)
    figure = Figure(figsize=(max(6.0, 2.5 + 0.6 * bars), 4.8), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(names)
    for place, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        left = [i + (place - (len(names) - 1) / 2) * width for i in range(len(result.cases))]
        best = [100 * result.share(case, name) for case in result.cases]
        median = [100 * result.limit(case)[0] / case.median(name) for case in result.cases]
        drawn = axes.bar(left, best, 0.92 * width, color=colour, label=name)
        labels = [milliseconds(case.best(name)) for case in result.cases]
        axes.bar_label(drawn, labels, padding=2, fontsize=7)
        axes.plot(left, median, "_", color="black", markersize=10)
    axes.axhline(100, color="black", linewidth=0.8, linestyle="--")
    ticks = [f"{case.name}\n({result.limit(case)[1]})" for case in result.cases]
    axes.set_xticks(range(len(result.cases)), ticks)
    axes.set_ylabel("speed, % of the limit")
    axes.set_title(result.title, fontsize=9, wrap=True)
    threads = "" if result.threads is None else f"threads: {result.threads}; "
    axes.set_xlabel(
        f"{threads}bars: best of {result.rounds}, in ms above; lines: median",
        fontsize=8,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
