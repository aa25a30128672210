"""Messages about what takes long, for somebody who may be watching."""

from __future__ import annotations

import sys


def announce(message: str) -> None:
    """Write a line to stderr, if that is a terminal or a notebook."""
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        print(f"llama_layers: {message} ...", file=sys.stderr)
