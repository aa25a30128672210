"""Llama's layers as functions on NumPy-style arrays.

The names below are loaded when they are first used, so that importing the package loads no array
library. They are listed in ``__init__.pyi``.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
