"""An array library's version, device and settings, for the record."""

from __future__ import annotations

import os
import sys

from llama_layers.arrays.namespaces import device, library
from llama_layers.arrays.types import Array, Namespace


def describe(xp: Namespace, array: Array) -> dict[str, str]:
    """Library, version, device, and whether float32 products may be computed in fewer bits."""
    name = library(xp)
    module = sys.modules[name]  # loaded, since the array is of it
    return {
        "library": name,
        "library_version": str(getattr(module, "__version__", "unknown")),
        "device": str(device(array)),
        "tf32": _tf32(name, module),
    }


def _tf32(name: str, module: Namespace) -> str:
    """The library's own setting; "no" if it has none."""
    if name == "torch":
        return str(module.get_float32_matmul_precision())
    if name == "jax":
        return str(module.config.jax_default_matmul_precision or "default")
    if name == "cupy":
        return "yes" if os.environ.get("CUPY_TF32") == "1" else "no"
    return "no"
