"""Caches cut, reordered, repeated and made longer, against passes without a cache."""

from __future__ import annotations

from functools import partial

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import KVCache, forward
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import assert_same_bits
from tests.support.cache_session import Session
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights
from tests.test_forward import FLOAT32, FLOAT64, assert_close

WINDOW = CONFIGS["window"]


@given(data=st.data(), wide=st.booleans())
def test_any_changes_in_any_order(backend, data, wide):
    wide = wide and backend.xp is np
    dtype, tolerance = (np.float64, FLOAT64) if wide else (np.float32, FLOAT32)
    close = partial(assert_close, tolerance=tolerance)
    session = Session(data, close, array=backend.array, dtype=dtype)
    for _ in range(data.draw(st.integers(5, 20), label="steps")):
        session.step()


def filled(config, length, *, batch=3, keep=None, **options):
    """A cache of random tokens, some of them padding."""
    model = model_of(config, random_weights(config, dtype=np.float32))
    ids = np.random.default_rng(0).integers(13, size=(batch, length))
    cache = KVCache.create(model, batch, 12, **options)
    for i in range(length):
        mask = None if keep is None else keep[:, i : i + 1]
        cache = forward(model, ids[:, i : i + 1], cache=cache, attention_mask=mask).cache
    return cache


def test_rows_are_taken_bit_for_bit():
    cache = filled(GQA, 5, keep=np.arange(5) >= np.arange(3)[:, None])
    taken = cache.take([2, -3, 2])
    rows = [2, 0, 2]
    for name in ("keys", "values"):
        for new, old in zip(getattr(taken, name), getattr(cache, name), strict=True):
            assert_same_bits(new, old[rows])
            assert not np.shares_memory(new, old)
    assert_same_bits(taken.keep, cache.keep[rows])
    assert taken.counts.tolist() == [3, 5, 3]
    assert (taken.length, taken.max_len) == (5, 12)
    assert_same_bits(cache.repeat(2).keys[1], np.repeat(cache.keys[1], 2, axis=0))


def test_rows_in_every_form(backend):
    cache = KVCache.create(GQA, 3, 4, like=backend.array(np.zeros(0, np.float32))).extend(1)
    marks = backend.array(np.arange(3 * 8, dtype=np.float32).reshape(3, 1, 2, 4))
    cache = cache.append(0, marks, marks)
    whole = to_numpy(cache.keys[0])
    numbers = [np.array([2, -1]), np.array([2, 2], np.uint8)]
    for rows in (*numbers, *map(backend.array, numbers), [2, -1], (np.int8(2), 2)):
        found = cache.take(rows).keys[0]
        assert backend.holds(found)
        assert_same_bits(found, whole[[2, 2]])
    assert_same_bits(cache.take(range(1, 3)).keys[0], whole[1:])


def test_a_ring_that_was_cut_remembers_what_it_has_lost():
    """It holds tokens 2 to 6, and still those alone after it was cut to 5."""
    cache = filled(WINDOW, 7, rolling=3)
    assert (cache.capacity, cache.first) == (5, 2)
    cut = cache.truncate(6).truncate(5)
    assert cut.first == 2
    for length in (1, 2, 3):
        with pytest.raises(ValueError, match=f"length: expected at least 4, or 0, .* got {length}"):
            cut.truncate(length)
    assert cut.truncate(4).length == 4
    empty = cut.truncate(0)
    assert (empty.length, empty.first) == (0, 0)
    assert empty.extend(3).truncate(1).length == 1


def test_a_ring_stays_a_ring_when_it_grows():
    config = CONFIGS["window"]
    small = KVCache.create(config, 1, 4, rolling=3)  # 4 tokens: no ring yet
    assert (small.capacity, small.most_at_once()) == (4, 4)
    ring = small.grow(99)
    assert (ring.capacity, ring.most_at_once(), ring.window, ring.max_len) == (5, 3, 3, 99)
    longer = ring.grow(10**9)
    assert longer.capacity == 5
    assert longer.keys is ring.keys
    assert small.grow(4).keys is small.keys


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.truncate(6), ValueError, "length: expected 0 to 5, that of the cache, got 6"),
        (lambda c: c.truncate(-1), ValueError, "length: expected 0 to 5, .*, got -1"),
        (lambda c: c.truncate(10**30), ValueError, "length: expected 0 to 5, .*, got 10000"),
        (lambda c: c.truncate(2.0), TypeError, "length: expected an integer, got float"),
        (lambda c: c.truncate(True), TypeError, "length: expected an integer, got bool"),
        (lambda c: c.truncate(None), TypeError, "length: expected an integer, got NoneType"),
        (lambda c: c.take([3]), ValueError, "rows: expected numbers .* -3 to 2, got 3 to 3"),
        (lambda c: c.take([0, -4]), ValueError, "rows: .* from -3 to 2, got -4 to 0"),
        (lambda c: c.take(np.array([2**63], "u8")), ValueError, "rows: .* got 92233720368547758"),
        (lambda c: c.take([]), ValueError, r"rows: expected shape \[n\] with n > 0, got \[0\]"),
        (lambda c: c.take([[1]]), ValueError, r"rows: expected shape \[n\] .*, got \[1, 1\]"),
        (lambda c: c.take([[1], [1, 2]]), TypeError, "rows: expected integers, got"),
        (lambda c: c.take([1.0]), TypeError, "rows: expected an integer dtype, got float64"),
        (lambda c: c.take([True] * 3), TypeError, "rows: expected an integer dtype, got bool"),
        (lambda c: c.take("a"), ValueError, r"rows: expected shape"),
        (lambda c: c.take(2), TypeError, "rows: expected an array, got int"),
        (lambda c: c.take(None), TypeError, "rows: expected an array, got NoneType"),
        (
            lambda c: c.take(array_api_strict.asarray([0])),
            TypeError,
            "rows: expected an array of the same library",
        ),
        (lambda c: c.repeat(0), ValueError, "n: expected a positive integer, got 0"),
        (lambda c: c.repeat(1.5), ValueError, "n: expected a positive integer, got 1.5"),
        (lambda c: c.grow(11), ValueError, "max_len: expected at least .* cache, 12, got 11"),
        (lambda c: c.grow(None), ValueError, "max_len: expected a positive integer, got None"),
        (lambda c: c.grow(2**31), ValueError, "max_len: expected at most 2147483647, got"),
    ],
)
def test_refuses(change, error, message):
    cache = filled(GQA, 5)
    with pytest.raises(error, match=f"^{message}") as caught:
        change(cache)
    assert "\n" not in str(caught.value)
