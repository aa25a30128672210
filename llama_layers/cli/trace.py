"""``llama-layers trace``: the activations of a forward pass, to compare a port with."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from llama_layers.cli import ranks
from llama_layers.cli.options import (
    Commands,
    add_backend,
    add_dtype,
    add_force,
    add_json,
    add_model,
    resolve_backend,
)
from llama_layers.cli.outputs import check_outputs


def add_parser(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "trace",
        help="write the activations of every site of a forward pass",
        description="Run a model on a text and write the array of every site as safetensors, under "
        "the name that its module has in Hugging Face's model. --dtype float64 makes an exact "
        "reference.",
        epilog="Here --dtype is the format that the model computes in; in check it is the format "
        "that a port's arrays were rounded to.",
    )
    parser.add_argument("text", nargs="?", help="the text; or --ids")
    parser.add_argument("--ids", type=_numbers, metavar="1,2,3", help="token ids instead of a text")
    add_model(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write"
    )
    parser.add_argument(
        "--sites",
        type=lambda text: text.split(","),
        metavar="A,B",
        help="sites to write: names, their last words, or patterns, such as q_proj,'mlp.*' "
        "(default: all but scores and probabilities)",
    )
    parser.add_argument(
        "--layers", type=_ranges, metavar="0-3,7", help="layers to write (default: all)"
    )
    add_backend(parser)
    add_dtype(
        parser,
        "the weights, and of what is computed with them (default: as stored)",
    )
    add_force(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*-?\d{1,9}\s*", part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,2,3, got {text!r}")
    return [int(part) for part in parts]


def _ranges(text: str) -> list[range]:
    """Parse ranges of layers without expanding them: the model's number is not known yet."""
    found: list[range] = []
    for part in text.split(","):
        numbers = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)
        if numbers is None:
            raise argparse.ArgumentTypeError(f"expected layers such as 0-3,7, got {text!r}")
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"expected a range that ascends, got {part!r}")
        found.append(range(first, last + 1))
    return found


def run(args: argparse.Namespace) -> int:
    """Run the model, and write what was asked for."""
    from dataclasses import replace
    from itertools import chain

    import numpy as np

    from llama_layers.backends.placement import placement
    from llama_layers.checkpoint import load, open_checkpoint
    from llama_layers.cli.prompt import prompt_ids
    from llama_layers.verify import join_ranks, record

    if (args.text is None) == (args.ids is None):
        raise ValueError("text: expected a text or --ids, and not both")
    check_outputs([args.output], args.force, model=args.model)
    backend = resolve_backend(args.backend)
    model = load(args.model, backend=backend, dtype=args.dtype, parallel=ranks.world())
    ids = prompt_ids(model, args.text) if args.ids is None else args.ids
    layers = None if args.layers is None else chain.from_iterable(args.layers)
    trace = record(model, placement(backend)(np.asarray([ids])), sites=args.sites, layers=layers)
    if (group := ranks.world()) is not None:
        traces = group.collect(trace)
        if traces is None:
            return 0
        trace = join_ranks(traces, open_checkpoint(args.model).config)
    said = {"model": args.model} | ({} if args.text is None else {"text": args.text})
    replace(trace, metadata={**trace.metadata, **said}).save(args.output, force=args.force)
    if args.json:
        content = {
            "path": str(args.output),
            "bytes": args.output.stat().st_size,
            "input_ids": ids,
            "metadata": {**trace.metadata, **said},
            "sites": {name: list(array.shape) for name, array in trace.arrays.items()},
        }
        print(json.dumps(content, indent=2))
    else:
        size = args.output.stat().st_size / 2**20
        print(
            f"{args.output}: {len(trace.arrays)} sites of {len(ids)} tokens in "
            f"{trace.metadata['dtype']}, {size:.1f} MiB"
        )
    return 0
