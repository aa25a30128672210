"""Array libraries that need not be installed, imported when they are first needed."""

from __future__ import annotations

import importlib
from typing import Any, TypeAlias

from llama_layers.arrays.types import Namespace

CupyArray: TypeAlias = Any
"""An array of CuPy, which has no type hints."""


def cupy() -> Namespace:
    """CuPy: a module that only loads where it is installed."""
    return importlib.import_module("cupy")
