"""Wrong bodies for functions, and how they are put in place of the right ones."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from llama_layers.backends.trust import Body

NOT_NAMED = "not named"
"""The cause of a bug that `check` finds and has no name for."""


@dataclass(frozen=True)
class Wrong:
    """A bug: a function of the package computes something else."""

    path: str
    """``module:function`` or ``module:Class.method``. In the module that defines a function it
    stands for every use, and in one that imported it for the uses there."""
    body: Callable[..., Any]
    """Called with the right function and then the arguments."""
    caught_by: str
    """The test that must fail: a pytest node id below ``tests/``."""
    cause: str | None = None
    """What `check` must name first when a port has this bug. None if the bug changes no activation
    of the models in port.py: it is about other dtypes, refused arguments, or text generation."""

    @property
    def name(self) -> str:
        """What is wrong, in words."""
        return self.body.__name__.replace("_", " ")


BUGS: list[Wrong] = []
"""Every bug; see bugs/__init__.py."""


def wrong(path: str, caught_by: str, cause: str | None = None) -> Callable[..., Any]:
    """Record the decorated function as a bug, which is named as the function is."""

    def record(body: Callable[..., Any]) -> Callable[..., Any]:
        BUGS.append(Wrong(path, body, caught_by, cause))
        return body

    return record


def plant(bug: Wrong) -> None:
    """Put a bug into the loaded package, for the rest of this process."""
    module, owner, name = _place(bug.path)
    right = vars(owner)[name]
    if owner is not module:  # a class
        setattr(owner, name, _method(right, bug.body))
        return
    replacement = _calling(bug.body, right)
    if right.__module__ != module.__name__:
        setattr(module, name, replacement)
        return
    for holder in _dictionaries():
        for key, value in list(holder.items()):
            if value is right:
                holder[key] = replacement
            elif isinstance(value, Body) and value.function is right:
                holder[key] = replace(value, function=replacement)


def _place(path: str) -> tuple[ModuleType, Any, str]:
    """The module of a path, the module or class that has the function, and the function's name."""
    module_name, _, qualified = path.partition(":")
    *classes, name = qualified.split(".")
    try:
        module = importlib.import_module(module_name)
        owner = functools.reduce(getattr, classes, module)
        vars(owner)[name]
    except (ImportError, AttributeError, KeyError) as error:
        raise LookupError(f"{path} is stale: {type(error).__name__}: {error}") from error
    return module, owner, name


def _calling(body: Callable[..., Any], right: Callable[..., Any]) -> Callable[..., Any]:
    """A function like the right one, with the wrong body."""

    @functools.wraps(right)
    def planted(*args: Any, **kwargs: Any) -> Any:
        return body(right, *args, **kwargs)

    del vars(planted)["__wrapped__"]  # nothing gets round the bug
    return planted


def _method(right: Any, body: Callable[..., Any]) -> Any:
    """What to put into a class: a classmethod or property where the right one is."""
    if isinstance(right, classmethod):
        return classmethod(_calling(body, right.__func__))
    if isinstance(right, property):
        assert right.fget is not None
        return property(_calling(body, right.fget))
    return _calling(body, right)


def _dictionaries() -> Iterator[dict[str, Any]]:
    """The namespaces of all modules of the package and its tests, and the dicts in them.

    The latter are tables of functions, such as the bodies of a backend. Bugs themselves go on
    using what is right.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(("llama_layers", "tests.")) and not name.startswith(
            "tests.planted.bugs"
        ):
            yield from _nested(vars(module))


def _nested(outer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield outer
    for name, inner in list(outer.items()):
        if type(inner) is dict and name != "__builtins__":
            yield from _nested(inner)
