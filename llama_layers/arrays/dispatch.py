"""One definition, faster bodies.

A function marked with `portable` is a definition in array API terms. A backend that can compute
the same faster for its own arrays lists bodies of the same name in its ``ROUTES``, the fastest
first. The first that takes the arguments and can be trusted on this machine serves; the definition
serves if none does. Nothing else chooses between them.

Bodies stand above the definitions, and what trusts them above both, so both are loaded by their
names and never imported from here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from threading import get_ident
from typing import Any, NamedTuple, ParamSpec, TypeVar

from llama_layers.arrays.namespaces import library

P = ParamSpec("P")
T = TypeVar("T")
Body = Callable[..., Any]
Bodies = dict[str, Body]

LIBRARIES = ("numpy", "cupy", "jax")


class Offer(NamedTuple):
    """A body, what it computes, for which library and by which route."""

    library: str
    route: str
    name: str
    body: Body

    def __str__(self) -> str:
        return f"{self.name} by {self.route}"


settled: dict[Body, bool] = {}
"""Whether a body may serve, for those that were asked for in this process: see trust.py."""
_alone: dict[int, Mapping[str, Body]] = {}


def takes(predicate: Callable[..., bool]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Say which arguments a body takes; others go to the next body.

    To ask must not compute: what a body does with arrays is unknown until it was tried on some
    that nobody needs.
    """

    def mark(body: Callable[P, T]) -> Callable[P, T]:
        vars(body)["takes"] = predicate
        return body

    return mark


def portable(definition: Callable[P, T]) -> Callable[P, T]:
    """Let backends replace a definition, called with the namespace first, for their arrays."""
    name = definition.__name__

    @wraps(definition)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _alone and (chosen := _alone.get(get_ident())) is not None:
            body = chosen.get(name)
            if body is None or not taken(body, *args, **kwargs):
                body = definition
            return body(*args, **kwargs)
        owner = library(args[0])
        for route, bodies in routes(owner).items():
            if (body := bodies.get(name)) is None:
                continue
            predicate = getattr(body, "takes", None)  # not by a call: this is the way of each token
            if predicate is not None and not predicate(*args, **kwargs):
                continue
            if (use := settled.get(body)) is None:
                use = _trust().trusted(Offer(owner, route, name, body))
            if not use:
                continue
            try:
                return body(*args, **kwargs)  # type: ignore[no-any-return]
            except Exception as error:  # a body may raise what no definition does
                if not _trust().bypassed(Offer(owner, route, name, body), error):
                    raise
        return definition(*args, **kwargs)

    return call


def taken(body: Body, *args: Any, **kwargs: Any) -> bool:
    """Whether a body takes its arguments, the namespace first."""
    predicate = getattr(body, "takes", None)
    return predicate is None or bool(predicate(*args, **kwargs))


@contextmanager
def only(bodies: Mapping[str, Body]) -> Iterator[None]:
    """Let this thread compute by these bodies, trusted or not, and else by the definitions."""
    thread = get_ident()
    before = _alone.get(thread)
    _alone[thread] = bodies
    try:
        yield
    finally:
        del _alone[thread]
        if before is not None:
            _alone[thread] = before


@cache
def routes(library_name: str) -> dict[str, Bodies]:
    """The bodies for a library's arrays by route, the fastest route first."""
    if library_name not in LIBRARIES:
        return {}
    found: dict[str, Bodies] = importlib.import_module(
        f"llama_layers.backends.{library_name}"
    ).ROUTES
    return found


def _trust() -> Any:
    return importlib.import_module("llama_layers.backends.trust")
