"""Bodies for NumPy arrays that are faster than the portable ones."""

from llama_layers.backends.numpy.linear import linear_2d

BODIES = {"linear_2d": linear_2d}
