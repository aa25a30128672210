"""CuPy for the tests here: a real GPU's, with ``-m gpu``, and what stands in for it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.conftest import Backend, backend_on
from tests.support.fake_cublas import FakeCublas, replaced
from tests.support.installed import GPUS, gpu


@pytest.fixture(params=GPUS)
def cupy(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """CuPy, on each device that can be had."""
    with gpu(request.param) as module:
        yield module


@pytest.fixture(scope="module", params=GPUS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The same as a backend."""
    with gpu(request.param) as module:
        yield backend_on(module)


@pytest.fixture
def library(cupy: ModuleType) -> Iterator[FakeCublas]:
    """The library in the place of libcublas."""
    with replaced() as fake:
        yield fake
