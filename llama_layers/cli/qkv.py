"""``llama-layers qkv``: the Q, K and V of a text, or of two built-in cases."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_layers.arrays.types import Array
from llama_layers.cli.options import (
    Commands,
    add_backend,
    add_dtype,
    add_force,
    add_json,
    add_model,
    resolve_backend,
)
from llama_layers.cli.outputs import check_data_and_plot
from llama_layers.files.output import write_atomically

if TYPE_CHECKING:
    from llama_layers.cli.qkv_cases import Case
    from llama_layers.verify import SiteResult
    from llama_layers.verify.qkv import Examined


def add_parser(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "qkv",
        help="project a text to Q, K and V and check each element against its bound",
        description="Tokenise a text, embed it, normalise it as the layer does, and project it to "
        "Q, K and V. Without a model: two built-in cases, at Llama-2 7B dimensions with equal "
        "weights, and a small one whose weights differ.",
    )
    parser.add_argument("text", nargs="?", help="the text; needs --model")
    add_model(parser, required=False)
    parser.add_argument("--layer", type=int, default=0, help="which layer (default: 0)")
    add_backend(parser)
    add_dtype(parser, "the weights")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write x, Q, K and V (safetensors)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw Q, K and V (png, svg, pdf)")
    add_force(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine the cases, and print, save and draw what was asked for."""
    from llama_layers.cli import qkv_cases
    from llama_layers.verify import examine_qkv

    if (args.model is None) != (args.text is None):
        raise ValueError("--model and a text go together; give both, or neither")
    check_data_and_plot("--save", args.save, args.plot, args.force, model=args.model)
    backend = resolve_backend(args.backend)
    if args.model is None:
        cases = qkv_cases.builtin_cases(backend, args.dtype or "float32")
    else:
        cases = [qkv_cases.model_case(args.model, args.text, args.layer, backend, args.dtype)]
    examined = [(case, examine_qkv(case.x, case.weights, layer=args.layer)) for case in cases]
    if args.save is not None:
        save(args.save, examined)
    if args.plot is not None:
        from llama_layers.cli import plot

        pictures = [(case.title, case.tokens, found.qkv) for case, found in examined]
        write_atomically(args.plot, lambda temporary: plot.draw(temporary, pictures))
    if args.json:
        print(json.dumps([to_json(*pair) for pair in examined], indent=2))
    else:
        for pair in examined:
            print_table(*pair)
        for verb, path in (("saved", args.save), ("drawn", args.plot)):
            if path is not None:
                print(f"{verb} {path}")
    return int(any("FAIL" in verdicts(*pair) for pair in examined))


def columns(case: Case, found: Examined) -> list[tuple[str, SiteResult, Array]]:
    """Return the columns of the table: title, result and array."""
    norm = [] if case.norm is None else [("RMSNorm", case.norm, case.x)]
    results = found.results.items()
    return norm + [(n.upper(), r, a) for (n, r), a in zip(results, found.qkv, strict=True)]


def print_table(case: Case, found: Examined) -> None:
    """Print a case's results as a table and three sentences."""
    from rich.table import Table
    from rich.text import Text

    from llama_layers.arrays.dtypes import dtype_name
    from llama_layers.cli.terminal import Terminal
    from llama_layers.verify.qkv import statistics

    console = Terminal(highlight=False)
    titles, results, arrays = zip(*columns(case, found), strict=True)
    numbers = [statistics(array) for array in arrays]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for title in titles:
        table.add_column(title, justify="right", style="cyan", overflow="fold")
    table.add_row("shape", *(str(list(r.shape)) for r in results))
    table.add_row("dtype", *(r.dtype for r in results))
    for name in ("smallest", "largest", "mean"):
        table.add_row(name, *(_number(n[name]) for n in numbers))
    for i, first in enumerate(zip(*(n["first"] for n in numbers), strict=False)):
        table.add_row("" if i else "first values", *map(_number, first))
    counts = [n["nonfinite"] for n in numbers]
    table.add_row("NaN or Inf", *(Text(str(n), "bold red" if n else "cyan") for n in counts))
    table.add_row("error / bound", *(f"{r.ratio:.2g}" for r in results))
    style = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}
    table.add_row("", *(Text(r.verdict, style[r.verdict]) for r in results))
    console.print(case.title, style="bold", markup=False)
    console.print(case.note, markup=False)
    stored, computed = dtype_name(case.weights.fused.dtype), dtype_name(case.x.dtype)
    console.print(f"Weights in {stored}, activations in {computed}.")
    console.print()
    console.print(table)
    console.print()
    console.print(_differences(case, found), markup=False)
    same = "the same bits" if found.same_bits else "OTHER BITS"
    console.print(f"A second run gives {same}.")
    console.print()


def _number(value: float) -> str:
    """Eight decimals where they show something, powers of ten elsewhere."""
    return f"{value:.8f}" if value == 0 or 1e-4 <= abs(value) < 1e5 else f"{value:.6e}"


def _differences(case: Case, found: Examined) -> str:
    from llama_layers.verify.qkv import differing

    q, k, v = found.qkv
    grouped = case.weights.num_heads != case.weights.num_kv_heads
    lines = []
    for names, counts, pairs in (
        ("Q and K", differing(q, k), "; each query head against its key head" if grouped else ""),
        ("K and V", differing(k, v), ""),
    ):
        count, of = counts["differing"], counts["of"]
        said = " (by more than 1e-6)" if count else ": they are equal within 1e-6"
        lines.append(f"{names} differ in {count} of {of} elements{said}{pairs}.")
    return "\n".join(lines)


def verdicts(case: Case, found: Examined) -> set[str]:
    """Return the verdicts of all arrays of a case.

    A rerun with other bits is a FAIL; NaN and Inf, though computed as they should be, a WARN.
    """
    from llama_layers.verify.qkv import statistics

    said: set[str] = {result.verdict for _, result, _ in columns(case, found)}
    if any(statistics(array)["nonfinite"] for *_, array in columns(case, found)):
        said.add("WARN")
    return said | (set() if found.same_bits else {"FAIL"})


def to_json(case: Case, found: Examined) -> dict[str, Any]:
    """Return a case and its results for a program to read."""
    from llama_layers.verify.qkv import differing, statistics
    from llama_layers.verify.report.plain import plain

    content: dict[str, Any] = {"name": case.name, "title": case.title, "tokens": case.tokens}
    for (name, result), array in zip(found.results.items(), found.qkv, strict=True):
        judgement = plain(result.judgement) | {"verdict": result.verdict}
        said = {"shape": list(result.shape), "dtype": result.dtype} | plain(statistics(array))
        content[name] = said | {"judgement": judgement}
    q, k, v = found.qkv
    content |= {"q_k": differing(q, k), "k_v": differing(k, v), "same_bits": found.same_bits}
    return content | {"verdicts": sorted(verdicts(case, found))}


def save(path: Path, examined: Sequence[tuple[Case, Examined]]) -> None:
    """Write the arrays under the names that their modules have in transformers."""
    from llama_layers.arrays.transfer import to_numpy
    from llama_layers.files.tensors import write_tensors

    arrays = {}
    for case, found in examined:
        arrays[case.source] = to_numpy(case.x)
        for letter, array in zip("qkv", found.qkv, strict=True):
            flat = to_numpy(array).reshape(*array.shape[:2], -1)
            arrays[f"{case.name}.self_attn.{letter}_proj"] = flat
    write_tensors(path, arrays, None)
