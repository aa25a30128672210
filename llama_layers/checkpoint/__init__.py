"""Files to weights and back: Hugging Face directories, safetensors, GGUF, and known models.

The names below are loaded when they are first used. They are listed in ``__init__.pyi``.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
