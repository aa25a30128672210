"""The stand-in in the place of CuPy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from types import ModuleType

import array_api_compat
import cupy_stand_in as stand_in
import pytest
from array_api_compat.common import _helpers

from llama_layers.backends.cupy import compile as kernels


@contextmanager
def installed() -> Iterator[ModuleType]:
    """CuPy, as far as it can be had without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", stand_in)
        patch.setitem(sys.modules, "array_api_compat.cupy", stand_in)
        patch.setattr(array_api_compat, "cupy", stand_in, raising=False)
        _forget()
        yield stand_in
        stand_in.Device().synchronize()
        stand_in.SEED, stand_in.Stream.eager = 0, False
    _forget()


def _forget() -> None:
    """What was looked up of the other CuPy, here or in array_api_compat."""
    for function in (*vars(_helpers).values(), *vars(kernels).values()):
        if isinstance(function, _lru_cache_wrapper):
            function.cache_clear()
