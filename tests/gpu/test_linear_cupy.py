"""`linear` with CuPy's body has the properties of every backend, by each way that it may go."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import linear
from llama_layers.backends.cupy import cublas, launch
from llama_layers.backends.cupy import linear as cupy_linear
from llama_layers.testing import assert_within_bound
from llama_layers.verify import linear_bound
from tests.conftest import backend_on
from tests.support.installed import GPUS, gpu
from tests.test_linear import (  # noqa: F401
    FORMATS,
    assert_like_naive,
    problems,
    run,
    test_additive_in_x,
    test_additive_over_channels,
    test_homogeneous,
    test_no_channels,
    test_no_rows,
    test_nonfinite_row_stays_in_its_row,
    test_one_row,
    test_rerun_gives_the_same_bits,
    test_within_bound_at_every_magnitude,
    test_within_bound_of_naive_loops,
)

ROUTES = ("a kernel", "cuBLAS", "cuBLAS in blocks", "CuPy")


@pytest.fixture(scope="module", params=ROUTES)
def route(request):
    """Problems are small, so that all of them would go to the kernel."""
    return request.param


@pytest.fixture(scope="module", params=GPUS)
def backend(request, route):
    with gpu(request.param) as cupy, pytest.MonkeyPatch.context() as patch:
        if route != "a kernel":
            patch.setattr(launch, "takes_gemv", lambda *_: False)
        if route.endswith("blocks"):
            patch.setattr(cupy_linear, "BLOCK_BYTES", 200)
        if route == "CuPy":
            patch.setattr(cublas, "available", lambda: False)
        yield backend_on(cupy)


@pytest.mark.parametrize(("dtype", "weight_dtype"), FORMATS)
@given(data=st.data())
def test_within_bound_in_every_format(backend, dtype, weight_dtype, data):
    problem = data.draw(problems(dtype, weight_dtype, max_magnitude=2.0**100))
    assert_like_naive(run(backend, *problem), *problem)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@given(data=st.data())
def test_memory_order_is_free(backend, dtype, data):
    x, weight, bias = data.draw(problems(dtype, dtype, max_magnitude=32.0))
    wide = backend.array(np.zeros((2 * x.shape[0], 3 * x.shape[1]), dtype))
    for strided in (wide[::2, ::3], wide[::-2, ::-3], wide[: len(x), : x.shape[1]]):
        strided[...] = backend.array(x)
        for layout in (
            backend.array(weight.T.copy()).T,
            backend.array(weight[::-1].copy())[::-1],
            backend.array(np.repeat(weight, 2, axis=1))[:, ::2],
            backend.array(np.concatenate([weight, weight], axis=1))[:, x.shape[1] :],
        ):
            on = None if bias is None else backend.array(bias)
            y = linear(strided, layout, on).get()
            assert_within_bound(y, linear_bound(x, weight, bias))


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("bias_dtype", ["bfloat16", "float32"])
def test_a_bias_is_added_before_rounding(backend, route, rows, bias_dtype):
    """257 is half way from 256 to 258 in bfloat16; CuPy's product becomes 256, and 257 again."""
    x = np.ones((rows, 257), ml_dtypes.bfloat16)
    y = linear(*map(backend.array, (x, x[:1], np.ones(1, bias_dtype)))).get()
    np.testing.assert_array_equal(y.astype(np.float32), 256 if route == "CuPy" else 258)


@pytest.mark.parametrize("rows", [1, 9])
def test_a_bias_keeps_its_digits(backend, rows):
    """Of 1 + 2**-10 bfloat16 keeps the 1."""
    one = np.ones((1, 1), ml_dtypes.bfloat16)
    bias = np.array([1 + 2.0**-10], np.float32)
    y = linear(*map(backend.array, (np.repeat(-one, rows, axis=0), one, bias))).get()
    np.testing.assert_array_equal(y.astype(np.float32), 2.0**-10)
