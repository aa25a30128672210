"""``llama-layers bench``: measure speed, next to the machine's limits and to other engines."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llama_layers.cli.options import MODEL, Commands, add_backend, add_force, resolve_backend
from llama_layers.cli.outputs import check_data_and_plot
from llama_layers.cli.ranks import world
from llama_layers.files.output import write_atomically
from llama_layers.files.progress import progress

if TYPE_CHECKING:
    from llama_layers.bench.job import Job
    from llama_layers.bench.machine import Machine
    from llama_layers.bench.result import Result

DTYPES = ("float32", "bfloat16", "float16")
# The vocabulary of the model that stands for a layer: its embedding and head take no time.
LAYER_VOCABULARY = 16


def add_parser(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="measure speed, next to the machine's limits and to other engines",
        description="Time the Q/K/V projection, a layer, decoding or prefill, and other engines "
        "that are installed, in turns. The machine's limits, of reading from memory and of "
        "multiplying, are measured in the same run. With --backend cupy all of it on a GPU.",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)

    qkv = kinds.add_parser("qkv", help="hidden states times the fused Q, K and V matrix")
    _add_common(qkv, "llama2-7b", "only its sizes are used")
    _add_sizes(qkv, "--seq", [1, 2, 8, 32, 128], "tokens")

    layer = kinds.add_parser("layer", help="one decoder layer")
    _add_common(layer, "llama2-7b", "only its sizes are used")
    _add_sizes(layer, "--seq", [1, 8, 128], "tokens")
    layer.add_argument(
        "--context", type=_count, default=64, metavar="N", help="tokens in the cache (default: 64)"
    )

    decode = kinds.add_parser("decode", help="a whole model, token by token")
    _add_common(decode, "smollm2-135m", "a published size has random weights")
    _add_layers(decode)
    _add_sizes(decode, "--context", [32], "tokens in the cache")
    decode.add_argument(
        "--tokens", type=_count, default=32, metavar="N", help="tokens a round (default: 32)"
    )
    decode.add_argument(
        "--batch", type=_count, default=1, metavar="N", help="sequences at once (default: 1)"
    )

    prefill = kinds.add_parser("prefill", help="a whole model, a prompt at once")
    _add_common(prefill, "smollm2-135m", "a published size has random weights")
    _add_layers(prefill)
    _add_sizes(prefill, "--seq", [512], "tokens of the prompt")

    for kind in (qkv, layer, decode, prefill):
        kind.set_defaults(run=run)


def _add_common(parser: argparse.ArgumentParser, model: str, what: str) -> None:
    parser.add_argument(
        "--model",
        default=model,
        help=f"{MODEL}, or a published size such as llama2-7b; {what} (default: {model})",
    )
    add_backend(parser)
    parser.add_argument(
        "--threads",
        type=_count,
        metavar="N",
        help="number of threads (default: all cores); not with cupy",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights (default: float32; with cupy bfloat16)",
    )
    parser.add_argument(
        "--rounds", type=_count, default=10, metavar="N", help="number of rounds (default: 10)"
    )
    parser.add_argument(
        "--against",
        type=lambda text: text.split(","),
        default=[],
        metavar="A,B",
        help="other engines that are installed: torch, onnxruntime and openvino for qkv, "
        "transformers and llama.cpp for the rest; with cupy torch for qkv, transformers for the "
        "rest, and transformers-compiled for decode",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result (png, svg, pdf)")
    add_force(parser)


def _add_sizes(parser: argparse.ArgumentParser, option: str, default: list[int], what: str) -> None:
    shown = ",".join(map(str, default))
    parser.add_argument(
        option,
        dest="sizes",
        type=_counts,
        default=default,
        metavar="N,M",
        help=f"{what} (default: {shown})",
    )


def _add_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers",
        type=_count,
        metavar="N",
        help="the first N only (default: all; for a published size, all that fit in memory)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _counts(text: str) -> list[int]:
    counts = [_count(part) for part in text.split(",")]
    if len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"expected each number once, got {text!r}")
    return counts


def run(args: argparse.Namespace) -> int:
    """Measure, and print, write and draw the result."""
    from llama_layers.bench.engines import check_engines

    check_data_and_plot("--json", args.json, args.plot, args.force)
    args.backend = resolve_backend(args.backend)
    check_ranks(args)
    check_threads(args)
    if args.backend == "cupy":
        from llama_layers.backends.placement import cupy_device

        cupy_device(None)  # says what is missing
    check_engines(args.against, args.kind, args.backend)
    if args.dtype is None:
        args.dtype = "bfloat16" if args.backend == "cupy" else "float32"

    from llama_layers.bench.measure import measure
    from llama_layers.bench.table import print_result
    from llama_layers.cli.terminal import Terminal

    job = make_job(args)
    with progress("rounds", args.rounds, count=True) as advance:
        result = measure(
            job,
            args.against,
            machine=make_machine(args),
            rounds=args.rounds,
            progress=lambda: advance(1),
            meet=meet,
        )
    result = replace(result, title=f"{result.title} ({origin(args)})")
    if (group := world()) is not None:
        if group.rank:
            return 0
        result = split(result, group.size)
    if args.json is not None:
        text = json.dumps(result.to_json(), indent=2) + "\n"
        write_atomically(args.json, lambda path: path.write_text(text, encoding="utf-8"))
    if args.plot is not None:
        from llama_layers.bench.chart import draw

        write_atomically(args.plot, lambda temporary: draw(temporary, result))
    print_result(Terminal(highlight=False), result)
    for verb, path in (("written", args.json), ("drawn", args.plot)):
        if path is not None:
            print(f"{verb} {path}")
    return 0


def check_ranks(args: argparse.Namespace) -> None:
    """Raise if ranks were started for what is not split; share the cores of a computer."""
    from llama_layers.bench.threads import available_threads

    if (group := world()) is None:
        return
    if args.kind not in ("decode", "prefill"):
        raise ValueError(
            f"bench {args.kind}: expected one process, got {group.size} ranks; decode and prefill "
            f"are split among ranks"
        )
    if args.against:
        raise ValueError(
            f"--against: expected one process, got {group.size} ranks: other engines are not split"
        )
    if args.threads is None and args.backend == "numpy":
        args.threads = max(1, available_threads() // group.here()[1])  # they share the cores


def meet() -> None:
    """Wait for the other ranks, so that no time includes what they did before."""
    if (group := world()) is not None:
        group.gather(None)


def split(result: Result, ranks: int) -> Result:
    """Say in a result that the model was split, and what was summed."""
    return replace(
        result,
        title=f"{result.title}, split among {ranks} ranks",
        numbers={
            name: f"{numbers}; ranks sum the outputs of attention and of the MLP of each layer in "
            "float32; sizes and limits are those of rank 0"
            for name, numbers in result.numbers.items()
        },
    )


def origin(args: argparse.Namespace) -> str:
    """Say where the weights are from."""
    from llama_layers.bench.models import is_checkpoint

    if args.kind in ("decode", "prefill") and is_checkpoint(args.model):
        return str(args.model)
    return f"sizes of {args.model}, random weights"


def check_threads(args: argparse.Namespace) -> None:
    """Raise if there are more threads than cores, or any for a GPU."""
    from llama_layers.bench.threads import available_threads

    cores = available_threads()
    if args.threads is not None and args.backend == "cupy":
        raise ValueError("--threads: a GPU's cannot be chosen; expected --backend numpy with it")
    if args.threads is not None and args.threads > cores:
        raise ValueError(f"--threads: expected at most {cores}, the cores, got {args.threads}")


def make_machine(args: argparse.Namespace) -> Machine:
    """Make the machine that the arguments ask for."""
    if args.backend == "cupy":
        from llama_layers.bench.gpu import Gpu

        return Gpu(args.kind, args.dtype)
    from llama_layers.bench.cpu import Cpu
    from llama_layers.bench.threads import available_threads

    return Cpu(args.threads or available_threads())


def make_job(args: argparse.Namespace) -> Job:
    """Make the job that the arguments ask for."""
    from llama_layers.arrays.dtypes import FLOATS
    from llama_layers.bench import models
    from llama_layers.bench.cost import layers_cost
    from llama_layers.bench.job import ModelJob, QKVJob, copies
    from llama_layers.config.llama_config import with_layers

    if args.kind == "qkv":
        weights = models.RandomWeights(args.dtype, args.backend)
        config = models.config_of(args.model)
        first = weights.qkv(config)
        nbytes = math.prod(first.fused.shape) * FLOATS[args.dtype].itemsize
        others = [weights.qkv(config) for _ in range(copies(nbytes, args.backend) - 1)]
        return QKVJob([first, *others], args.sizes)
    if args.kind == "layer":
        config = with_layers(models.config_of(args.model), 1)
        small = models.without_biases(replace(config, vocab_size=LAYER_VOCABULARY))
        nbytes = layers_cost(small, 1, 0, FLOATS[args.dtype].itemsize, 0).nbytes
        count = copies(nbytes, args.backend)
        model = models.random_model(small, args.dtype, count, 1 + len(args.against), args.backend)
        return ModelJob(model, "layer", args.sizes, context=args.context)
    if models.is_checkpoint(args.model):
        model = models.opened_model(args.model, args.dtype, args.layers, args.backend, world())
    else:
        config = models.config_of(args.model)
        engines = 1 + len(args.against)
        model = models.random_model(config, args.dtype, args.layers, engines, args.backend, world())
    if args.kind == "prefill":
        return ModelJob(model, args.kind, args.sizes)
    return ModelJob(model, args.kind, args.sizes, steps=args.tokens, batch=args.batch)
