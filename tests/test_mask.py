"""`Mask` against the boolean mask that it stands for, written in loops."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_layers import Mask, attention
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import assert_same_bits


def allowed(query, key, window, keep):
    """Whether a query may attend to a key, by their slots."""
    if key == -1 or key > query or not keep:
        return False
    return window is None or query - key < window


@example(seed=0, queries=0, keys=3)
@example(seed=0, queries=3, keys=0)
@given(seed=st.integers(0, 2**32 - 1), queries=st.integers(2, 6), keys=st.integers(2, 6))
def test_like_loops(backend, seed, queries, keys):
    rng = np.random.default_rng(seed)
    batch, first = int(rng.integers(1, 4)), int(rng.integers(6))
    window = None if rng.random() < 0.2 else int(rng.integers(1, 8))
    query_slots = first + np.arange(queries)
    key_slots = rng.integers(-1, first + queries + 1, size=keys)
    keep = None if rng.random() < 0.5 else rng.random((batch, keys)) < 0.7
    mask = Mask(
        backend.array(query_slots),
        backend.array(key_slots),
        window,
        None if keep is None else backend.array(keep),
    )
    whole = mask.rows(0, queries)
    assert backend.holds(whole)
    whole = to_numpy(whole)
    assert whole.dtype == np.bool_
    assert whole.shape == (1 if keep is None else batch, queries, keys)
    for b, s, t in np.ndindex(whole.shape):
        kept = keep is None or keep[b, t]
        assert whole[b, s, t] == allowed(query_slots[s], key_slots[t], window, kept)
    start, stop = sorted(rng.integers(queries + 1, size=2).tolist())
    assert_same_bits(to_numpy(mask.rows(start, stop)).astype(int), whole[:, start:stop].astype(int))


Q = np.zeros((2, 3, 1, 4))
K = np.zeros((2, 5, 1, 4))
S, T = np.arange(3), np.arange(5)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (Mask(T, T), ValueError, r"mask.queries: expected shape \[3\], got \[5\]"),
        (Mask(S, S), ValueError, r"mask.keys: expected shape \[5\], got \[3\]"),
        (
            Mask(S, T, None, np.ones((3, 5), bool)),
            ValueError,
            r"mask.keep: expected shape \[2, 5\], got \[3, 5\]",
        ),
        (
            Mask(*map(array_api_strict.asarray, (S, T))),
            TypeError,
            "mask.queries: expected an array of the same library as q",
        ),
    ],
)
def test_refuses(mask, error, message):
    with pytest.raises(error, match=message):
        attention(Q, K, K, mask=mask)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((S, T, None, np.ones(5, bool)), ValueError, r"^keep: expected shape \[B, 5\], got \[5\]"),
        ((S, T, None, np.ones((2, 3), bool)), ValueError, r"^keep: .* \[B, 5\], got \[2, 3\]"),
        ((S, T, None, np.ones((2, 5))), TypeError, "^keep: expected bool, got float64"),
        ((S, T, None, [[True] * 5]), TypeError, "^keep: expected an array of NumPy"),
        ((1.0 * S, T), TypeError, "^queries: expected an integer dtype, got float64"),
        ((S, T > 0), TypeError, "^keys: expected an integer dtype, got bool"),
        (([0, 1, 2], T), TypeError, "^queries: expected an array, got list"),
        ((None, T), TypeError, "^queries: expected an array, got NoneType"),
        ((np.array(1), T), ValueError, r"^queries: expected one axis, got shape \[\]"),
        ((S, np.ones((2, 5), int)), ValueError, r"^keys: expected one axis, got shape \[2, 5\]"),
        ((S, array_api_strict.arange(5)), TypeError, "^keys: .* same library as queries"),
        *(
            ((S, T, window), ValueError, f"^window: expected a positive integer, got {window!r}")
            for window in (0, 2.0, True, "3", -1)
        ),
    ],
)
def test_a_mask_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Mask(*arguments)


@pytest.mark.parametrize("window", [5, 2**31, 2**63, 10**30])
def test_a_window_longer_than_the_sequence_hides_nothing(backend, window):
    slots = backend.array(np.arange(4))
    found = Mask(slots, slots, window).rows(0, 4)
    np.testing.assert_array_equal(to_numpy(found), np.tri(4, dtype=bool)[None])
    q = backend.array(np.random.default_rng(0).standard_normal((1, 4, 1, 2), dtype=np.float32))
    with_window = attention(q, q, q, mask=Mask(slots, slots, window))
    assert_same_bits(with_window, attention(q, q, q, mask=Mask(slots, slots)))


@pytest.mark.parametrize("window", [np.int8(3), np.uint64(3)])
def test_a_window_of_any_integer_type_is_an_int(window):
    assert type(Mask(S, T, window).window) is int


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int8"])
@pytest.mark.parametrize("window", [2, 200])
def test_slots_of_any_integer_dtype(backend, dtype, window):
    slots = backend.array(np.arange(4))
    expected = Mask(slots, slots, window).rows(0, 4)
    narrow = backend.array(np.arange(4).astype(dtype))
    for queries, keys in ((narrow, narrow), (narrow, slots), (slots, narrow)):
        computed = Mask(queries, keys, window).rows(0, 4)
        np.testing.assert_array_equal(to_numpy(computed), to_numpy(expected))


def test_padding_of_many_keys():
    """So many that Python has no number of its own for them."""
    places = np.arange(300)
    keep = np.ones((1, 300), bool)
    keep[0, :299] = False
    assert Mask(places, places, None, keep).rows(299, 300).sum() == 1
