"""Bodies for NumPy arrays that are faster than the portable ones."""

from __future__ import annotations

from typing import Any

from llama_layers.backends.dtypes import accumulate_format, float_format
from llama_layers.backends.numpy.linear import linear_2d


def activations(xp: Any, x: Any) -> Any:
    """Embeddings widened to float32 at least: NumPy is slow in narrower formats."""
    return x.astype(accumulate_format(float_format("x", x)).name, copy=False)


BODIES = {"linear_2d": linear_2d, "activations": activations}
