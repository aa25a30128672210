"""Functions that numba compiles. Loading numba takes a while: each module is loaded when used.

They are listed in ``__init__.pyi``.
"""

from llama_layers.lazy import attach_stub as _attach_stub

__getattr__, __dir__, __all__ = _attach_stub(__spec__)
