"""One definition, faster bodies.

A function marked with `portable` is a definition in array API terms. A backend that can compute
the same faster for its own arrays lists a body of the same name in its ``BODIES``; nothing else
chooses between them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

from llama_layers.backends.namespaces import library

P = ParamSpec("P")
T = TypeVar("T")


def portable(definition: Callable[P, T]) -> Callable[P, T]:
    """Let backends replace a definition, called with the namespace first, for their arrays."""
    name = definition.__name__

    @wraps(definition)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        body: Callable[P, T] = _bodies(library(args[0])).get(name, definition)
        return body(*args, **kwargs)

    return call


@cache
def _bodies(library_name: str) -> dict[str, Callable[..., Any]]:
    if library_name not in ("numpy", "cupy", "jax"):
        return {}
    bodies: dict[str, Callable[..., Any]] = importlib.import_module(
        f"llama_layers.backends.{library_name}"
    ).BODIES
    return bodies
