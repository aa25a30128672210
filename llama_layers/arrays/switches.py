"""Environment variables that switch something off."""

from __future__ import annotations

import os


def switched_off(variable: str) -> str | None:
    """What an environment variable says, if it says no; None otherwise."""
    said = os.environ.get(variable, "1")
    return said if said.lower() in ("0", "false", "off", "no") else None
