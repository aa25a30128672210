"""The compiled bodies before NumPy's own, whatever the environment says."""

from __future__ import annotations

from unittest import mock

from llama_layers.backends import numba as fast
from llama_layers.backends.numpy import BODIES, ROUTES
from llama_layers.backends.trust import trusted


def compiled_first():
    """A context in which they are."""
    return mock.patch.dict(ROUTES, trusted("numpy", numba=fast.BODIES, NumPy=BODIES), clear=True)
