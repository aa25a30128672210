"""Packages that only some files need."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType


def require(package: str, purpose: str, extra: str = "models") -> ModuleType:
    """Import a package of an extra, or say how to install it and what needs it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(
            f"{purpose} needs the package {package}: pip install 'llama-layers[{extra}]'",
            name=package,
        ) from None


def require_installed(package: str, purpose: str) -> None:
    """Raise what `require` would, without the time that an import takes."""
    if package not in sys.modules and importlib.util.find_spec(package) is not None:
        return
    require(package, purpose)
