"""Bodies compiled by numba, an optional extra."""

from __future__ import annotations

from llama_layers.backends.numpy.fast.decode import decoder_layers
from llama_layers.backends.numpy.fast.linear import activations, linear_2d

BODIES = {"activations": activations, "decoder_layers": decoder_layers, "linear_2d": linear_2d}
