"""How the kernels are compiled, and kept on disc."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event

from llama_layers.files.progress import announce


def _digest() -> str:
    """A digest of all sources that kernels are compiled from."""
    here = Path(__file__).parent
    sources = sorted((*here.glob("*.py"), *here.parent.glob("*.py")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


_DIGEST = _digest()


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function when it is called first, and keep the result on disc.

    numba names its files after the function, and compiles again if the function's own file has
    changed, but not if another has changed that holds what it calls. So the name has a digest.
    """
    function.__qualname__ += f"-{_DIGEST}"
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder to keep it in
        _say_once(
            "each process compiles kernels again, since no directory can be written to keep them "
            "in; NUMBA_CACHE_DIR names one"
        )
        return njit(**options)(function)


_say_once = cache(announce)


inlined = partial(compiled, inline="always")
reordering_sums = partial(compiled, fastmath={"reassoc", "contract"})  # so that LLVM vectorises


class _Notice(event.Listener):
    """Announces the first compilation of a kernel in this process."""

    def on_start(self, event_: Any) -> None:
        if event_.data["dispatcher"].py_func.__module__.startswith(__package__):
            event.unregister("numba:compile", self)
            announce("compiling kernels, once ...")

    def on_end(self, event_: Any) -> None:
        pass


event.register("numba:compile", _Notice())
