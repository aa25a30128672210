"""``llama-layers compare``: two traces side by side, without a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llama_layers.cli.options import Commands, add_force, add_ignore_unknown, add_json
from llama_layers.cli.outputs import check_outputs


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
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page, too")
    add_force(parser)
    add_ignore_unknown(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, and print what was found."""
    from llama_layers.cli.terminal import print_report
    from llama_layers.verify import Trace, compare, write_html

    check_outputs([args.html], args.force, model=None, read=[args.a, args.b])
    comparison = compare(Trace.load(args.a), Trace.load(args.b), ignore_unknown=args.ignore_unknown)
    args.status = comparison.exit_status
    if args.html is not None:
        write_html(comparison, args.html, force=args.force)
    if args.json:
        print(json.dumps(comparison.to_json(), indent=2))
        return comparison.exit_status
    print_report(lambda width: comparison.text(every=args.all, width=width))
    if args.html is not None:
        print(f"written {args.html}")
    return comparison.exit_status
