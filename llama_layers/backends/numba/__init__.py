"""Bodies for NumPy arrays compiled by numba, an optional extra, which is loaded when it is used."""

from __future__ import annotations

from llama_layers.backends.numba.attention import attend
from llama_layers.backends.numba.decode import decoder_layers
from llama_layers.backends.numba.linear import activations, linear_2d
from llama_layers.backends.numba.pointwise import gate_with_silu, normalise, rotate

BODIES = {
    "activations": activations,
    "attend": attend,
    "decoder_layers": decoder_layers,
    "gate_with_silu": gate_with_silu,
    "linear_2d": linear_2d,
    "normalise": normalise,
    "rotate": rotate,
}
