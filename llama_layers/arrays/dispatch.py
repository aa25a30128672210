"""One definition, faster bodies.

A function marked with `portable` is a definition in array API terms. A backend that computes the
same faster for its own arrays lists bodies of that name in its ``ROUTES``, the fastest route first.
A body returns NotImplemented for arguments that it does not serve. Then the next one is asked, and
after the last the definition computes.

The backends stand above the definitions that they replace. So they are loaded by name, here alone,
when arrays of their library first come.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, ValuesView
from contextlib import contextmanager
from functools import wraps
from threading import get_ident
from typing import Any, ParamSpec, TypeVar, cast

from llama_layers.arrays.namespaces import library
from llama_layers.arrays.types import Namespace

P = ParamSpec("P")
T = TypeVar("T")
Function = Callable[..., Any]
Bodies = Mapping[str, Function]

LIBRARIES = ("numpy", "cupy", "jax")

definitions: dict[str, Function] = {}
"""The definitions by name, as they are without faster bodies."""
_routes: dict[str, dict[str, dict[str, Function]]] = {}
_only: dict[int, Bodies] = {}
"""The bodies of threads that are inside `only`."""


def portable(definition: Callable[P, T]) -> Callable[P, T]:
    """Let faster bodies serve for a definition.

    Its arguments are positional, and the namespace is the first.
    """
    name = definition.__name__
    definitions.setdefault(name, definition)

    @wraps(definition)
    def call(*args: Any) -> Any:
        chosen = _only.get(get_ident()) if _only else None
        for bodies in _tables(args[0]) if chosen is None else (chosen,):
            if (body := bodies.get(name)) is not None:
                result = body(*args)
                if result is not NotImplemented:
                    return result
        return definition(*args)  # type: ignore[call-arg]

    return cast(Callable[P, T], call)


@contextmanager
def only(bodies: Bodies) -> Iterator[None]:
    """Let these bodies alone serve in this thread, and the definitions where they do not."""
    thread = get_ident()
    before = _only.get(thread)
    _only[thread] = bodies
    try:
        yield
    finally:
        del _only[thread]
        if before is not None:
            _only[thread] = before


def _tables(xp: Namespace) -> ValuesView[dict[str, Function]]:
    # Not a cache of functools, of which torch.compile warns.
    if (found := _routes.get(xp.__name__)) is None:
        found = _routes[xp.__name__] = routes(library(xp))
    return found.values()


def routes(library_name: str) -> dict[str, dict[str, Function]]:
    """The bodies for a library's arrays by route, the fastest route first."""
    if library_name not in LIBRARIES:
        return {}
    backend: Any = importlib.import_module(f"llama_layers.backends.{library_name}")
    return backend.ROUTES
