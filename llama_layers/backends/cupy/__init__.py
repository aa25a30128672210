"""Bodies for CuPy arrays that are faster than the portable ones.

Nothing here imports CuPy: the arrays bring their own methods.
"""

from llama_layers.backends.cupy.attention import attend
from llama_layers.backends.cupy.decode import decoder_layers
from llama_layers.backends.cupy.generation import decode_loop
from llama_layers.backends.cupy.linear import by_cublas, by_cupy, by_kernel
from llama_layers.backends.cupy.pointwise import gate_with_silu, normalise, rotate
from llama_layers.backends.trust import trusted

BODIES = {
    "attend": attend,
    "decoder_layers": decoder_layers,
    "decode_loop": decode_loop,
    "gate_with_silu": gate_with_silu,
    "linear_2d": by_kernel,
    "normalise": normalise,
    "rotate": rotate,
}

ROUTES = trusted("cupy", CUDA=BODIES, cuBLAS={"linear_2d": by_cublas}, CuPy={"linear_2d": by_cupy})
