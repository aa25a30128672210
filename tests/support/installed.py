"""CuPy for tests: the stand-in in its place, and the real one where there is a GPU."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from types import ModuleType
from typing import Any

import array_api_compat
import pytest
from array_api_compat.common import _helpers

from llama_layers.backends.cupy import compile as kernels
from llama_layers.backends.cupy.detect import gpu_problem
from tests.support import cupy_stand_in as stand_in
from tests.support.emulator import emulates
from tests.support.fake_cublas import replaced

STAND_IN = pytest.param("stand-in", marks=pytest.mark.emulated)
GPUS = [STAND_IN, pytest.param("cupy", marks=pytest.mark.gpu)]
stand_in_alone = pytest.mark.parametrize("cupy", [STAND_IN], indirect=True)
"""For tests that ask what a GPU does not tell: how often, in which order, from where."""


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


@contextmanager
def gpu(kind: str) -> Iterator[ModuleType]:
    """CuPy for a test: the one of a real GPU, or all that stands in for one.

    To rehearse what is to run on a GPU, set LLAMA_LAYERS_REHEARSE: then all goes to the stand-in.
    """
    if kind == "cupy" and "LLAMA_LAYERS_REHEARSE" not in os.environ:
        yield real_cupy()
    elif not emulates():
        pytest.skip("needs Linux and a C++ compiler")
    else:
        with installed() as module, replaced():
            yield module


def real_cupy() -> ModuleType:
    """CuPy where it has a GPU; elsewhere the test is skipped."""
    if (problem := gpu_problem()) is not None:
        pytest.skip(problem)
    return importlib.import_module("cupy")


def on_device(numbers: Any) -> Any:
    """An array of CuPy's, or of what is in its place."""
    return importlib.import_module("cupy").asarray(numbers)


def times(cupy: ModuleType, on_gpu: int, emulated: int) -> int:
    """How often to do something: an emulated GPU takes its time."""
    return emulated if cupy is stand_in else on_gpu


def _forget() -> None:
    """What was looked up of the other CuPy, here or in array_api_compat."""
    for function in (*vars(_helpers).values(), *vars(kernels).values(), gpu_problem):
        if isinstance(function, _lru_cache_wrapper):
            function.cache_clear()
