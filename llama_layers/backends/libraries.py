"""Libraries that need not be installed or may be switched off; none is imported before its use."""

from __future__ import annotations

import importlib
import os
from typing import Any, TypeAlias

from llama_layers.arrays.types import Namespace

CupyArray: TypeAlias = Any
"""An array of CuPy, which has no type hints."""


def cupy() -> Namespace:
    """CuPy: a module that only loads where it is installed."""
    return importlib.import_module("cupy")


def switched_off(variable: str) -> str | None:
    """The value of an environment variable if it means no; None otherwise."""
    said = os.environ.get(variable, "1")
    return said if said.lower() in ("0", "false", "off", "no") else None
