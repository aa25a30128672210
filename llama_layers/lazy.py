"""Public names that are loaded when they are first used, so that importing a package is fast."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from typing import Any

import lazy_loader


def attach_stub(spec: Any) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make ``__getattr__``, ``__dir__`` and ``__all__`` of a package from its ``__init__.pyi``.

    The loader of the package reads that file, from an archive, too; lazy_loader reads directories
    only.
    """
    stub = spec.loader.get_data(os.path.join(spec.submodule_search_locations[0], "__init__.pyi"))
    names: dict[str, list[str]] = {"": []}  # by module; modules themselves under ""
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ImportFrom):
            names.setdefault(node.module or "", []).extend(alias.name for alias in node.names)
    return lazy_loader.attach(spec.name, names.pop(""), names)
