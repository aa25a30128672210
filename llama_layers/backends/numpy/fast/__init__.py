"""Bodies compiled by numba, an optional extra."""

from __future__ import annotations

from llama_layers.backends.numpy.fast.attention import attend
from llama_layers.backends.numpy.fast.decode import decoder_layers
from llama_layers.backends.numpy.fast.linear import activations, linear_2d
from llama_layers.backends.numpy.fast.pointwise import gate_with_silu, normalise, turn

BODIES = {
    "activations": activations,
    "attend": attend,
    "decoder_layers": decoder_layers,
    "gate_with_silu": gate_with_silu,
    "linear_2d": linear_2d,
    "normalise": normalise,
    "turn": turn,
}
