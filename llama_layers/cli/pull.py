"""``llama-layers pull``: fetch a model by its name."""

from __future__ import annotations

import argparse

from llama_layers.cli.options import Commands


def add_parser(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "pull",
        help="fetch a model by its name",
        description="Fetch a model, unless it is there, and print where it is. A known model is "
        "checked and kept in the cache directory, which the environment variable "
        "LLAMA_LAYERS_CACHE moves; one of the Hugging Face Hub goes into the Hub's own cache, and "
        "needs the extra hub. Without a name: list the known models.",
    )
    parser.add_argument(
        "name", nargs="?", help="smollm2-135m, say, or org/name or org/name@revision of the Hub"
    )
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
