"""Whether the compiled bodies, an optional extra, can be used: asked without loading numba."""

from __future__ import annotations

from importlib.util import find_spec

from llama_layers.backends.libraries import switched_off


def compiled_problem() -> str | None:
    """Why NumPy's compiled bodies are not in use; None if they are."""
    if (said := switched_off("LLAMA_LAYERS_FAST")) is not None:
        return f"switched off by LLAMA_LAYERS_FAST={said}"
    missing = [name for name in ("numba", "threadpoolctl") if find_spec(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}: pip install 'llama-layers[fast]'"
    return None
