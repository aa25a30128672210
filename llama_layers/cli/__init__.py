"""The command line: ``llama-layers``, the same as ``python -m llama_layers``.

Exit status: 0 agree or done, 1 diverge, 2 trouble.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

from llama_layers.cli import (
    bench,
    check,
    compare,
    convert,
    generate,
    info,
    pull,
    qkv,
    ranks,
    trace,
)
from llama_layers.errors import BackendError, one_line
from llama_layers.files.output import OverwriteError
from llama_layers.parallel.launcher import wait_for_rank_0
from llama_layers.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with the arguments given, or those of the process; return its status."""
    if sys.stdout is None:  # closed by whoever started the program
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process
    if sys.stderr is None:  # or else print would take stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # not all encodings have every character
        sys.stdout.reconfigure(errors="replace")
    ranks.silence()
    args = argparse.Namespace(command="")
    try:
        args = _parsed(argv)
        ranks.connect(args.command, vars(args))
        with _warnings_on_one_line(args.command):
            status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        _print_error(f"llama-layers {args.command}: {ranks.named()}interrupted")
        ranks.end_all(130)
        return 130
    except SystemExit:
        raise
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        _settle(sys.stdout)
        return getattr(args, "status", 0)  # that of a check, which is known by then
    except BaseException as error:  # tokenizers raises one that is not an Exception
        wait_for_rank_0()
        _print_error(f"llama-layers {args.command}: {ranks.named()}{_said(error)}")
        if "LLAMA_LAYERS_TRACEBACK" in os.environ:
            with suppress(OSError):
                traceback.print_exc()
        for stream in (sys.stderr, sys.stdout):
            _settle(stream)
        ranks.end_all(2)
        return 2


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; if they are wrong, other ranks learn of it."""
    try:
        return _parser().parse_args(argv)
    except SystemExit as ended:
        if ended.code:
            ranks.connect(None)
        raise


def _print_error(said: str) -> None:
    """Print a line on stderr, the real one for a rank; one that fails leaves the exit status."""
    with suppress(OSError):  # in one piece, or else lines of several ranks are mixed
        print(f"{said}\n", end="", file=sys.__stderr__ if ranks.named() else sys.stderr)


@contextmanager
def _warnings_on_one_line(command: str) -> Iterator[None]:
    """Let warnings look like errors, without the line of source that they come from."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: (
        f"llama-layers {command}: warning: {one_line(str(message))}\n"
    )
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _said(error: BaseException) -> str:
    """The message for an error, on one line."""
    said = str(error)
    if isinstance(error, OverwriteError):
        said = f"{error.path} exists; --force overwrites it"
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        said = f"{os.fsdecode(error.filename)}: {error.strerror}"  # without its number
    elif isinstance(error, MemoryError):
        said = f"not enough memory: {said}"
    elif not isinstance(error, ValueError | OSError | ImportError | BackendError):
        said = (
            f"a defect in llama_layers, please report it: {type(error).__name__}: {said} "
            f"(LLAMA_LAYERS_TRACEBACK=1 shows where)"
        )
    return one_line(said)


def _settle(stream: TextIO) -> None:
    """Write out what a stream holds, or drop it: Python would fail with it when it ends."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-layers",
        description="Llama's layers on NumPy and CuPy arrays, held to derived rounding bounds.",
        epilog="Exit status: 0 agree or done, 1 diverge, 2 trouble.",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"llama-layers {__version__}",
        help="print the version and exit",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (info, pull, convert, qkv, generate, trace, check, compare, bench):
        command.add_parser(commands)
    return parser
