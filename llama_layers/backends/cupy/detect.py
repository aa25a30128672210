"""Whether CuPy can compute on a GPU here."""

from __future__ import annotations

import importlib
from functools import cache


@cache
def gpu_problem() -> str | None:
    """What keeps CuPy from computing here, and what to do about it; None if nothing does.

    Looked at once in a process. An importable CuPy with a driver may still lack cuBLAS or NVRTC,
    so one tiny product is computed.
    """
    importlib.import_module("ml_dtypes")  # CuPy learns bfloat16 from it, at import
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        return (
            f"CuPy cannot be imported ({error}): pip install cupy-cuda12x or "
            f"cupy-cuda13x, whichever CUDA the driver supports"
        )
    if not cupy.is_available():
        return "CuPy finds no CUDA device: it needs an NVIDIA GPU and its driver (see nvidia-smi)"
    try:
        two = cupy.full((2, 2), 2.0, dtype=cupy.float32)
        ok = bool(cupy.all(two @ two == 8.0))
    except (RuntimeError, ImportError, OSError) as error:
        return (
            f"CuPy finds a GPU but cannot compute on it ({type(error).__name__}: {error}): "
            f"install the CUDA libraries, pip install 'cupy-cuda12x[ctk]' or 'cupy-cuda13x[ctk]'"
        )
    return None if ok else "CuPy computes a wrong product on this GPU: check its driver"
