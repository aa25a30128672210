"""Caches made by hand: their arrays fit each other, and the model."""

from __future__ import annotations

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest

from llama_layers import KVCache, forward
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights

WINDOW = CONFIGS["window"]
BLOCK = np.zeros((2, 1, 2, 4), np.float32)
WHOLE = KVCache.create(GQA, 2, 4)
OTHER = np.zeros((2, 4, 2, 4), np.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keys": ()}, ValueError, "values: expected one for each .*, got 0 keys and 2 values"),
        ({"keys": (OTHER,)}, ValueError, "values: .*, got 1 keys and 2 values"),
        ({"keys": (OTHER,) * 3}, ValueError, "values: .*, got 3 keys and 2 values"),
        ({"keys": OTHER}, TypeError, "keys: expected a tuple of arrays, got ndarray"),
        ({"keys": None}, TypeError, "keys: expected a tuple of arrays, got NoneType"),
        ({"keys": (None, OTHER)}, TypeError, r"keys\[0\]: expected an array"),
        ({"keys": (OTHER[0], OTHER)}, ValueError, r"keys\[0\]: expected shape \[B, capacity, num"),
        (
            {"values": (OTHER, OTHER[:, :1])},
            ValueError,
            r"values\[1\]: expected shape \[2, 4, 2, 4\], got \[2, 1, 2, 4\]",
        ),
        ({"values": (OTHER[:1], OTHER)}, ValueError, r"values\[0\]: expected shape \[2, 4, 2, 4\]"),
        (
            {"values": (OTHER, OTHER.astype("f8"))},
            TypeError,
            r"values\[1\]: .* float32, got float64",
        ),
        ({"values": (OTHER, OTHER.astype(int))}, TypeError, r"values\[1\]: .* got int64"),
        (
            {"values": (OTHER, array_api_strict.asarray(OTHER))},
            TypeError,
            r"values\[1\]: expected an array of the same library as keys\[0\]",
        ),
        ({"length": 5}, ValueError, "length: expected 0 to max_len = 4, got 5"),
        ({"length": -1}, ValueError, "length: expected 0 to max_len = 4, got -1"),
        ({"length": True}, TypeError, "length: expected an integer, got bool"),
        ({"length": 1.0}, TypeError, "length: expected an integer, got float"),
        ({"max_len": 5}, ValueError, "keys: expected room for the 5 tokens of max_len, got .* 4"),
        ({"max_len": 10**30}, ValueError, "max_len: expected at most 2147483647, got 10000"),
        (
            {"max_len": 9, "window": 5},
            ValueError,
            "keys: expected room for the 5 tokens that the window sees, got capacity = 4",
        ),
        ({"window": 0}, ValueError, "window: expected a positive integer, got 0"),
        ({"room": 1}, ValueError, "room: expected an integer from 0 to the length, got 1"),
        ({"room": -1}, ValueError, "room: expected an integer from 0 to the length, got -1"),
        ({"length": 2, "room": 3}, ValueError, "room: .* from 0 to the length, got 3"),
        ({"room": None}, ValueError, "room: expected an integer from 0 to the length, got None"),
        ({"keep": np.ones((2, 4), bool)}, ValueError, "counts: expected with keep"),
        ({"counts": np.ones(2, int)}, ValueError, "counts: expected with keep"),
        (
            {"keep": np.ones((2, 3), bool), "counts": np.ones(2, int)},
            ValueError,
            r"keep: expected shape \[2, 4\], got \[2, 3\]",
        ),
        (
            {"keep": np.ones((2, 4), int), "counts": np.ones(2, int)},
            TypeError,
            "keep: expected bool, got int64",
        ),
        (
            {"keep": np.ones((2, 4), bool), "counts": np.ones(3, int)},
            ValueError,
            r"counts: expected shape \[2\], got \[3\]",
        ),
        (
            {"keep": np.ones((2, 4), bool), "counts": np.ones(2)},
            TypeError,
            "counts: expected an integer dtype, got float64",
        ),
    ],
)
def test_arrays_that_do_not_fit_each_other_make_no_cache(changes, error, message):
    with pytest.raises(error, match=message):
        replace(WHOLE, **changes)


def test_numbers_and_sequences_of_other_types_are_kept_as_python_s():
    lists = KVCache(list(WHOLE.keys), list(WHOLE.values), np.array(3), np.int8(4), np.int8(2))
    assert type(lists.keys) is type(lists.values) is tuple
    numbers = (lists.length, lists.max_len, lists.window, lists.room)
    assert numbers == (3, 4, 2, 0)
    assert {type(number) for number in numbers} == {int}
    assert replace(WHOLE, length=3, room=3).room == 3
    assert replace(WHOLE, length=np.uint64(2)).extend(2).length == 4


def test_a_ring_for_a_shorter_window_than_the_layers_have():
    """It would have lost what they see."""
    config = replace(WINDOW, sliding_window=4)
    model = model_of(config, random_weights(config, dtype=np.float32))
    ids = np.array([[1]])
    cache = KVCache.create(WINDOW, 1, 9, rolling=1)
    with pytest.raises(ValueError, match=r"cache: .* all that the layers see, 4 tokens, .* of 3"):
        forward(model, ids, cache=cache)
    whole = model_of(GQA, random_weights(GQA, dtype=np.float32))
    with pytest.raises(ValueError, match=r"cache: .* all that the layers see, every token"):
        forward(whole, ids, cache=cache)
    forward(whole, ids, cache=KVCache.create(WINDOW, 1, 300, rolling=900))  # not a ring yet
    narrow = replace(config, sliding_window=2)
    forward(model_of(narrow, random_weights(narrow, dtype=np.float32)), ids, cache=cache)


def test_bytes_in_the_other_order_are_the_same_numbers():
    swapped = tuple(array.astype(">f4") for array in WHOLE.keys)
    cache = replace(WHOLE, keys=swapped).extend(1).append(0, BLOCK + 2, (BLOCK + 1).astype(">f4"))
    assert (cache.visible(cache.keys[0]) == 2).all()
    assert (cache.visible(cache.values[0]) == 1).all()
