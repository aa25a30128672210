"""What the linear map asks of the device: one call, on the weight as it lies."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from llama_layers import QKVWeights, linear, qkv_projection
from llama_layers.backends.cupy import cublas
from llama_layers.backends.cupy import linear as cupy_linear
from llama_layers.testing import assert_within_bound
from llama_layers.verify import linear_bound
from tests.support.installed import stand_in_alone

pytestmark = stand_in_alone


def given_to(library, *arrays):
    """Those of the arrays that cuBLAS was told to read, and how many calls there were."""
    calls = library.named("cublasGemmEx")
    addresses = {address for call in calls for address in (call[7], call[10])}
    return len(calls), [array.data.ptr in addresses for array in arrays]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_weights_are_read_where_they_lie(cupy, library, rng, dtype):
    """The whole, rows of it, columns of it, and a matrix stored the other way round."""
    cublas._handle()  # takes its workspace
    weight = cupy.asarray(rng.standard_normal((24, 24)).astype(dtype))
    x = cupy.asarray(rng.standard_normal((9, 24)).astype(dtype))
    for part in (weight, weight[5:9], weight.T, weight[:, 3:11], weight[2:20, 1:3].T):
        library.calls.clear()
        rows = x[:, : part.shape[1]]
        taken = set(library.memories)
        y = linear(rows, part)
        assert set(library.memories) - taken == {y._memory}
        assert given_to(library, rows, part) == (1, [True, True])
        assert_within_bound(y.get(), linear_bound(rows.get(), part.get()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_qkv_projection_is_one_product(cupy, library, rng, dtype, with_bias):
    bias = cupy.asarray(rng.standard_normal(16).astype(dtype)) if with_bias else None
    w = QKVWeights(cupy.asarray(rng.standard_normal((16, 8)).astype(dtype)), 4, 2, bias)
    x = cupy.asarray(rng.standard_normal((3, 5, 8)).astype(dtype))
    qkv = qkv_projection(x, w)
    assert given_to(library, x, w.fused) == (1, [True, True])
    assert {array.dtype for array in qkv} == {x.dtype}
    for part, rows in zip(qkv, (w.q, w.k, w.v), strict=True):
        if not with_bias:
            flat = part.get().reshape(3, 5, -1)
            assert_within_bound(flat, linear_bound(x.get(), rows.get()))


def test_a_narrow_weight_is_never_widened_as_a_whole(cupy, library, rng, monkeypatch):
    cublas._handle()
    monkeypatch.setattr(cupy_linear, "BLOCK_BYTES", 4 * 24 * 10)
    x = cupy.asarray(rng.standard_normal((9, 24)).astype(np.float32))
    weight = cupy.asarray(rng.standard_normal((32, 24)).astype(ml_dtypes.bfloat16))
    sizes = []
    taken = cupy.Memory.__init__
    monkeypatch.setattr(
        cupy.Memory, "__init__", lambda self, size: sizes.append(size) or taken(self, size)
    )
    y = linear(x, weight)
    assert max(sizes[1:]) == 4 * 24 * 10
    assert given_to(library)[0] == 4
    assert_within_bound(y.get(), linear_bound(x.get(), weight.get()))
