"""Files to weights and back: Hugging Face directories, safetensors, GGUF, and known models.

The names below are loaded when they are first used. They are listed in ``__init__.pyi``.
"""

from llama_layers.lazy import attach_stub as _attach_stub

__getattr__, __dir__, __all__ = _attach_stub(__spec__)
