"""Hypothesis strategies and assertions for test suites, this project's and other people's.

The strategies need Hypothesis (``pip install 'llama-layers[testing]'``), which is imported when the
first of them is used; the assertions need nothing more.
"""

from llama_layers.lazy import attach_stub as _attach_stub

__getattr__, __dir__, __all__ = _attach_stub(__spec__)
