"""Hypothesis strategies and assertions for test suites, this project's and other people's.

The strategies need Hypothesis (``pip install 'llama-layers[testing]'``), which is imported when the
first of them is used; the assertions need nothing more.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
