"""``llama-layers compare``: two traces side by side, without a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llama_layers.cli.options import Commands, add_ignore_unknown, add_json


def add_parser(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "compare",
        help="say where two traces come apart",
        description="Hold two traces of the same tokens against each other, without a model: how "
        "far apart they are at each site, and how much of that is inherited. That is experience, "
        "not a bound; check, with a model, has one.",
        epilog="Exit status: 0 no site comes apart, 1 one does, 2 they could not be compared.",
    )
    parser.add_argument("a", type=Path, help="a trace, as check takes it: the reference, if one is")
    parser.add_argument("b", type=Path, help="another")
    parser.add_argument("--all", action="store_true", help="print a line for each site")
    add_ignore_unknown(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, and print what was found."""
    from llama_layers.cli.terminal import print_report
    from llama_layers.verify import Trace, compare

    comparison = compare(Trace.load(args.a), Trace.load(args.b), ignore_unknown=args.ignore_unknown)
    args.status = comparison.exit_status
    if args.json:
        print(json.dumps(comparison.to_json(), indent=2))
    else:
        print_report(lambda width: comparison.text(every=args.all, width=width))
    return comparison.exit_status
