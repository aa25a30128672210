"""``llama-layers info``: what a checkpoint is, and what it costs in memory."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.cli.options import MODEL, Commands, add_json
from llama_layers.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console

    from llama_layers.checkpoint import Checkpoint
    from llama_layers.config.llama_config import LlamaConfig


def add_parser(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "info",
        help="say what computes here, and what a checkpoint is and costs in memory",
        description="Print what would compute here: NumPy, its compiled bodies, a GPU. With a "
        "checkpoint, read its headers, check them against its config, and print what it is, which "
        "keys of its config are not read, and what it costs in memory in "
        "each dtype. No weight is read.",
    )
    parser.add_argument("model", nargs="?", help=MODEL)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="hold every faster body to the bound of its definition, and print how far it is off "
        "and how fast it is; exit status 1 if one fails",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what computes here, and what the headers of the checkpoint say."""
    from llama_layers.checkpoint import open_checkpoint
    from llama_layers.cli.terminal import Terminal

    if args.verify:
        if args.model is not None or args.tensors:
            raise ValueError(
                "--verify: expected no model, since it tries the faster code of this machine"
            )
        from llama_layers.cli.verify_bodies import verify

        return verify(args.json)
    if args.model is None and args.tensors:
        raise ValueError("--tensors: expected a model whose tensors to list")
    here = computing()
    checkpoint = None if args.model is None else open_checkpoint(args.model)
    if args.json:
        content = {} if checkpoint is None else describe(checkpoint, args.tensors)
        print(json.dumps({**content, "computing": here}, indent=2))
        return 0
    console = Terminal(highlight=False)
    for name, fact in here.items():
        console.print(f"  {name:<12}{fact}", markup=False, soft_wrap=True)
    if checkpoint is None:
        return 0
    console.print()
    print_summary(console, checkpoint)
    if args.tensors:
        print_tensors(console, checkpoint)
    return 0


def computing() -> dict[str, str]:
    """Say what computes here, and what does not and why."""
    from llama_layers.backends.cupy.detect import gpu_problem
    from llama_layers.backends.numba.detect import compiled_problem

    compiled = compiled_problem()
    return {
        "NumPy": version("numpy"),
        "compiled": f"not in use: {compiled}"
        if compiled
        else f"decoding, products and the rest of a layer, by numba {version('numba')}",
        "GPU": gpu_problem() or _gpu(),
    }


def _gpu() -> str:
    from llama_layers.backends.cupy.detect import device_name

    return f"{device_name()}, by CuPy {importlib.import_module('cupy').__version__}"


def describe(checkpoint: Checkpoint, tensors: bool) -> dict[str, Any]:
    """Describe a checkpoint for a program to read."""
    content: dict[str, Any] = {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "config": checkpoint.config.to_json(),
        "switches": checkpoint.config.switches,
        "ignored_keys": list(checkpoint.ignored_keys),
        "parameters": parameters(checkpoint),
        "stored_bytes": stored_bytes(checkpoint),
        "weight_bytes": {name: parameters(checkpoint) * f.itemsize for name, f in FLOATS.items()},
        "cache_bytes_per_token": {name: cache_bytes(checkpoint, name) for name in FLOATS},
    }
    if tensors:
        content["tensors"] = [
            {**dataclasses.asdict(info), "file": info.file.name}
            for info in checkpoint.tensors.values()
        ]
    return content


def parameters(checkpoint: Checkpoint) -> int:
    """The number of parameters; a tied head is not counted twice."""
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


def stored_bytes(checkpoint: Checkpoint) -> int:
    """The bytes that the tensors take in the files."""
    return sum(info.nbytes for info in checkpoint.tensors.values())


def cache_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """The bytes that a token takes in the key/value cache."""
    config = checkpoint.config
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    return heads * config.head_dim * FLOATS[dtype].itemsize


def print_summary(console: Console, checkpoint: Checkpoint) -> None:
    """Print what the checkpoint is, and its memory in each dtype."""
    from rich.table import Table

    config = checkpoint.config
    stored = sorted({info.dtype for info in checkpoint.tensors.values()})
    biases = [name for name in ("qkv_bias", "o_bias", "mlp_bias") if getattr(config, name)]
    padding = max(info.padding for info in checkpoint.tensors.values())
    rope = f"theta {config.rope_theta:g}"
    if config.rope_scaling is not None:
        rope += f", {config.rope_scaling.rope_type} x {config.rope_scaling.factor:g}"
    facts = {
        "format": f"{checkpoint.format}, {', '.join(stored)}",
        "family": config.model_type,
        "parameters": f"{parameters(checkpoint):,} in {len(checkpoint.tensors)} tensors, "
        f"{_bytes(stored_bytes(checkpoint))}",
        "layers": f"{config.num_hidden_layers} of hidden size {config.hidden_size}, "
        f"MLP {config.intermediate_size}",
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, "
        f"of {config.head_dim}",
        "vocabulary": f"{config.vocab_size}, head "
        + ("tied to the embedding" if config.tie_word_embeddings else "of its own")
        + (f"; padded to {config.vocab_size + padding} rows in the file" if padding else ""),
        "context": f"{config.max_position_embeddings} tokens{_windows(config)}",
        "RoPE": rope,
        "RMSNorm": f"eps {config.rms_norm_eps:g}",
        "biases": ", ".join(biases) or "none",
        "switches": f"\n{' ' * 14}".join(f"{n} {_shown(v)}" for n, v in config.switches.items())
        or "none: Llama's block",
        "not read": one_line(", ".join(checkpoint.ignored_keys)) or "none",
    }
    console.print(one_line(str(checkpoint.path)), style="bold", markup=False, soft_wrap=True)
    for name, fact in facts.items():
        long = name in ("switches", "not read")
        console.print(f"  {name:<12}{fact}", markup=False, soft_wrap=long)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 2))
    for heading in ("memory", "weights", "cache, a token", "cache, full context"):
        table.add_column(heading, justify="left" if heading == "memory" else "right")
    for name, form in FLOATS.items():
        token = cache_bytes(checkpoint, name)
        table.add_row(
            name,
            _bytes(parameters(checkpoint) * form.itemsize),
            _bytes(token),
            _bytes(token * config.max_position_embeddings),
        )
    console.print()
    console.print(table)


def _windows(config: LlamaConfig) -> str:
    """The sliding window, and how many layers have it where some have none."""
    layers = config.num_hidden_layers
    count = sum(config.window_of(layer) is not None for layer in range(layers))
    where = "" if count == layers else f" in {count} of {layers} layers"
    return f", sliding window {config.sliding_window}{where}" if count else ""


def _shown(value: object) -> str:
    """The value of a switch; of one for each layer, the different values with their numbers."""
    if not isinstance(value, tuple):
        return f"{value:g}" if isinstance(value, float) else str(value)
    said = []
    for each in dict.fromkeys(value):
        count = value.count(each)
        said.append(
            f"{_shown(each) if each else 'none'} in {count} layer{'s' if count > 1 else ''}"
        )
    return " and ".join(said)


def print_tensors(console: Console, checkpoint: Checkpoint) -> None:
    """Print a line for each tensor."""
    console.print()
    width = max(len(name) for name in checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        line = (
            f"  {one_line(name):<{width}}  {info.dtype:<8}  {list(info.shape)!s:<15}  "
            f"{_bytes(info.nbytes)}"
        )
        console.print(line, markup=False, soft_wrap=True)


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
