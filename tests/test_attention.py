"""`attention` against loops and closed forms, and what masks, heads and shifts must not change."""

from __future__ import annotations

import math

import array_api_strict
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_layers import Mask, attention
from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers import attention as attend
from llama_layers.testing import assert_same_bits
from tests.support import decoder_oracle

pytestmark = pytest.mark.usefixtures("bodies")

SEEDS = st.integers(0, 2**32 - 1)
CAUSAL = np.tril(np.ones((6, 6), bool))
# Scores of size 10 are off by some 2**-50 before they become exponents.
CLOSE = {"rtol": 0, "atol": 1e-13}


def drawn(seed, batch=2, queries=6, keys=6, heads=4, kv_heads=2, width=4):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, queries, heads, width))
    return q, *rng.standard_normal((2, batch, keys, kv_heads, width))


def random_mask(seed, batch=2):
    """Some keys for each query, for some queries none."""
    mask = np.random.default_rng(seed + 1).random((batch, 6, 6)) < 0.6
    mask[0, 2] = False
    return mask


def listed(mask):
    return [[list(np.flatnonzero(row)) for row in rows] for rows in mask]


def tokens(count, first=0):
    return first + np.arange(count)


@example(seed=0, queries=0, keys=3, masked=True)
@example(seed=0, queries=3, keys=0, masked=True)
@given(seed=SEEDS, queries=st.integers(1, 4), keys=st.integers(1, 5), masked=st.booleans())
def test_like_loops(seed, queries, keys, masked):
    rng = np.random.default_rng(seed)
    batch, kv_heads, group, width = (int(n) for n in rng.integers(1, [3, 4, 4, 6]))
    scale = None if rng.random() < 0.5 else rng.uniform(0.01, 3.0)
    q, k, v = drawn(seed, batch, queries, keys, kv_heads * group, kv_heads, width)
    mask = rng.random((batch, queries, keys)) < 0.6 if masked else None
    expected = decoder_oracle.attention(q, k, v, listed(mask) if masked else None, scale)
    np.testing.assert_allclose(attention(q, k, v, mask=mask, scale=scale), expected, **CLOSE)


@given(seed=SEEDS)
def test_on_every_library(backend, seed):
    """Probabilities sum to 1, so that errors stay a few roundings of the largest value's size."""
    q, k, v = (array.astype(np.float32) for array in drawn(seed))
    mask = random_mask(seed)
    expected = decoder_oracle.attention(*(a.astype(np.float64) for a in (q, k, v)), listed(mask))
    y = attention(*map(backend.array, (q, k, v)), mask=backend.array(mask))
    assert backend.holds(y)
    y = to_numpy(y)
    assert y.dtype == np.float32
    # A score of size up to 20 from 4 products, its exponential, and sums of 6 terms.
    np.testing.assert_allclose(y, expected, rtol=0, atol=100 * 2.0**-24 * np.abs(v).max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_formats_are_computed_in_float32_and_rounded_once(dtype):
    narrow = [array.astype(dtype) for array in drawn(1)]
    expected = attention(*(array.astype(np.float32) for array in narrow), mask=CAUSAL)
    assert_same_bits(attention(*narrow, mask=CAUSAL), expected.astype(dtype))


@given(seed=SEEDS, place=st.integers(0, 5))
def test_causal(seed, place):
    """A change of later keys and values, however large, changes no bit of earlier queries."""
    q, k, v = drawn(seed)
    before = attention(q, k, v, mask=CAUSAL)
    k[:, place] *= -1
    v[:, place] -= 1e6
    after = attention(q, k, v, mask=CAUSAL)
    assert_same_bits(after[:, :place], before[:, :place])
    assert np.abs(after[:, place] - before[:, place]).max() > 1


@pytest.mark.parametrize("magnitude", [1e4, 1e30])
def test_huge_scores(magnitude):
    """Row 0 sees v0 alone, bit for bit; each row is finite and the value of its largest score."""
    q, k, v = drawn(7)
    y = attention(q, k * magnitude, v, mask=CAUSAL)
    assert_same_bits(y[:, 0], np.repeat(v[:, 0], 2, axis=1))
    for b, s, h in np.ndindex(2, 6, 4):
        scores = k[b, : s + 1, h // 2] @ q[b, s, h]
        np.testing.assert_allclose(y[b, s, h], v[b, np.argmax(scores), h // 2], **CLOSE)


@pytest.mark.parametrize("mask", [None, CAUSAL])
def test_scores_far_below_zero(mask):
    """All exponentials would vanish, or overflow, if the row's largest score were not taken off."""
    q, k, v = drawn(8)
    plain = attention(q, k, v, mask=mask, scale=1.0)
    q, k = (np.concatenate([array, np.ones((2, 6, n, 1))], axis=3) for array, n in ((q, 4), (k, 2)))
    q[..., 4], v = -3e3, np.concatenate([v, v[..., :1]], axis=3)
    far_below = attention(q, k, v, mask=mask, scale=1.0)
    np.testing.assert_allclose(far_below[..., :4], plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_scores_of_10000_in_narrow_formats(dtype):
    q = np.full((1, 6, 1, 1), 100, dtype)
    k = np.array([-100, 0, 50, 100, 99, -100], dtype).reshape(1, 6, 1, 1)
    v = np.arange(6, dtype=dtype).reshape(1, 6, 1, 1)
    y = attention(q, k, v, mask=CAUSAL, scale=1.0)
    assert_same_bits(y[0, :, 0, 0], np.array([0, 1, 2, 3, 3, 3], dtype))


@pytest.mark.parametrize("other", [-3e4, -1e3, 1e3])
def test_a_hidden_key_weighs_nothing_at_any_score(other):
    """A finite number in the place of minus infinity would let through what lies below it."""
    q = np.ones((1, 2, 1, 1))
    k = np.array([other, 0.0]).reshape(1, 2, 1, 1)
    v = np.array([1.0, 100.0]).reshape(1, 2, 1, 1)
    mask = np.array([[True, False], [False, True]])
    assert_same_bits(attention(q, k, v, mask=mask).ravel(), np.array([1.0, 100.0]))


@given(seed=SEEDS, shift=st.sampled_from([-1e3, -1.0, 30.0, 1e3]))
def test_shift_of_a_rows_scores(seed, shift):
    """A vector added to all keys adds one number to each row of scores."""
    q, k, v = drawn(seed)
    moved = k + shift * np.random.default_rng(seed).standard_normal((2, 1, 2, 4))
    np.testing.assert_allclose(
        attention(q, moved, v, mask=CAUSAL), attention(q, k, v, mask=CAUSAL), atol=1e-9
    )


@given(seed=SEEDS)
def test_rows_of_very_different_scores(seed):
    """Each row is shifted by its own maximum: one of all rows would leave nothing of the small."""
    q, k, v = drawn(seed)
    k[..., 0], q[..., 0] = 1.0, np.array([0.0, -4e3, 4e3, -2e3, 2e3, 1.0])[:, None]
    plain = q.copy()
    plain[..., 0] = 0.0
    np.testing.assert_allclose(attention(q, k, v), attention(plain, k, v), atol=1e-9)


@given(seed=SEEDS)
def test_zero_queries_give_the_running_mean(seed):
    _, k, v = drawn(seed)
    y = attention(np.zeros((2, 6, 4, 4)), k, v, mask=CAUSAL)
    means = np.cumsum(v, axis=1) / np.arange(1, 7)[:, None, None]
    np.testing.assert_allclose(y, np.repeat(means, 2, axis=2), **CLOSE)


@given(seed=SEEDS)
def test_constant_values(seed):
    q, k, v = drawn(seed)
    v[:] = v[:, :1]
    expected = np.broadcast_to(np.repeat(v[:, :1], 2, axis=2), q.shape)
    np.testing.assert_allclose(attention(q, k, v, mask=CAUSAL), expected, **CLOSE)


@given(seed=SEEDS, kv_heads=st.sampled_from([1, 2, 4]))
def test_grouped_is_repeated(seed, kv_heads):
    q, k, v = drawn(seed, kv_heads=kv_heads)
    group = 4 // kv_heads
    repeated = (np.repeat(array, group, axis=2) for array in (k, v))
    np.testing.assert_allclose(
        attention(q, k, v, mask=CAUSAL), attention(q, *repeated, mask=CAUSAL), **CLOSE
    )


@given(seed=SEEDS)
def test_heads_are_independent(seed):
    q, k, v = drawn(seed, kv_heads=4)
    order = np.random.default_rng(seed).permutation(4)
    permuted = (array[:, :, order] for array in (q, k, v))
    np.testing.assert_allclose(
        attention(*permuted, mask=CAUSAL), attention(q, k, v, mask=CAUSAL)[:, :, order], **CLOSE
    )


@given(seed=SEEDS)
def test_rows_of_a_batch_are_independent(seed):
    q, k, v = drawn(seed)
    mask = random_mask(seed)
    both = attention(q, k, v, mask=mask)
    for b in range(2):
        alone = attention(*(a[b : b + 1] for a in (q, k, v)), mask=mask[b])
        np.testing.assert_allclose(both[b], alone[0], **CLOSE)


@given(seed=SEEDS)
def test_order_of_keys_does_not_matter(seed):
    q, k, v = drawn(seed)
    mask = random_mask(seed)
    order = np.random.default_rng(seed).permutation(6)
    np.testing.assert_allclose(
        attention(q, k[:, order], v[:, order], mask=mask[..., order]),
        attention(q, k, v, mask=mask),
        **CLOSE,
    )


def test_empty_rows_give_exact_zeros(backend):
    q, k, v = (backend.array(array.astype(np.float32)) for array in drawn(3))
    nothing = np.zeros((6, 6), bool)
    y = to_numpy(attention(q, k, v, mask=backend.array(nothing)))
    assert_same_bits(y, np.zeros_like(y))
    one_row = CAUSAL.copy()
    one_row[3] = False
    y = to_numpy(attention(q, k, v, mask=backend.array(one_row)))
    assert_same_bits(y[:, 3], np.zeros_like(y[:, 3]))
    assert np.isfinite(y).all()


def test_no_keys_give_zeros():
    q, k, v = drawn(3, keys=0)
    assert_same_bits(attention(q, k, v), np.zeros_like(q))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([1e20, 0, 0], math.nan),
        ([1e20, 1e20, -1e20], math.nan),
        ([-1e20, 0, 0], 3.0),
        ([-1e20, -1e20, 0], 4.0),
        ([-1e20, -1e20, -1e20], {False: math.nan, True: 0.0}),
    ],
)
def test_scores_that_overflow(keys, expected, masked):
    """As the notes have it; values are 1, 2 and 4, and no scale brings a product back."""
    q, k = np.full((1, 1, 1, 1), 1e20, np.float32), np.array(keys, np.float32).reshape(1, 3, 1, 1)
    v = np.array([1, 2, 4], np.float32).reshape(1, 3, 1, 1)
    mask = np.ones((1, 3), bool) if masked else None
    with np.errstate(over="ignore", invalid="ignore"):
        y = attention(q, k, v, mask=mask, scale=1e-10)
    np.testing.assert_array_equal(
        y.item(), expected[masked] if isinstance(expected, dict) else expected
    )


def test_nan_of_a_query_stays_in_its_row():
    q, k, v = drawn(3)
    before = attention(q, k, v, mask=CAUSAL)
    q[1, 2, 3, 0] = np.nan
    after = attention(q, k, v, mask=CAUSAL)
    assert np.isnan(after[1, 2, 3]).all()
    after[1, 2, 3] = before[1, 2, 3]
    assert_same_bits(after, before)


@given(seed=SEEDS, window=st.none() | st.integers(1, 7), padded=st.booleans())
def test_mask_is_the_boolean_mask_it_stands_for(backend, seed, window, padded):
    q, k, v = (backend.array(array.astype(np.float32)) for array in drawn(seed, queries=3))
    keep = np.random.default_rng(seed).random((2, 6)) < 0.7 if padded else np.ones((2, 6), bool)
    boolean = np.zeros((2, 3, 6), bool)
    for b, s, t in np.ndindex(2, 3, 6):
        distance = 3 + s - t
        boolean[b, s, t] = 0 <= distance < (window or 99) and keep[b, t]
    mask = Mask(
        *(backend.array(slots) for slots in (tokens(3, first=3), tokens(6))),
        window,
        backend.array(keep) if padded else None,
    )
    assert_same_bits(attention(q, k, v, mask=mask), attention(q, k, v, mask=backend.array(boolean)))


def test_one_mask_for_the_batch_and_one_for_each_row():
    q, k, v = drawn(4)
    one = attention(q, k, v, mask=CAUSAL)
    assert_same_bits(attention(q, k, v, mask=CAUSAL[None]), one)
    assert_same_bits(attention(q, k, v, mask=np.stack([CAUSAL] * 2)), one)
    other = np.stack([CAUSAL, CAUSAL[::-1]])
    rows = attention(q, k, v, mask=other)
    assert_same_bits(rows[0], one[0])
    np.testing.assert_allclose(rows[1], attention(q, k, v, mask=CAUSAL[::-1])[1], **CLOSE)


@pytest.mark.parametrize("scores", [1, 48, 100, 200, 1 << 24])
@pytest.mark.parametrize("kind", ["none", "rows", "each row", "Mask"])
def test_blocks_of_queries(monkeypatch, scores, kind):
    """Blocks of one query, of one, two and four whole ones, and all in one block."""
    q, k, v = drawn(5)
    mask = {
        "none": None,
        "rows": CAUSAL,
        "each row": random_mask(5),
        "Mask": Mask(tokens(6), tokens(6), 3, random_mask(5)[:, 0]),
    }[kind]
    boolean = mask.rows(0, 6) if isinstance(mask, Mask) else mask
    if boolean is not None:
        boolean = listed(np.broadcast_to(boolean, (2, 6, 6)))
    monkeypatch.setattr(attend, "SCORES", scores)
    expected = decoder_oracle.attention(q, k, v, boolean)
    np.testing.assert_allclose(attention(q, k, v, mask=mask), expected, **CLOSE)


def test_scale_may_be_a_scalar_of_numpy():
    q, k, v = (array.astype(np.float32) for array in drawn(6))
    for kind in (np.float64, np.float32, np.float16):
        assert_same_bits(attention(q, k, v, scale=kind(0.25)), attention(q, k, v, scale=0.25))
    assert_same_bits(attention(q, k, v, scale=np.int8(2)), attention(q, k, v, scale=2.0))


def test_default_scale_is_one_over_the_root_of_head_dim():
    q, k, v = drawn(6, width=9)
    assert_same_bits(attention(q, k, v), attention(q, k, v, scale=1 / math.sqrt(9)))
    np.testing.assert_allclose(attention(3 * q, k, v, scale=0.25), attention(q, k, v, scale=0.75))


Q, K, V = drawn(0)


@pytest.mark.parametrize(
    ("arguments", "mask", "error", "message"),
    [
        ((Q.tolist(), K, V), None, TypeError, "q: expected an array"),
        ((Q[0], K, V), None, ValueError, r"q: expected shape \[B, S, num_heads, D\], got \[6, 4"),
        ((Q, K[0], V), None, ValueError, r"k: expected shape \[2, T, num_kv_heads, 4\], got"),
        ((Q, K[..., None], V), None, ValueError, r"k: .* got \[2, 6, 2, 4, 1\]"),
        ((Q, K[:1], V), None, ValueError, r"k: expected shape .* got \[1, 6, 2, 4\]"),
        ((Q, K[..., :3], V), None, ValueError, r"k: expected shape .* got \[2, 6, 2, 3\]"),
        ((Q, K, V[:, :5]), None, ValueError, r"v: expected shape \[2, 6, 2, 4\] of k, got \[2, 5"),
        ((Q, K, V[:, :, :1]), None, ValueError, r"v: expected shape .* of k, got \[2, 6, 1, 4\]"),
        ((Q[:, :, :3], K, V), None, ValueError, "k: expected heads in a divisor of q's 3, got 2"),
        ((Q, K[:, :, :0], V[:, :, :0]), None, ValueError, "k: expected heads .* got 0"),
        ((Q, K.astype(np.float32), V), None, TypeError, "k: expected the dtype of q, float64, got"),
        ((Q, K, V.astype(int)), None, TypeError, "v: expected one of the dtypes"),
        ((Q, K, array_api_strict.asarray(V)), None, TypeError, "v: .* same library as q, numpy"),
        ((Q, K, V), CAUSAL.astype(int), TypeError, "mask: expected bool, got int64"),
        ((Q, K, V), CAUSAL[:5], ValueError, r"mask: expected shape \[6, 6\] or \[2, 6, 6\], got"),
        ((Q, K, V), np.stack([CAUSAL] * 3), ValueError, r"mask: .* got \[3, 6, 6\]"),
        ((Q, K, V), CAUSAL.tolist(), TypeError, "mask: expected an array"),
        ((Q, K, V), array_api_strict.asarray(CAUSAL), TypeError, "mask: .* same library as q"),
    ],
)
def test_refuses(arguments, mask, error, message):
    with pytest.raises(error, match=message):
        attention(*arguments, mask=mask)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        ("x", TypeError, "scale: expected a number, got str"),
        (True, TypeError, "scale: expected a number, got bool"),
        (np.ones(1), TypeError, "scale: expected a number, got ndarray"),
        (math.nan, ValueError, "scale: expected a finite number, got nan"),
        (-math.inf, ValueError, "scale: expected a finite number, got -inf"),
    ],
)
def test_refuses_a_scale(scale, error, message):
    with pytest.raises(error, match=message):
        attention(Q, K, V, scale=scale)


def test_wide_heads(rng):
    """So wide that Python has no number of its own for their width."""
    q, k, v = rng.standard_normal((3, 1, 2, 1, 300))
    np.testing.assert_allclose(attention(q, k, v), decoder_oracle.attention(q, k, v), **CLOSE)
