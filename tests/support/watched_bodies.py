"""Bodies that are tried before they serve, with a cache directory of the test's own."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from functools import wraps
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from llama_layers.arrays.dispatch import routes
from llama_layers.backends import trust
from llama_layers.layers.attention import attend
from llama_layers.layers.linear import linear_2d
from llama_layers.layers.mask import Mask
from llama_layers.layers.mlp import gate_with_silu
from llama_layers.layers.norm import normalise
from llama_layers.layers.rope import rotate
from llama_layers.model.embedding import activations

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DEFINITIONS = {
    function.__name__: function
    for function in (activations, attend, gate_with_silu, linear_2d, normalise, rotate)
}


def forget():
    """As a new process would begin."""
    trust.settled.clear()
    trust._results.cache_clear()


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
    chain = trust.trusted(library, **{route: {name: body}})
    return mock.patch.dict(routes(library), chain, clear=True)


def spoiled(body, spoil):
    """A body whose result is changed; it takes what the right one takes."""

    @wraps(body)
    def wrong(*arguments):
        result = body(*arguments)
        return result if result is NotImplemented else spoil(result, *arguments)

    return wrong


@contextmanager
def one_warning(match):
    """Exactly one RuntimeWarning, with some text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [one.category for one in caught] == [RuntimeWarning], [str(w.message) for w in caught]
    assert match in str(caught[0].message), caught[0].message


def inputs(name):
    """What the dispatcher is called with, beside the namespace."""
    rng = np.random.default_rng(0)
    x, other = rng.standard_normal((2, 2, 3, 2, 8), dtype=np.float32)
    angles = rng.uniform(-1, 1, (2, 1, 3, 4)).astype(np.float32)
    matrix, weight = rng.standard_normal((6, 8), dtype=np.float32), np.ones(8, np.float32)
    return {
        "activations": (x[0],),
        "attend": (x, x, other, Mask(np.arange(3), np.arange(3)), 0.5),
        "gate_with_silu": (x, other),
        "linear_2d": (matrix, matrix, None),
        "normalise": (matrix, weight, 1e-5),
        "rotate": (x, *angles, "half"),
    }[name]


def only_for(dtype, spoil):
    """Change results of one format only."""
    return lambda y, xp, x, *rest: spoil(y) if x.dtype == dtype else y


def without_tail(y, *_):
    """Numbers beyond the last whole vector of 16 are left out."""
    y[..., y.shape[-1] // 16 * 16 :] = 0
    return y


def shuffled(y, *_):
    return np.roll(y, 1, axis=-1)


def without_nan(y, *_):
    return np.where(np.isfinite(y), y, y.dtype.type(0))
