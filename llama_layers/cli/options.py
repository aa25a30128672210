"""Options that several commands have."""

from __future__ import annotations

import argparse
from typing import Literal, TypeAlias

from llama_layers.arrays.dtypes import FLOATS

Backend = Literal["numpy", "cupy"]
# The type that `ArgumentParser.add_subparsers` returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# The models that `load` takes, for help texts.
MODEL = "a directory, file, known model such as smollm2-135m, or org/name on the Hugging Face Hub"


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --model."""
    parser.add_argument("--model", required=required, help=MODEL)


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add --backend."""
    parser.add_argument(
        "--backend",
        choices=("numpy", "cupy", "auto"),
        default="numpy",
        help="the array library; auto takes cupy where it finds a usable GPU (default: numpy)",
    )


def add_dtype(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --dtype."""
    parser.add_argument("--dtype", choices=tuple(FLOATS), help=f"the dtype of {what}")


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add --force."""
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON for a program to read")


def add_ignore_unknown(parser: argparse.ArgumentParser) -> None:
    """Add --ignore-unknown."""
    parser.add_argument(
        "--ignore-unknown",
        action="store_true",
        help="leave out arrays that have no site's name, instead of refusing the trace",
    )


def resolve_backend(choice: Literal["numpy", "cupy", "auto"]) -> Backend:
    """The name of the array library to use."""
    if choice != "auto":
        return choice
    from llama_layers.backends.cupy.detect import gpu_problem

    return "numpy" if gpu_problem() else "cupy"
