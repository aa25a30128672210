"""Whether the compiled bodies, an optional extra, can be used: asked without loading numba."""

from __future__ import annotations

import os
from importlib.util import find_spec


def compiled_problem() -> str | None:
    """Why NumPy's compiled bodies are not in use; None if they are."""
    said = os.environ.get("LLAMA_LAYERS_FAST", "1")
    if said.lower() in ("0", "false", "off", "no"):
        return f"switched off by LLAMA_LAYERS_FAST={said}"
    missing = [name for name in ("numba", "threadpoolctl") if find_spec(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}: pip install 'llama-layers[fast]'"
    return None
