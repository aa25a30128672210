"""`rms_norm` with CuPy's body has the properties of every backend, and those of a kernel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import rms_norm
from llama_layers.backends.cupy import launch
from llama_layers.testing import assert_same_bits
from tests.test_norm import assert_like_naive, problems, run


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@given(data=st.data())
def test_within_bound_of_naive_loops(backend, dtype, weight_dtype, data):
    if weight_dtype == "float64" and dtype != "float64":
        weight_dtype = dtype
    problem = data.draw(problems(dtype, weight_dtype, 2.0**100))
    assert_like_naive(run(backend, *problem), *problem)


@given(problem=problems(max_magnitude=np.inf))
def test_within_bound_at_every_magnitude(backend, problem):
    assert_like_naive(run(backend, *problem), *problem)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("columns", [1, 7, 520, 2048, 2049, 4096, 4104, 9000])
def test_every_width(backend, dtype, columns, rng):
    """More numbers than threads, with and without 16 bytes to read; the rows one by one too."""
    x, weight = (rng.standard_normal(shape).astype(dtype) for shape in ((5, columns), columns))
    y = run(backend, x, weight, 1e-5)
    assert_like_naive(y, x, weight, 1e-5)
    for row in range(5):
        assert_same_bits(run(backend, x[row], weight, 1e-5), y[row])


def test_any_memory_order(backend, rng):
    x = rng.standard_normal((4, 3, 10)).astype(np.float32)
    weight = rng.standard_normal(20).astype(np.float32)
    on_device = backend.array(x).transpose(1, 0, 2)[:, ::2]
    scale = backend.array(weight)[::2]
    y = backend.xp.empty((3, 2, 10), np.float32)
    y[...] = rms_norm(on_device, scale, eps=1e-5)
    assert_like_naive(y.get(), x.transpose(1, 0, 2)[:, ::2], weight[::2], 1e-5)


def test_nan_stays_in_its_row(backend):
    x = np.ones((3, 8), np.float32)
    x[1, 2] = np.nan
    y = run(backend, x, np.ones(8, np.float32), 1e-5)
    np.testing.assert_array_equal(np.isnan(y), [[False] * 8, [True] * 8, [False] * 8])


def test_addresses_that_are_no_multiples_of_16_bytes(backend, rng):
    """An array that begins inside another one."""
    whole = backend.array(rng.standard_normal(40).astype(np.float16))
    weight = backend.array(np.ones(8, np.float16))
    for start in range(9):
        x = whole[start : start + 16].reshape(2, 8)
        y = backend.xp.empty((2, 8), np.float16)
        launch.norm(x, weight, y, 1e-5)
        assert_like_naive(y.get(), x.get(), weight.get(), 1e-5)
