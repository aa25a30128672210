"""`qkv_projection`: which numbers go where, on every backend."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import QKV, LlamaConfig, QKVWeights, linear, qkv_projection
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import (
    arrays,
    assert_same_bits,
    assert_within_bound,
    configs,
    hidden_states,
    qkv_weights,
)
from llama_layers.verify import Bound, linear_bound
from tests.support import oracle

SMALL = {"max_heads": 4, "max_head_dim": 4}


@st.composite
def problems(draw, **options):
    """Some hidden states and QKVWeights that go together."""
    config = draw(configs(**SMALL))
    return draw(hidden_states(config, **options)), draw(qkv_weights(config, **options))


def on(backend, w):
    bias = None if w.bias is None else backend.array(w.bias)
    return QKVWeights(backend.array(w.fused), w.num_heads, w.num_kv_heads, bias)


def run(backend, x, w):
    """Q, K and V from a backend, as NumPy arrays."""
    x = backend.array(x)
    with np.errstate(all="ignore"):
        result = qkv_projection(x, on(backend, w))
    for array in result:
        assert array.dtype == x.dtype
        assert backend.holds(array)
    return QKV(*map(to_numpy, result))


def parts(array, w):
    """The rows of q, of k and of v in anything that is ordered as the fused weight is."""
    q, kv = w.num_heads * w.head_dim, w.num_kv_heads * w.head_dim
    return array[..., :q], array[..., q : q + kv], array[..., q + kv :]


def bounds_by_head(x, w):
    """The bounds of Q, K and V in [batch, seq, head, channel]."""
    bound = linear_bound(x, w.fused, w.bias)
    return [
        Bound(*(part.reshape(*x.shape[:2], -1, w.head_dim) for part in of_one))
        for of_one in zip(
            *(parts(of_all, w) for of_all in (bound.exact, bound.limit, bound.usual)), strict=True
        )
    ]


def separate(w):
    """The rows of the three weights and biases, copied out of the fused ones."""
    matrices = [part.T.copy() for part in parts(w.fused.T, w)]
    biases = [None] * 3 if w.bias is None else [part.copy() for part in parts(w.bias, w)]
    return matrices, biases


def assert_like_naive(result, x, w):
    matrices, biases = separate(w)
    expected = oracle.qkv(x, *matrices, w.head_dim, biases)
    for array, exact, bound in zip(result, expected, bounds_by_head(x, w), strict=True):
        assert array.shape == exact.shape
        assert np.isfinite(array[np.isfinite(bound.limit)]).all()
        assert_within_bound(array, Bound(exact, bound.limit, bound.usual))


@given(problem=problems())
def test_within_bound_of_naive_loops(backend, problem):
    assert_like_naive(run(backend, *problem), *problem)


@given(problem=problems(max_magnitude=np.inf))
def test_within_bound_at_every_magnitude(backend, problem):
    assert_like_naive(run(backend, *problem), *problem)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@given(data=st.data())
def test_within_bound_in_every_format(dtype, data):
    x, w = data.draw(problems(dtype=dtype, max_magnitude=16.0))
    result = qkv_projection(x, w)
    assert {array.dtype for array in result} == {x.dtype}
    assert_like_naive(result, x, w)


@given(config=configs(**SMALL), batch=st.integers(0, 2), seq=st.integers(0, 3))
def test_shapes(backend, config, batch, seq):
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rows = (heads + 2 * kv_heads) * config.head_dim
    w = QKVWeights(np.ones((rows, config.hidden_size), np.float32), heads, kv_heads)
    q, k, v = run(backend, np.ones((batch, seq, config.hidden_size), np.float32), w)
    assert q.shape == (batch, seq, heads, config.head_dim)
    assert k.shape == v.shape == (batch, seq, kv_heads, config.head_dim)


@given(config=configs(**SMALL), seed=st.integers(0, 2**32 - 1))
def test_queries_keys_and_values_differ(backend, config, seed):
    """Weights drawn apart give results apart: by more than rounding, where the exact ones do."""
    rng = np.random.default_rng(seed)
    kv_heads = config.num_key_value_heads
    rows = 3 * kv_heads * config.head_dim
    fused = rng.standard_normal((rows, config.hidden_size)).astype(np.float32)
    x = rng.standard_normal((1, 3, config.hidden_size)).astype(np.float32)
    w = QKVWeights(fused, kv_heads, kv_heads)
    result, bounds = run(backend, x, w), bounds_by_head(x, w)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        apart = abs(bounds[i].exact - bounds[j].exact) > bounds[i].limit + bounds[j].limit
        assert apart.any()
        assert (result[i] != result[j])[apart].all()


@given(problem=problems(), data=st.data())
def test_slices_of_batch_and_interior_sequence(backend, problem, data):
    x, w = problem
    x = np.concatenate([x, -x, x / 2], axis=1)  # three tokens at the least
    b = data.draw(st.integers(0, x.shape[0] - 1))
    start = data.draw(st.integers(1, x.shape[1] - 2))
    stop = data.draw(st.integers(start + 1, x.shape[1] - 1))
    whole = run(backend, x, w)
    sliced = run(backend, x[b : b + 1, start:stop], w)
    for all_of_it, some, bound in zip(whole, sliced, bounds_by_head(x, w), strict=True):
        place = np.s_[b : b + 1, start:stop]
        oracle.assert_apart_at_most(some, all_of_it[place], 2 * bound.limit[place])


@given(problem=problems(), data=st.data())
def test_heads_follow_their_rows(backend, problem, data):
    """Heads permuted in the weights are heads permuted in the result, and nothing else."""
    x, w = problem
    matrices, biases = separate(w)
    orders = []
    for i, count in enumerate((w.num_heads, w.num_kv_heads, w.num_kv_heads)):
        order = data.draw(st.permutations(range(count)))
        rows = np.arange(count * w.head_dim).reshape(count, -1)[order].ravel()
        matrices[i] = matrices[i][rows]
        biases[i] = None if biases[i] is None else biases[i][rows]
        orders.append(order)
    permuted = QKVWeights.from_separate(
        *matrices,
        num_heads=w.num_heads,
        num_kv_heads=w.num_kv_heads,
        biases=None if w.bias is None else biases,
    )
    before, after = run(backend, x, w), run(backend, x, permuted)
    for i, bound in enumerate(bounds_by_head(x, w)):
        moved = np.s_[:, :, orders[i], :]
        oracle.assert_apart_at_most(after[i], before[i][moved], 2 * bound.limit[moved])


@given(problem=problems())
def test_fused_equals_separate(backend, problem):
    x, w = problem
    matrices, biases = separate(w)
    for array, matrix, bias, bound in zip(
        run(backend, x, w), matrices, biases, bounds_by_head(x, w), strict=True
    ):
        bias = None if bias is None else backend.array(bias)
        alone = to_numpy(linear(backend.array(x), backend.array(matrix), bias))
        oracle.assert_apart_at_most(alone.reshape(array.shape), array, 2 * bound.limit)


@given(problem=problems())
def test_both_layouts_agree(backend, problem):
    x, w = problem
    matrices, biases = separate(w)
    options = {
        "num_heads": w.num_heads,
        "num_kv_heads": w.num_kv_heads,
        "biases": None if w.bias is None else list(map(backend.array, biases)),
    }
    out_in = QKVWeights.from_separate(*map(backend.array, matrices), **options)
    in_out = QKVWeights.from_separate(
        *(backend.array(matrix.T) for matrix in matrices), layout="in_out", **options
    )
    assert_same_bits(out_in.fused, w.fused)
    assert_same_bits(in_out.fused, w.fused)
    if w.bias is not None:
        assert_same_bits(in_out.bias, w.bias)
    on_backend = backend.array(x)
    for array, other, bound in zip(
        qkv_projection(on_backend, out_in),
        qkv_projection(on_backend, in_out),
        bounds_by_head(x, w),
        strict=True,
    ):
        oracle.assert_apart_at_most(array, other, 2 * bound.limit)


@given(problem=problems(), data=st.data(), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_nonfinite_token_stays_in_its_row(backend, problem, data, value):
    x, w = problem
    x = np.concatenate([x, x], axis=1)
    place = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
    x[place] = value
    others = np.ones(x.shape[:2], bool)
    others[place[:2]] = False
    for array in run(backend, x, w):
        assert not np.isfinite(array[place[:2]]).any()
        assert np.isfinite(array[others]).all()


@given(problem=problems())
def test_rerun_gives_the_same_bits(backend, problem):
    first, *others = (run(backend, *problem) for _ in range(3))
    for other in others:
        for array, again in zip(first, other, strict=True):
            assert_same_bits(array, again)


@given(problem=problems())
def test_read_only_arguments_stay_as_they_are(problem):
    x, w = problem
    x_before, fused_before = x.copy(), w.fused.copy()
    x.flags.writeable = w.fused.flags.writeable = False
    qkv_projection(x, w)
    assert_same_bits(x, x_before)
    assert_same_bits(w.fused, fused_before)


@given(data=st.data(), config=configs(**SMALL))
def test_noncontiguous_hidden_states(data, config):
    batch, seq, hidden = 2, 3, config.hidden_size
    x = data.draw(arrays((seq, 2 * hidden, batch))).transpose(2, 0, 1)[:, ::-1, ::2]
    w = data.draw(qkv_weights(config))
    assert_like_naive(qkv_projection(x, w), x, w)


def test_sixteen_bit_weights_under_float32(rng):
    x = rng.standard_normal((2, 3, 48)).astype(np.float32)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        w = QKVWeights(rng.standard_normal((64, 48)).astype(dtype), num_heads=4, num_kv_heads=2)
        result = qkv_projection(x, w)
        assert {array.dtype for array in result} == {np.dtype(np.float32)}
        assert_like_naive(result, x, w)


W = QKVWeights(np.zeros((16, 6), np.float32), num_heads=2, num_kv_heads=1)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((2, 6), np.float32), ValueError, r"x: .* \[batch, seq, 6\], got \[2, 6\]"),
        (np.zeros((1, 1, 2, 6), np.float32), ValueError, r"x: .*, got \[1, 1, 2, 6\]"),
        (np.zeros((1, 2, 7), np.float32), ValueError, r"\[batch, seq, 6\], got \[1, 2, 7\]"),
        (np.zeros((1, 2, 6), int), TypeError, "x: expected one of the dtypes .*, got int64"),
        ([[[0.0] * 6]], TypeError, "x: expected an array of NumPy, .*, got list"),
        (
            array_api_strict.zeros((1, 2, 6), dtype=array_api_strict.float32),
            TypeError,
            "w: expected an array of the same library as x, array_api_strict, got .* numpy",
        ),
    ],
)
def test_refuses(x, error, message):
    with pytest.raises(error, match=message):
        qkv_projection(x, W)


def test_refuses_weights_wider_than_the_sums():
    w = QKVWeights(np.zeros((16, 6)), num_heads=2, num_kv_heads=1)
    with pytest.raises(TypeError, match=r"float32 sums hold exactly .x is float32.*got float64"):
        qkv_projection(np.zeros((1, 2, 6), np.float32), w)


def test_refuses_devices_that_differ():
    x, fused = (
        array_api_strict.zeros(
            shape, dtype=array_api_strict.float32, device=array_api_strict.Device(name)
        )
        for shape, name in (((1, 2, 6), "device1"), ((16, 6), "device2"))
    )
    with pytest.raises(ValueError, match=r"w: expected to be on the device of x, .*device1"):
        qkv_projection(x, QKVWeights(fused, 2, 1))


def test_shapes_of_the_published_sizes():
    """One token of a 70B layer's shapes, with one input channel so that it is small."""
    config = LlamaConfig.llama2_70b()
    rows = (64 + 2 * 8) * 128
    w = QKVWeights(
        np.ones((rows, 1), np.float32), config.num_attention_heads, config.num_key_value_heads
    )
    q, k, v = qkv_projection(np.ones((1, 1, 1), np.float32), w)
    assert (q.shape, k.shape, v.shape) == ((1, 1, 64, 128), (1, 1, 8, 128), (1, 1, 8, 128))
