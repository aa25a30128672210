"""Bodies that are tried before they serve, with a cache directory of the test's own."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from functools import wraps
from unittest import mock

import pytest

from llama_layers.backends import dispatch, trust
from llama_layers.backends.dispatch import routes


def forget():
    """As a new process would begin."""
    dispatch.settled.clear()
    trust._verdicts.cache_clear()


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """The cache directory."""
    monkeypatch.setenv("LLAMA_LAYERS_VERIFY", "1")
    monkeypatch.setenv("LLAMA_LAYERS_CACHE", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def planted(library, route, name, body):
    """A context in which one body is all that there is beside the definitions."""
    return mock.patch.dict(routes(library), {route: {name: body}}, clear=True)


def spoiled(body, spoil):
    """A body whose result is changed; it takes what the right one takes."""

    @wraps(body)
    def wrong(*arguments):
        return spoil(body(*arguments), *arguments)

    return wrong


@contextmanager
def one_warning(match):
    """Exactly one RuntimeWarning, with some text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [one.category for one in caught] == [RuntimeWarning], [str(w.message) for w in caught]
    assert match in str(caught[0].message), caught[0].message
