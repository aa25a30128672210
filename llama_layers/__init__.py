"""Llama's layers as functions on NumPy-style arrays.

The names below are loaded when they are first used, so that importing the package loads no array
library. They are listed in ``__init__.pyi``.
"""

from llama_layers.lazy import attach_stub as _attach_stub
from llama_layers.version import __version__ as __version__

__getattr__, __dir__, __all__ = _attach_stub(__spec__)
