"""Whether a body may serve on this machine: only after a trial has shown that it is right.

Before a body first serves it is tried on small inputs, where it has to stay within the bound of its
definition. The result is remembered for this machine. ``LLAMA_LAYERS_VERIFY=0`` in the environment
trusts all bodies untried.

The trials need the bounds, which stand above the backends. So they are loaded by name, here alone,
when a body is first tried.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from llama_layers.arrays.dispatch import Function, definitions
from llama_layers.backends import machine
from llama_layers.backends.libraries import cupy, switched_off
from llama_layers.backends.trial_results import TrialResult, TrialResults
from llama_layers.errors import BackendError, one_line
from llama_layers.files.progress import announce

P = ParamSpec("P")
T = TypeVar("T")

# Errors that come from the caller's memory or settings, and say nothing about a body.
OF_THE_CALLER = (MemoryError, FloatingPointError, Warning)

settled: dict[Function, bool] = {}
"""Whether a function may serve, for those that were asked for in this process."""

_PACKAGE = Path(__file__).parents[1]
_lock = threading.RLock()


def _renew() -> None:
    """Replace the lock in a forked child, where no thread would ever release it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def takes(predicate: Callable[..., bool]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function return NotImplemented unless a predicate accepts its arguments.

    The predicate must not compute: it is asked before the function is tried, and an untried
    function must not touch the caller's arrays.
    """

    def mark(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def checked(*args: Any) -> Any:
            return function(*args) if predicate(*args) else NotImplemented  # type: ignore[call-arg]

        vars(checked)["takes"] = predicate
        return cast(Callable[P, T], checked)

    return mark


@dataclass(frozen=True, slots=True)
class Body:
    """A function that replaces a definition, for arrays of a library, where it is trusted."""

    library: str
    route: str
    name: str
    function: Function

    def __str__(self) -> str:
        return f"{self.name} by {self.route}"

    def __call__(self, *args: Any) -> Any:
        """Compute, or return NotImplemented where the function does not serve."""
        function = self.function
        if not settled.get(function) and not _may_serve(self, args):
            return NotImplemented
        try:
            return function(*args)
        except Exception as error:  # a compiler or a driver raises errors of its own
            if _unwatched() or isinstance(error, OF_THE_CALLER):
                raise
            return _rescued(self, error, args)


def trusted(library: str, **routes: Mapping[str, Any]) -> dict[str, dict[str, Function]]:
    """The functions of some routes, the fastest route first, as bodies that are tried first."""
    return {
        route: {name: Body(library, route, name, function) for name, function in named.items()}
        for route, named in routes.items()
    }


def _may_serve(body: Body, args: tuple[Any, ...]) -> bool:
    """Whether a body that is not known to be right may serve: if need be, try it."""
    if (known := settled.get(body.function)) is not None:
        return known
    predicate = getattr(body.function, "takes", None)
    if predicate is not None and not predicate(*args):
        return False  # and no reason to try it, which may load numba
    with _lock:
        if (known := settled.get(body.function)) is not None:
            return known
        result = None if _unwatched() else _found(body)
        use = settled[body.function] = result is None or result.passed
        if result is not None and not use:
            _warn(body, str(result.problem))
        return use


def _rescued(body: Body, error: Exception, args: tuple[Any, ...]) -> Any:
    """The definition's result after a body raised, which does not serve any more.

    If the definition raises, too, the arguments are to blame and the body goes on to serve.
    """
    result = definitions[body.name](*args)
    with _lock:
        if settled.get(body.function):
            settled[body.function] = False
            _warn(body, reason(error))
    return result


def reason(error: BaseException) -> str:
    """An error as the problem of a result, on one line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return one_line(f"{type(error).__name__}: {first}" if first else type(error).__name__)


def _unwatched() -> bool:
    return switched_off("LLAMA_LAYERS_VERIFY") is not None


def _found(body: Body) -> TrialResult:
    results = _results(body.library)
    ours = _is_ours(body)
    result = results.get(str(body)) if ours else None
    if result is None:
        if body.library == "cupy" and cupy().cuda.get_current_stream().is_capturing():
            raise BackendError(
                f"{body} was not tried on this GPU yet, and cannot be while a stream captures: "
                "run it once before"
            )
        if body.route not in ("NumPy", "CuPy"):  # it is compiled first
            announce(f"trying {body} on this machine, once ...")
        result, lasts = tried(body)
        if lasts and ours:
            results.put(str(body), result)
    return result


def tried(body: Body) -> tuple[TrialResult, bool]:
    """The result of a body's trial, and whether it would be the same another time."""
    trials: Any = importlib.import_module("llama_layers.trial")
    try:
        return trials.try_body(body), True
    except Exception as error:  # a compiler or a driver raises errors of its own
        return TrialResult(None, reason(error)), not isinstance(error, MemoryError | OSError)


def remember(body: Body, result: TrialResult) -> None:
    """Replace the result of a body's trial on this machine."""
    with _lock:
        if _is_ours(body):
            _results(body.library).put(str(body), result)
        settled[body.function] = result.passed


def _is_ours(body: Body) -> bool:
    """Whether a body is of our sources, on which results depend, and not put in by a caller."""
    function: Any = body.function
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not Path(code.co_filename).is_relative_to(_PACKAGE):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


@cache
def _results(library: str) -> TrialResults:
    """The results of this machine, read once in a process."""
    return TrialResults(library)


def _warn(body: Body, problem: str) -> None:
    warnings.warn(
        f"{body} is not used on {machine.summary(body.library)}: {problem}. Slower code serves; "
        "`llama-layers info --verify` tries again.",
        RuntimeWarning,
        stacklevel=2,
    )
