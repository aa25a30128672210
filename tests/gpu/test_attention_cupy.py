"""`attention` with CuPy's body: the properties of every backend, in blocks of queries and keys."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import Mask, attention
from llama_layers.backends.cupy import attention as cupy_attention
from llama_layers.testing import assert_same_bits, assert_within_bound
from llama_layers.verify import attention_bound
from tests.conftest import Backend
from tests.support.fake_cublas import replaced
from tests.support.installed import installed
from tests.test_attention import (  # noqa: F401
    test_empty_rows_give_exact_zeros,
    test_mask_is_the_boolean_mask_it_stands_for,
    test_on_every_library,
)
from tests.test_attention_tiles import tiled

DTYPES = ["bfloat16", "float16", "float32"]


def given_mask(backend, mask):
    """A mask's arrays on the device."""
    if not isinstance(mask, Mask):
        return None if mask is None else backend.array(mask)
    keep = None if mask.keep is None else backend.array(mask.keep)
    slots = (backend.array(slots.astype(np.int32)) for slots in (mask.queries, mask.keys))
    return Mask(*slots, mask.window, keep)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_blocks_are_within_the_bound(backend, dtype, data):
    (q, k, v), mask, boolean, scores = data.draw(tiled(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cupy_attention, "SCORES", scores)
        y = attention(*map(backend.array, (q, k, v)), mask=given_mask(backend, mask)).get()
    assert_within_bound(y, attention_bound(q, k, v, mask=None if mask is None else boolean))


@pytest.mark.parametrize("slots", [False, True], ids=["boolean", "slots"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks(backend, monkeypatch, dtype, window, slots):
    """Of five queries, after seven earlier keys; two sequences with padding of their own."""
    monkeypatch.setattr(cupy_attention, "SCORES", 5 * 4 * 47)
    q, k, v = drawn(0, dtype, queries=40, keys=47)
    keep = np.random.default_rng(1).random((2, 47)) < 0.7
    keep[0, :9] = False
    distance = 7 + np.arange(40)[:, None] - np.arange(47)
    boolean = (distance >= 0) & (distance < (window or 47)) & keep[:, None]
    mask = Mask(7 + np.arange(40), np.arange(47), window, keep) if slots else boolean
    assert_within_bound(run(backend, q, k, v, mask), attention_bound(q, k, v, mask=boolean))


def drawn(seed, dtype, queries=6, keys=6, heads=4, kv_heads=2, width=8, batch=2):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, queries, heads, width)).astype(dtype)
    k, v = rng.standard_normal((2, batch, keys, kv_heads, width)).astype(dtype)
    return q, k, v


def run(backend, q, k, v, mask=None, **options):
    y = attention(*map(backend.array, (q, k, v)), mask=given_mask(backend, mask), **options)
    assert y.dtype == q.dtype
    return y.get()


CAUSAL = np.tril(np.ones((6, 6), bool))
SLOTS = np.arange(6, dtype=np.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [CAUSAL, Mask(SLOTS, SLOTS)], ids=["boolean", "slots"])
@given(seed=st.integers(0, 2**32 - 1), place=st.integers(0, 5))
def test_causal(backend, dtype, mask, seed, place):
    """A change of later keys and values, however large, changes no bit of earlier queries."""
    q, k, v = drawn(seed, dtype)
    before = run(backend, q, k, v, mask)
    k[:, place] *= np.array(-1e4, dtype)
    v[:, place] = np.array(-6e4, dtype)
    after = run(backend, q, k, v, mask)
    assert_same_bits(after[:, :place], before[:, :place])
    assert (after[:, place] != before[:, place]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, np.ones((6, 6), bool)])
def test_scores_of_10000(backend, dtype, mask):
    q = np.full((1, 6, 1, 1), 100, dtype)
    k = np.array([-100, 0, 50, 100, 99, -100], dtype).reshape(1, 6, 1, 1)
    v = np.arange(6).astype(dtype).reshape(1, 6, 1, 1)
    y = run(backend, q, k, v, mask, scale=1.0)
    np.testing.assert_array_equal(y.astype(np.float32), 3)


@pytest.mark.parametrize("other", [-3e4, -1e3, 1e3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hidden_key_weighs_nothing_at_any_score(backend, dtype, other):
    q, k = np.ones((1, 2, 1, 1), dtype), np.array([other, 0.0], dtype).reshape(1, 2, 1, 1)
    v = np.array([1.0, 100.0], dtype).reshape(1, 2, 1, 1)
    y = run(backend, q, k, v, np.eye(2, dtype=bool))
    np.testing.assert_array_equal(y.ravel().astype(np.float32), [1.0, 100.0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([1e20, 0, 0], np.nan),
        ([1e20, 1e20, -1e20], np.nan),
        ([-1e20, 0, 0], 3.0),
        ([-1e20, -1e20, 0], 4.0),
        ([-1e20, -1e20, -1e20], {False: np.nan, True: 0.0}),
    ],
)
def test_scores_that_overflow(backend, dtype, keys, expected, masked):
    """As the notes of `attention` have it."""
    q, k = np.full((1, 2, 1, 1), 1e20, dtype), np.array(keys, dtype).reshape(1, 3, 1, 1)
    v = np.array([1, 2, 4], dtype).reshape(1, 3, 1, 1)
    y = run(backend, q, k, v, np.ones((2, 3), bool) if masked else None, scale=1e-10)
    wanted = expected[masked] if isinstance(expected, dict) else expected
    np.testing.assert_array_equal(y.ravel().astype(np.float32), [wanted, wanted])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_cancel(backend, dtype):
    """Rounded to 16 bits, weights of values like 3 : 3 : -6 leave their roundings and no sum."""
    keys = 384
    q = np.ones((1, 2, 2, 4), dtype)
    k = np.zeros((1, keys, 1, 4), dtype)
    v = np.zeros((1, keys, 1, 4), dtype)
    k[0, ::3], k[0, 1::3], k[0, 2::3] = np.log([1.0, 2.0, 3.0])[:, None, None].astype(dtype) / 2
    v[0, ::3], v[0, 1::3], v[0, 2::3] = 30000, 30000, -30000
    y = run(backend, q, k, v)
    assert_within_bound(y, attention_bound(q, k, v))


def test_probabilities_keep_their_last_bits(backend):
    """Weights p and 1 - p of two keys, and values of 8 bits for each p that all but cancel: what is
    left shows the 17th bit of a probability."""
    count = 64
    scores = np.linspace(0.25, 1.5, count).astype(ml_dtypes.bfloat16)
    odds = np.exp(scores.astype(float))
    eighth_bit = np.arange(128, 256)
    q, k, v = np.zeros((3, 1, count, 1, count), ml_dtypes.bfloat16)
    k, v = k[:, :2], v[:, :2]
    q[0, :, 0, 0], k[0, 1, 0, 0] = scores, 1
    for channel, odd in enumerate(odds):
        power = 2.0 ** np.round(np.log2(odd))
        left = np.abs(eighth_bit[:, None] - eighth_bit * odd / power)
        one, other = np.unravel_index(left.argmin(), left.shape)
        v[0, :, 0, channel] = eighth_bit[one], -eighth_bit[other] / power
    y = run(backend, q, k, v, scale=1.0)
    assert_within_bound(y, attention_bound(q, k, v, scale=1.0))


def test_nan_of_a_query_stays_in_its_row(backend):
    q, k, v = drawn(3, "bfloat16")
    before = run(backend, q, k, v, CAUSAL)
    q[1, 2, 3, 0] = np.nan
    after = run(backend, q, k, v, CAUSAL)
    assert np.isnan(after[1, 2, 3].astype(np.float32)).all()
    after[1, 2, 3] = before[1, 2, 3]
    assert_same_bits(after, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [0, 1, 3])
@pytest.mark.parametrize("keys", [0, 1])
def test_no_queries_and_no_keys(backend, dtype, queries, keys):
    q, k, v = drawn(1, dtype, queries, keys)
    y = run(backend, q, k, v)
    expected = np.repeat(v, 2, axis=2) if keys else np.zeros_like(q)
    assert_same_bits(y, np.broadcast_to(expected, q.shape) if keys else expected)


@pytest.mark.parametrize(("found", "dtype"), [(True, "float64"), (False, "float32")])
def test_oracle_mode_and_no_library_go_through_the_definition(found, dtype):
    with installed() as cupy, replaced(found) as library:
        q, k, v = drawn(2, dtype)
        y = run(Backend(cupy), q, k, v, CAUSAL)
        assert_within_bound(y, attention_bound(q, k, v, mask=CAUSAL))
        assert not library.calls
