"""Array libraries that need not be installed, imported when they are first needed."""

from __future__ import annotations

import importlib
from typing import Any


def cupy() -> Any:
    """CuPy: a module that only loads where it is installed."""
    return importlib.import_module("cupy")
