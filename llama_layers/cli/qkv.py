"""``llama-layers qkv``: the Q, K and V of a text, or of two built-in cases."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_layers.cli.options import (
    Backend,
    add_backend,
    add_dtype,
    add_force,
    add_json,
    add_model,
    resolve_backend,
)
from llama_layers.cli.outputs import check_outputs, check_plot
from llama_layers.files.output import write_atomically

if TYPE_CHECKING:
    from llama_layers.layers.linear import QKV
    from llama_layers.layers.weights import QKVWeights
    from llama_layers.model.llama import Llama
    from llama_layers.verify import QKVReport, Summary


@dataclass(frozen=True)
class Case:
    """Normalised hidden states, the projection they go through, and where both come from."""

    name: str
    title: str
    note: str
    x: Any
    weights: QKVWeights
    tokens: list[str]
    norm: Summary | None = None


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "qkv",
        help="project a text to Q, K and V and hold each element against its bound",
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
    from llama_layers.verify import examine_qkv

    if (args.model is None) != (args.text is None):
        raise ValueError("--model and a text go together; give both, or neither")
    check_outputs((args.save, args.plot), args.force, model=args.model)
    if args.save is not None and args.save == args.plot:
        raise ValueError(f"--save and --plot: expected two files, got {args.save} twice")
    check_plot(args.plot)
    backend = resolve_backend(args.backend)
    if args.model is None:
        cases = builtin_cases(backend, args.dtype or "float32")
    else:
        cases = [model_case(args.model, args.text, args.layer, backend, args.dtype)]
    examined = [(case, *examine_qkv(case.x, case.weights)) for case in cases]
    if args.save is not None:
        save(args.save, {case.name: (case, qkv) for case, qkv, _ in examined})
    if args.plot is not None:
        from llama_layers.cli import plot

        pictures = [(case.title, case.tokens, qkv) for case, qkv, _ in examined]
        write_atomically(args.plot, lambda temporary: plot.draw(temporary, pictures))
    if args.json:
        print(json.dumps([to_json(case, report) for case, _, report in examined], indent=2))
    else:
        for case, _, report in examined:
            print_report(case, report)
        for verb, path in (("saved", args.save), ("drawn", args.plot)):
            if path is not None:
                print(f"{verb} {path}")
    return int(any("FAIL" in verdicts(case, report) for case, _, report in examined))


def builtin_cases(backend: Backend, dtype: str) -> list[Case]:
    """The case at Llama-2 7B dimensions, with equal weights, and one whose weights differ."""
    import numpy as np

    from llama_layers.arrays.dtypes import dtype_of
    from llama_layers.arrays.namespaces import namespace
    from llama_layers.backends.placement import placement
    from llama_layers.layers.weights import QKVWeights
    from llama_layers.model.embedding import activations

    place = placement(backend)

    def case(name: str, title: str, note: str, x: Any, heads: int, values: list[float]) -> Case:
        hidden, stored = x.shape[-1], dtype_of(np, dtype)
        x = place(x.astype(np.float32).astype(stored))
        x = activations(namespace(x=x), x)
        weights = QKVWeights.from_separate(
            *(place(np.full((hidden, hidden), value, stored)) for value in values),
            num_heads=heads,
            layout="in_out",
        )
        tokens = [str(i) for i in range(x.shape[1])]
        return Case(name, title, note, x, weights, tokens)

    ramp = np.sin(np.arange(2 * 4096) * 0.0001).reshape(1, 2, 4096) * 0.02
    normal = np.random.default_rng(0).standard_normal((1, 2, 128))
    return [
        case(
            "llama2_7b",
            "Llama-2 7B dimensions: hidden size 4096, 32 heads of 128, every weight 0.01",
            "Element i of x is sin(0.0001 i) * 0.02. The weights are equal, so Q, K, V must be.",
            ramp,
            32,
            [0.01, 0.01, 0.01],
        ),
        case(
            "divergence",
            "Weights 0.01, 0.02 and 0.03: hidden size 128, 4 heads of 32",
            "x is standard normal. The weights differ, so Q, K, V must.",
            normal,
            4,
            [0.01, 0.02, 0.03],
        ),
    ]


def model_case(model: str, text: str, layer: int, backend: Backend, dtype: str | None) -> Case:
    """What a layer's projection is given for a text."""
    import numpy as np

    from llama_layers.backends.placement import placement
    from llama_layers.checkpoint import load
    from llama_layers.cli.prompt import prompt_ids
    from llama_layers.verify import rms_norm_bound, summarise

    if layer < 0:
        raise ValueError(f"--layer: expected zero or more, got {layer}")
    llama = load(model, backend=backend, dtype=dtype)
    if layer >= (count := llama.config.num_hidden_layers):
        raise ValueError(f"--layer: expected a number from 0 to {count - 1}, got {layer}")
    ids = prompt_ids(llama, text)
    sites = capture(llama, placement(backend)(np.asarray([ids])), layer)
    hidden, x = sites["hidden"], sites["normed"]
    weights, eps = llama.weights.layers[layer], llama.config.rms_norm_eps
    qkv = weights.self_attn.qkv
    return Case(
        name=f"model.layers.{layer}",
        title=f"{model}, layer {layer}: {len(ids)} tokens of {_shortened(text)!r}",
        note=f"RMSNorm, then projection to {qkv.num_heads} query and {qkv.num_kv_heads} "
        f"key/value heads of {qkv.head_dim}.",
        x=x,
        weights=qkv,
        tokens=[llama.tokenizer.decode([i]) for i in ids],
        norm=summarise(x, rms_norm_bound(hidden, weights.input_layernorm, eps=eps)),
    )


def _shortened(text: str, most: int = 48) -> str:
    return text if len(text) <= most else text[: most - 1] + "\u2026"


class _ReachedError(Exception):
    """The forward pass has come as far as it needs to."""


def capture(model: Llama, input_ids: Any, layer: int) -> dict[str, Any]:
    """The residual stream before a layer, and that normalised; later layers are not run."""
    from llama_layers.model.forward import forward

    before = f"model.layers.{layer - 1}" if layer else "model.embed_tokens"
    sites = {before: "hidden", f"model.layers.{layer}.input_layernorm": "normed"}
    captured: dict[str, Any] = {}

    def tap(name: str, array: Any) -> Any:
        if name in sites:
            captured[sites[name]] = array
        if len(captured) == len(sites):
            raise _ReachedError
        return array

    with contextlib.suppress(_ReachedError):
        forward(model, input_ids, tap=tap)
    return captured


def print_report(case: Case, report: QKVReport) -> None:
    """Print a case's report as a table and three sentences."""
    from rich.table import Table
    from rich.text import Text

    from llama_layers.arrays.dtypes import dtype_name
    from llama_layers.cli.terminal import Terminal

    console = Terminal(highlight=False)
    summaries = {"Q": report.q, "K": report.k, "V": report.v}
    if case.norm is not None:
        summaries = {"RMSNorm": case.norm} | summaries
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for name in summaries:
        table.add_column(name, justify="right", style="cyan", overflow="fold")
    columns = list(summaries.values())
    table.add_row("shape", *(str(list(s.shape)) for s in columns))
    table.add_row("dtype", *(s.dtype for s in columns))
    table.add_row("smallest", *(_number(s.smallest) for s in columns))
    table.add_row("largest", *(_number(s.largest) for s in columns))
    table.add_row("mean", *(_number(s.mean) for s in columns))
    for i in range(min(5, *(len(s.first) for s in columns))):
        table.add_row("first values" if i == 0 else "", *(_number(s.first[i]) for s in columns))
    counts = (Text(str(s.nonfinite), "bold red" if s.nonfinite else "cyan") for s in columns)
    table.add_row("NaN or Inf", *counts)
    table.add_row("error / bound", *(f"{s.judgement.ratio:.2g}" for s in columns))
    style = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}
    table.add_row("", *(Text(s.judgement.verdict, style[s.judgement.verdict]) for s in columns))
    console.print(case.title, style="bold", markup=False)
    console.print(case.note, markup=False)
    stored, computed = dtype_name(case.weights.fused.dtype), dtype_name(case.x.dtype)
    console.print(f"Weights in {stored}, activations in {computed}.")
    console.print()
    console.print(table)
    console.print()
    console.print(_differences(case, report), markup=False)
    console.print(
        "A second run gives the same bits."
        if report.same_bits
        else "A second run gives OTHER BITS."
    )
    console.print()


def _number(value: float) -> str:
    """Eight decimals where they show something, powers of ten elsewhere."""
    return f"{value:.8f}" if value == 0 or 1e-4 <= abs(value) < 1e5 else f"{value:.6e}"


def _differences(case: Case, report: QKVReport) -> str:
    grouped = case.weights.num_heads != case.weights.num_kv_heads
    pairs = (("Q and K", report.q_k), ("K and V", report.k_v))
    lines = [
        f"{name} differ in {d.differing} of {d.of} elements"
        + (" (by more than 1e-6)" if d.differing else ": they are equal within 1e-6")
        + ("; each query head against its key head" if grouped and d is report.q_k else "")
        for name, d in pairs
    ]
    return ".\n".join(lines) + "."


def verdicts(case: Case, report: QKVReport) -> set[str]:
    """The verdicts of all arrays of a case.

    A rerun with other bits is a FAIL; NaN and Inf, though computed as they should be, a WARN.
    """
    summaries = [report.q, report.k, report.v] + ([case.norm] if case.norm else [])
    found: set[str] = {summary.judgement.verdict for summary in summaries}
    if any(summary.nonfinite for summary in summaries):
        found.add("WARN")
    return found | (set() if report.same_bits else {"FAIL"})


def to_json(case: Case, report: QKVReport) -> dict[str, Any]:
    """A case and its report for a program to read."""
    content = {"name": case.name, "title": case.title, "tokens": case.tokens}
    return content | report.to_json() | {"verdicts": sorted(verdicts(case, report))}


def save(path: Path, cases: Mapping[str, tuple[Case, QKV]]) -> None:
    """Write the arrays under the names that their modules have in transformers."""
    from llama_layers.arrays.transfer import to_numpy
    from llama_layers.files.output import write_tensors

    arrays = {}
    for name, (case, qkv) in cases.items():
        arrays[f"{name}.input_layernorm"] = case.x
        for letter, array in zip("qkv", qkv, strict=True):
            width = math.prod(array.shape[2:])
            flat = to_numpy(array).reshape(*array.shape[:2], width)
            arrays[f"{name}.self_attn.{letter}_proj"] = flat
    write_tensors(path, {name: to_numpy(array) for name, array in arrays.items()}, None)
