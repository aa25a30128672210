"""The stand-in for CuPy, for every test here that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from installed import installed


@pytest.fixture
def cupy() -> Iterator[ModuleType]:
    """CuPy, as far as it can be had without a GPU."""
    with installed() as module:
        yield module
