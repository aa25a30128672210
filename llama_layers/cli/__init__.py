"""The command line: ``llama-layers``, the same as ``python -m llama_layers``.

Exit status: 0 agree or done, 1 diverge, 2 trouble.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence

from llama_layers.cli import bench, check, compare, convert, generate, info, pull, qkv, trace
from llama_layers.errors import BackendError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process if not given.

    Returns
    -------
    int
        The exit status.
    """
    if sys.stdout is None:  # closed by whoever started the program
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process
    if isinstance(sys.stdout, io.TextIOWrapper):  # not all encodings have every character
        sys.stdout.reconfigure(errors="replace")
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        found: int = getattr(args, "status", 0)  # what a check had found by then
        return found
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError, BackendError) as error:
        said = str(error).replace("; force=True overwrites", "; --force overwrites")
        print(f"llama-layers {args.command}: {said}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"llama-layers {args.command}: not enough memory: {error}", file=sys.stderr)
        return 2
    except Exception:  # a defect: 1, Python's own status for it, would say that something diverged
        traceback.print_exc()
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-layers",
        description="Llama's layers on NumPy and CuPy arrays, held to derived rounding bounds.",
        epilog="Exit status: 0 agree or done, 1 diverge, 2 trouble.",
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (info, pull, convert, qkv, generate, trace, check, compare, bench):
        command.add_parser(commands)
    return parser


class _Version(argparse.Action):
    """Print the version; looked up only when asked for, since the lookup costs milliseconds."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"llama-layers {version('llama-layers')}")
        parser.exit()
