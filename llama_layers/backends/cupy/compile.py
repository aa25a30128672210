"""CUDA C sources to kernels, and kernels to the GPU."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from llama_layers.backends.libraries import cupy

KERNELS = files("llama_layers.backends.cupy") / "kernels"

FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2}
"""Values of the macro FORMAT; the sources know each by its name in capitals."""
CONSTANTS = {
    "attend": {"CHUNK": 64, "WARPS": 4, "JOINING": 16},
    "gemv": {"WARPS": 4},
    "norm": {"THREADS": 512},
    "pointwise": {"THREADS": 256},
    "softmax": {"THREADS": 256},
    "tokens": {"THREADS": 256, "OWN": 8},
}
"""Numbers that a source and its launches share."""

Macros = tuple[tuple[str, int | str], ...]


@cache
def text(source: str) -> str:
    """The text of a source, after its constants and what all sources share.

    It is put together here and not by ``#include``: NVRTC needs no path then, and CuPy's cache of
    compiled kernels, which does not look into headers, sees every change.
    """
    constants = {name.upper(): number for name, number in FORMATS.items()} | CONSTANTS.get(
        source, {}
    )
    parts = [f"#define {name} {number}" for name, number in constants.items()]
    for name in ("common.cuh", f"{source}.cu"):
        parts += [f'#line 1 "{name}"', (KERNELS / name).read_text("utf-8")]
    return "\n".join(parts) + "\n"


def options(macros: Macros) -> tuple[str, ...]:
    """Options for NVRTC, apart from the architecture."""
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in macros))


@cache
def module(source: str, macros: Macros) -> Any:
    """A source compiled with some macros, once in a process for each."""
    return cupy().RawModule(code=text(source), options=options(macros))


@cache
def _kernel(source: str, name: str, macros: Macros) -> Any:
    return module(source, macros).get_function(name)


def launch(
    source: str,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: tuple[Any, ...],
    **macros: int | str,
) -> None:
    """Run a kernel on the current stream.

    `args` are CuPy arrays, NumPy scalars of the very type in the signature, and None for a null
    pointer. A kernel sees nothing of an array but its address, and would silently misread one that
    is not C-contiguous.
    """
    kernel = _kernel(source, name, tuple(sorted(macros.items())))
    kernel(grid, block, tuple(map(_argument, args)))


def _argument(value: Any) -> Any:
    if value is None:
        return np.uint64(0)
    if isinstance(value, np.generic):
        return value
    if not value.flags.c_contiguous:
        raise ValueError(
            f"a kernel takes C-contiguous arrays, got shape {list(value.shape)} with strides "
            f"{list(value.strides)}"
        )
    return value
