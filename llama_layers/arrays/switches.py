"""Environment variables that switch something off."""

from __future__ import annotations

import os


def switched_off(variable: str) -> str | None:
    """The value of an environment variable if it means no; None otherwise."""
    said = os.environ.get(variable, "1")
    return said if said.lower() in ("0", "false", "off", "no") else None
