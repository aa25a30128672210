"""Bodies for NumPy arrays that are faster than the portable ones.

Memory order: BLAS multiplies ``(weight @ x.T).T`` faster than ``x @ weight.T``, and leaves the
result in Fortran order, where the tokens of a channel are neighbours in memory. Adding two arrays
in different orders takes many times as long as in the same. So all activations have this order:
`activations` begins it, and the other bodies keep the order of their arguments. Only speed depends
on it (docs/cpu.md).
"""

from __future__ import annotations

import numpy as np

from llama_layers.arrays.dtypes import accumulate_format, float_format
from llama_layers.arrays.types import Namespace
from llama_layers.backends.numba import BODIES as COMPILED
from llama_layers.backends.numba.detect import compiled_problem
from llama_layers.backends.numpy.attention import attend
from llama_layers.backends.numpy.linear import linear_2d
from llama_layers.backends.numpy.pointwise import gate_with_silu, normalise, rotate
from llama_layers.backends.trust import trusted


def activations(xp: Namespace, x: np.ndarray) -> np.ndarray:
    """Embeddings in float32 at least, since NumPy is slow in narrower formats; in Fortran order."""
    wide = accumulate_format(float_format("x", x)).name
    return np.asarray(x.reshape(-1, x.shape[-1]), wide, order="F").reshape(x.shape)


BODIES = {
    "activations": activations,
    "attend": attend,
    "gate_with_silu": gate_with_silu,
    "linear_2d": linear_2d,
    "normalise": normalise,
    "rotate": rotate,
}
ROUTES = trusted("numpy", NumPy=BODIES)
if compiled_problem() is None:
    ROUTES = trusted("numpy", numba=COMPILED) | ROUTES
