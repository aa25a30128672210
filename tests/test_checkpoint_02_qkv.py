"""The seven checks that this project began with, on every backend there is."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers import LlamaConfig, QKVWeights, qkv_projection
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import assert_same_bits, assert_within_bound
from llama_layers.verify import Bound, linear_bound

# Published for the case at Llama-2 7B dimensions.
PUBLISHED_RANGE = (0.165, 0.469)
PUBLISHED_Q = 0.16539979
# The figures are printed to 3 and 8 decimals, which is all that they support.
RANGE_DIGITS = 0.5e-3
Q_DIGITS = 0.5e-8


def llama2_input():
    return (np.sin(0.0001 * np.arange(8192)) * 0.02).astype(np.float32).reshape(1, 2, 4096)


@pytest.fixture(scope="module")
def llama2(backend):
    """Q, K and V of the published case."""
    config = LlamaConfig.llama2_7b()
    weight = backend.array(np.full((config.hidden_size,) * 2, 0.01, np.float32))
    w = QKVWeights.from_separate(
        weight, weight, weight, num_heads=config.num_attention_heads, layout="in_out"
    )
    return qkv_projection(backend.array(llama2_input()), w)


def small_case(backend):
    """Hidden 128, 4 heads, three constants for weights."""
    x = np.random.default_rng(42).standard_normal((1, 2, 128)).astype(np.float32)
    weights = [np.full((128, 128), c, np.float32) for c in (0.01, 0.02, 0.03)]
    w = QKVWeights.from_separate(*map(backend.array, weights), num_heads=4, layout="in_out")
    return x, weights, qkv_projection(backend.array(x), w)


def naive(x, constant):
    """x @ W for a W of one constant: in float64, each output is the row's sum times it."""
    rows = [[sum(map(float, row)) * float(np.float32(constant)) for row in batch] for batch in x]
    return np.array(rows)[..., None]


def llama2_bound():
    """The bound of one output of the published case; they are all the same."""
    x = llama2_input()
    return linear_bound(x, np.full((1, 4096), 0.01, np.float32))


def test_qkv_shape_preservation(backend):
    for array in small_case(backend)[2]:
        assert array.shape == (1, 2, 4, 32)
        assert array.dtype == backend.xp.float32
        assert backend.holds(array)


def test_qkv_no_nan_inf(backend, llama2):
    for array in (*llama2, *small_case(backend)[2]):
        assert np.isfinite(to_numpy(array)).all()


def test_qkv_determinism(backend):
    first, second, third = (small_case(backend)[2] for _ in range(3))
    for a, b, c in zip(first, second, third, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a, c)


def test_qkv_values_differ(backend, llama2):
    q, k, v = (to_numpy(array) for array in small_case(backend)[2])
    assert np.count_nonzero(np.abs(q - k) > 1e-6) == q.size == 256
    assert np.count_nonzero(np.abs(k - v) > 1e-6) == k.size == 256
    # The published case has one constant for its three weights, so nothing differs there.
    assert np.count_nonzero(np.abs(to_numpy(llama2.q) - to_numpy(llama2.k)) > 1e-6) == 0
    assert np.count_nonzero(np.abs(to_numpy(llama2.k) - to_numpy(llama2.v)) > 1e-6) == 0


def test_qkv_llama2_dimensions(llama2):
    for array in llama2:
        assert array.shape == (1, 2, 32, 128)


def test_qkv_value_ranges(llama2):
    limit = llama2_bound().limit.ravel()
    for array in map(to_numpy, llama2):
        assert abs(float(array.min()) - PUBLISHED_RANGE[0]) <= RANGE_DIGITS + limit[0]
        assert abs(float(array.max()) - PUBLISHED_RANGE[1]) <= RANGE_DIGITS + limit[1]


def test_qkv_complete_validation(backend, llama2):
    exact = naive(llama2_input(), 0.01)
    # The published figure is the exact one in all its digits; ours may differ by its bound.
    assert abs(exact[0, 0, 0] - PUBLISHED_Q) <= Q_DIGITS
    bound = llama2_bound()
    np.testing.assert_allclose(bound.exact, exact, rtol=1e-12)
    for array in llama2:
        values = to_numpy(array)
        shape = values.shape
        assert_within_bound(
            values,
            Bound(
                *(
                    np.broadcast_to(part[..., None], shape)
                    for part in (exact, bound.limit, bound.usual)
                )
            ),
        )
        first = values.ravel()[:5].astype(np.float64)
        assert (np.abs(first - PUBLISHED_Q) <= bound.limit.ravel()[0] + Q_DIGITS).all()
    x, weights, results = small_case(backend)
    for weight, array in zip(weights, results, strict=True):
        bound = linear_bound(x, weight.T)
        np.testing.assert_allclose(
            bound.exact, np.broadcast_to(naive(x, weight[0, 0]), bound.exact.shape), rtol=1e-11
        )
        assert_within_bound(to_numpy(array).reshape(1, 2, 128), bound)
