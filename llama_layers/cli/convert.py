"""``llama-layers convert``: any checkpoint to a Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from llama_layers.cli.options import MODEL, Commands, add_dtype


def add_parser(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint as a Hugging Face directory",
        description="Write any checkpoint that can be loaded as a Hugging Face directory of "
        "config.json, model.safetensors and the tokenizer.",
    )
    parser.add_argument("source", help=MODEL)
    parser.add_argument("destination", type=Path, help="the directory to make")
    add_dtype(parser, "the weights written (default: as they are)")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    from llama_layers.checkpoint import convert, open_checkpoint

    if (args.destination / "config.json").is_file() and not args.force:
        raise FileExistsError(f"{args.destination} exists; --force overwrites it")
    source = open_checkpoint(args.source).path
    if args.destination.resolve() in (source.resolve(), source.resolve().parent):
        raise ValueError(f"{args.destination}: expected another directory than that of the source")
    convert(args.source, args.destination, dtype=args.dtype, overwrite=args.force)
    print(args.destination)
    return 0
