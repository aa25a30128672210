"""Bodies for CuPy arrays that are faster than the portable ones.

Nothing here imports CuPy: the arrays bring their own methods.
"""

from llama_layers.backends.cupy.linear import linear_2d

BODIES = {"linear_2d": linear_2d}
