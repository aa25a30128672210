"""``llama-layers check``: compare a port's activations with a model, site by site."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.cli.options import (
    Commands,
    add_force,
    add_ignore_unknown,
    add_json,
    add_model,
)
from llama_layers.cli.outputs import check_outputs
from llama_layers.cli.workers import add_jobs, workers
from llama_layers.errors import one_line
from llama_layers.files.progress import progress, status

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from llama_layers.checkpoint import Checkpoint
    from llama_layers.config.llama_config import LlamaConfig
    from llama_layers.verify import SiteResult, Trace


def add_parser(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "check",
        help="find a port's first wrong site, and say why",
        description="Recompute each site of a trace in float64 from the port's own inputs, hold "
        "every element against what rounding allows there, and name the mistakes that explain "
        "those that fail.",
        epilog="Exit status: 0 agrees, 1 a site fails, 2 nothing could be checked.",
    )
    parser.add_argument(
        "trace",
        type=Path,
        nargs="+",
        help="a safetensors or .npz file, or a directory of .npy files; with --tensor-parallel one "
        "of each rank, in their order",
    )
    parser.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="join the traces of ranks that split the model among them",
    )
    add_model(parser)
    formats = tuple(FLOATS)
    parser.add_argument(
        "--dtype",
        choices=formats,
        help="what the port rounded its arrays to, where that is narrower than they are stored: "
        "bfloat16 written out as float32, say (default: as the trace says, or its arrays' dtypes)",
    )
    parser.add_argument(
        "--accumulate",
        choices=formats,
        help="what the port keeps sums in (default: as the trace says, or float32; float64 for "
        "float64 arrays)",
    )
    parser.add_argument(
        "--weights-dtype",
        choices=formats,
        help="what the port rounds weights to (default: as the trace says, or else the dtype of "
        "its arrays, if that is narrower than the checkpoint's)",
    )
    parser.add_argument(
        "--profile",
        metavar="ENGINE",
        help="allow an engine's further roundings, such as those of transformers or llama.cpp",
    )
    parser.add_argument(
        "--allow",
        metavar="ROUNDINGS",
        help="allow further roundings, such as cache=float16 or scores,probabilities: names of "
        "fields of llama_layers.verify.RoundingProfile",
    )
    parser.add_argument(
        "--rope-layout",
        choices=("half", "interleaved"),
        help="whether the two numbers of a pair that RoPE rotates are half a head apart or next to "
        "each other in queries and keys (default: as the trace says, or half)",
    )
    parser.add_argument(
        "--past",
        type=Path,
        metavar="FILE",
        help="a trace of the tokens before these, which attention sees through a cache",
    )
    add_ignore_unknown(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page, too")
    parser.add_argument("--all", action="store_true", help="print a line for each site")
    parser.add_argument(
        "--no-diagnose", action="store_true", help="do not look for what explains a failure"
    )
    add_jobs(parser)
    add_force(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, print the report, and write the page if asked for."""
    with workers(args.jobs, "llama_layers.verify") as executor:
        return _run(args, executor)


def _run(args: argparse.Namespace, executor: Executor | None) -> int:
    from llama_layers.checkpoint import load, open_checkpoint
    from llama_layers.cli.terminal import print_report
    from llama_layers.verify import Trace, check, join_ranks, write_html

    if len(args.trace) > 1 and not args.tensor_parallel:
        raise ValueError(
            f"trace: expected one, or --tensor-parallel for those of ranks, got {len(args.trace)}"
        )
    if args.past is not None and args.tensor_parallel:
        raise ValueError("--past: expected none with --tensor-parallel")
    if len(args.trace) != len({place.resolve() for place in args.trace}):
        raise ValueError("trace: expected one of each rank, got one of them twice")
    given = [*args.trace, *([] if args.past is None else [args.past])]
    check_outputs([args.html], args.force, model=args.model, read=given)
    traces = [Trace.load(path) for path in args.trace]
    checkpoint = open_checkpoint(args.model)
    ignored = ""
    if args.ignore_unknown:
        traces, ignored = leave_out_unknown(traces, checkpoint.config)
    trace = join_ranks(traces, checkpoint.config) if args.tensor_parallel else traces[0]
    rounded = None
    weights = args.weights_dtype or stated_weights(trace)
    if weights is None:
        weights = rounded = narrower_dtype(trace, args.dtype, checkpoint)
    model = load(args.model, dtype=weights)
    with ExitStack() as shown:
        advance = shown.enter_context(progress("checking sites", len(trace.arrays), count=True))

        def diagnosing(result: SiteResult) -> None:
            shown.close()
            line = f"looking for what explains {result.site.name} (--no-diagnose skips this)"
            shown.enter_context(status(line))

        report = check(
            trace,
            model,
            dtype=args.dtype,
            accumulate=args.accumulate,
            profile=args.profile,
            allow=args.allow,
            rope_layout=args.rope_layout,
            past=None if args.past is None else Trace.load(args.past),
            ignore_unknown=args.ignore_unknown,
            explain=not args.no_diagnose,
            progress=lambda _: advance(1),
            diagnosing=diagnosing,
            executor=executor,
        )
    args.status = report.exit_status
    if args.html is not None:
        write_html(report, args.html, force=args.force)
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
        return report.exit_status
    print_report(lambda width: report.text(every=args.all, width=width))
    if ignored:
        print(one_line(f"Left out: {ignored}."))
    if rounded is not None:
        print(
            f"Weights were rounded to {rounded}, as the trace is; --weights-dtype overrides that."
        )
    if args.html is not None:
        print(f"written {args.html}")
    return report.exit_status


def leave_out_unknown(traces: list[Trace], config: LlamaConfig) -> tuple[list[Trace], str]:
    """Return traces without arrays whose names no site has, and what those names probably mean."""
    from llama_layers.verify.unknown_names import told, unknown_names, without_unknown

    unknown = sorted({name for trace in traces for name in unknown_names(trace.arrays, config)})
    kept = [without_unknown(trace, config) for trace in traces]
    return kept, told(unknown, config) if unknown else ""


def stated_weights(trace: Trace) -> str | None:
    """Return the dtype of the weights that a trace says it was computed with."""
    from llama_layers.errors import TraceError

    stated = trace.metadata.get("weights")
    if stated not in (None, *FLOATS):
        raise TraceError(
            f"metadata weights: expected one of {', '.join(FLOATS)}, got {stated!r}; "
            "--weights-dtype overrides it"
        )
    return stated


def narrower_dtype(trace: Trace, dtype: str | None, checkpoint: Checkpoint) -> str | None:
    """Return the dtype that a port computes in, if it cannot hold the checkpoint's weights.

    A port in bfloat16 rounds the weights of a float32 checkpoint when it loads them.
    """
    from llama_layers.verify.stored import info_of

    found = dtype or trace.metadata.get("dtype")
    if found not in FLOATS:
        dtypes = Counter(info_of(trace.arrays, name).dtype for name in trace.arrays)
        found = next((name for name, _ in dtypes.most_common() if name in FLOATS), None)
    if found is None:  # nothing to check; `check` has the better message
        return None
    stored = {info.read_dtype for info in checkpoint.tensors.values()}
    return None if all(FLOATS[found].holds(FLOATS[name]) for name in stored) else found
