"""Where numba is not installed, the modules that need it cannot be looked through for doctests."""

from importlib.util import find_spec

FAST = "llama_layers/backends/numpy/fast"
collect_ignore = [] if find_spec("numba") else [f"{FAST}/gemm.py", f"{FAST}/kernels.py"]
