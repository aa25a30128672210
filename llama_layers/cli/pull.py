"""``llama-layers pull``: fetch a known model."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "pull",
        help="fetch a known model into the cache",
        description="Fetch a known model, check it, and keep it in the cache directory, which the "
        "environment variable LLAMA_LAYERS_CACHE moves. Without a name: list the known models.",
    )
    parser.add_argument("name", nargs="?", help="such as smollm2-135m")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch the model and say where it is, or list what is known."""
    from llama_layers.checkpoint import known_models, pull

    if args.name is None:
        for model in known_models():
            print(f"{model.name}  {model.description}")
        return 0
    print(pull(args.name))
    return 0
