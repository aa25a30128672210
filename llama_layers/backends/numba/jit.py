"""How the kernels are compiled, and kept on disc."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Any

from numba import njit
from numba.core import event

PACKAGE = "llama_layers.backends.numba"


def _digest() -> str:
    """Of all sources of the kernels."""
    sources = sorted((f for f in files(PACKAGE).iterdir() if f.name.endswith(".py")), key=str)
    return hashlib.sha256(b"".join(f.read_bytes() for f in sources)).hexdigest()[:16]


_DIGEST = _digest()


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function when it is called first, and keep the result on disc.

    numba names its files after the function and looks whether the function's own file has changed,
    but not whether those have that hold what it calls. So all of them are in the name.
    """
    function.__qualname__ += f"-{_DIGEST}"
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder to keep it in: compile in each process
        return njit(**options)(function)


inside = partial(compiled, inline="always")
summing = partial(compiled, fastmath={"reassoc", "contract"})  # sums in an order that has vectors


class _Notice(event.Listener):
    """Says what takes so long, once, where somebody may be looking on."""

    def on_start(self, event_: Any) -> None:
        if event_.data["dispatcher"].py_func.__module__.startswith(PACKAGE):
            event.unregister("numba:compile", self)
            if sys.stderr.isatty() or "ipykernel" in sys.modules:
                print("llama_layers: compiling kernels, once ...", file=sys.stderr)

    def on_end(self, event_: Any) -> None:
        pass


event.register("numba:compile", _Notice())
