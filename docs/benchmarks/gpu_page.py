"""The page of what gpu.py found: the goals first, then all tables and answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_layers.bench.own_engine import NAME
from llama_layers.bench.result import Case, Result
from llama_layers.bench.table import markdown

PAGE = Path(__file__).parents[1] / "gpu_tables.md"
Found = Mapping[str, Mapping[str, Any]]
HEAD = """\
# Measured on a GPU

Written by `python docs/benchmarks/gpu.py`, from what it found. [](bench.md) says how it measures
and what the columns mean, [](gpu.md) how it computes.
"""
# For each part: the least share of the limit, and the least ratio of another engine's time to
# ours, by medians.
GOALS = {
    "qkv_few_rows": (0.90, 1.0),
    "qkv_many_rows": (None, 0.98),
    **{
        f"decode_{name}": (0.85, 1.0)
        for name in (
            "large", "grouped", "large_batch", "large_batch_long", "grouped_batch",
            "large_compiled", "grouped_compiled",
        )
    },
    "prefill_large": (0.70, 1.0),
    "prefill_grouped": (0.70, 1.0),
    "decode_small": (None, 1.0),
    "decode_small_compiled": (None, 1.0),
}  # fmt: skip
# What must be 0 among the answers.
ZEROS = {
    "replays": "replays that differ",
    "captured_gemm": "replays that differ",
    "endurance": "bytes taken after the first tenth",
}


def page(found: Found) -> str:
    """All of it as Markdown."""
    about = (f"- {name}: {fact}\n" for name, fact in found.get("environment", {}).items())
    return "\n".join(
        [
            HEAD,
            "".join(about),
            "## Goals\n\nBy medians. The times of other engines are over ours.\n",
            "| part | case | what | goal | found | |\n|---|---|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in goals(found)),
            "\n## Tables\n",
            *(table(name, found[name]) for name in GOALS if name in found),
            "## Answers\n",
            *(answers(name, part) for name, part in found.items() if name not in GOALS),
        ]
    )


def goals(found: Found) -> Iterator[tuple[str, ...]]:
    """A row for each goal of each case."""
    for name, (share, ratio) in GOALS.items():
        part = found.get(name, {"error": "not measured"})
        if "error" in part:
            yield name, "", "", "", part["error"], "unknown"
            continue
        result = Result.from_json(part)
        for case in result.cases:
            if share is not None:
                reached = result.limit(case)[0] / case.median(NAME)
                yield row(name, case, f"share of {result.limit(case)[1]}", share, reached)
            for engine in case.seconds:
                if engine != NAME:
                    yield row(name, case, engine, ratio, case.ratios(engine)[1])
        for engine, why in part["left_out"].items():
            yield name, "", engine, f"{ratio:.2f}", why, "unknown"
    for name, key in ZEROS.items():
        part = found.get(name, {"error": "not measured"})
        if key in part:
            yield name, "", key, "0", str(part[key]), verdict(part[key] <= 0)
        else:
            yield name, "", key, "0", part["error"], "unknown"


def row(name: str, case: Case, what: str, goal: float, reached: float) -> tuple[str, ...]:
    """A goal that a number was found for."""
    return name, case.name, what, f"{goal:.2f}", f"{reached:.2f}", verdict(reached >= goal)


def verdict(met: bool) -> str:
    """In a word."""
    return "met" if met else "missed"


def table(name: str, part: Mapping[str, Any]) -> str:
    """A benchmark, or why there is none."""
    if "error" in part:
        return f"### {name}\n\n{part['error']}\n"
    return f"### {name}\n\n{markdown(Result.from_json(part))}"


def answers(name: str, part: Mapping[str, Any]) -> str:
    """What a question was answered with."""
    if name == "environment":
        return ""
    lines = (f"- {key}: {shown(value)}\n" for key, value in part.items())
    return f"### {name}\n\n{''.join(lines)}"


def shown(value: Any) -> str:
    """Three digits of a number."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    return str(value)
