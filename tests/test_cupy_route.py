"""What CuPy is asked to multiply where no cuBLAS is found and no kernel takes it, seen on a CPU.

`cupy.matmul` of more than two dimensions copies the weight at every call and fails for bfloat16;
a 2-D operand that is neither C- nor F-contiguous is copied too.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from llama_layers import QKVWeights, linear, qkv_projection, rms_norm
from llama_layers.arrays import dispatch
from llama_layers.backends.cupy import ROUTES, cublas, launch
from llama_layers.layers.linear import linear_2d
from llama_layers.testing import assert_within_bound
from llama_layers.verify import linear_bound

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


class Recording(np.ndarray):
    """An array that remembers what was multiplied, and refuses every other contraction."""

    products: tuple = ()

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        plain = [unwrapped(a) for a in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(unwrapped(a) for a in kwargs["out"])
        if ufunc is np.matmul:
            assert all(a.ndim == 2 for a in plain), "CuPy would copy the weight, or fail"
            Recording.products += (tuple(plain),)
        return np.asarray(getattr(ufunc, method)(*plain, **kwargs)).view(Recording)

    def __array_function__(self, function, types, arguments, options):
        allowed = {np.reshape, np.mean, np.sum, np.astype, np.concatenate}
        assert function in allowed, f"{function.__name__} may contract or copy"
        return super().__array_function__(function, types, arguments, options)


def unwrapped(array):
    return array.view(np.ndarray) if isinstance(array, Recording) else array


@pytest.fixture
def products(monkeypatch):
    """Call with nothing to get the operands of each product so far."""
    Recording.products = ()
    monkeypatch.setattr(dispatch, "_tables", lambda xp: dispatch.routes("cupy").values())
    monkeypatch.setattr(cublas, "available", lambda: False)
    monkeypatch.setattr(launch, "takes_gemv", lambda *_: False)
    monkeypatch.delitem(ROUTES["CUDA"], "normalise")
    return lambda: Recording.products


def recording(rng, shape, dtype):
    return rng.standard_normal(shape).astype(np.float32).astype(dtype).view(Recording)


def assert_one_good_product(products, x, weight):
    (operands,) = products
    for operand, given in zip(operands, (x, weight), strict=True):
        assert operand.ndim == 2
        if given.flags.c_contiguous:  # a strided x is CuPy's to copy; a weight never is
            assert operand.flags.c_contiguous or operand.flags.f_contiguous
    assert operands[0].dtype == operands[1].dtype
    if weight.dtype == x.dtype:
        assert np.shares_memory(operands[1], unwrapped(weight)), "the weight was copied"
        assert operands[1].strides == weight.T.strides


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_2d(products, rng, dtype, with_bias):
    x, weight = recording(rng, (3, 8), dtype), recording(rng, (5, 8), dtype)
    bias = recording(rng, (5,), dtype) if with_bias else None
    y = linear_2d(np, x, weight, bias)
    assert_one_good_product(products(), x, weight)
    assert y.dtype == x.dtype
    plain = map(unwrapped, (x, weight, bias))
    assert_within_bound(unwrapped(y), linear_bound(*plain))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 2, 8)])
def test_linear(products, rng, dtype, shape):
    x, weight = recording(rng, shape, dtype), recording(rng, (5, 8), dtype)
    assert linear(x, weight).dtype == x.dtype
    assert_one_good_product(products(), x, weight)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_weight_under_float32(products, rng, dtype):
    x, weight = recording(rng, (2, 3, 8), np.float32), recording(rng, (5, 8), dtype)
    y = linear(x, weight)
    assert_one_good_product(products(), x, weight)
    plain = unwrapped(x), unwrapped(weight)
    assert_within_bound(unwrapped(y), linear_bound(*plain))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_qkv_projection_is_one_product(products, rng, dtype, num_kv_heads, with_bias):
    rows = (4 + 2 * num_kv_heads) * 2
    bias = recording(rng, (rows,), dtype) if with_bias else None
    w = QKVWeights(recording(rng, (rows, 8), dtype), 4, num_kv_heads, bias)
    x = recording(rng, (2, 3, 8), dtype)
    for hidden in (x, x[:, -1:, :], x[:, :, ::-1], x.transpose(1, 0, 2)):
        Recording.products = ()
        qkv = qkv_projection(hidden, w)
        assert_one_good_product(products(), hidden, w.fused)
        assert {array.dtype for array in qkv} == {x.dtype}


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_fused_weights_are_not_copied(products, rng, dtype):
    w = QKVWeights(recording(rng, (16, 8), dtype), 4, 2)
    x = recording(rng, (2, 3, 8), dtype)
    for part in (w.q, w.k, w.v):
        Recording.products = ()
        linear(x, part)
        assert_one_good_product(products(), x, w.fused)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_multiplies_no_matrices(products, rng, dtype):
    x, weight = recording(rng, (2, 3, 8), dtype), recording(rng, (8,), dtype)
    assert rms_norm(x, weight, eps=1e-5).dtype == x.dtype
    assert products() == ()


@pytest.mark.parametrize(
    "trap", [lambda x, w: np.einsum("bsk,nk->bsn", x, w), lambda x, w: np.dot(x, w.T)]
)
def test_the_recorder_refuses_other_contractions(rng, trap):
    x, weight = recording(rng, (2, 3, 8), np.float32), recording(rng, (5, 8), np.float32)
    with pytest.raises(AssertionError, match="may contract or copy"):
        trap(x, weight)
