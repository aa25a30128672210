"""What a forward pass gathers about its tokens: where they stand, and what they see."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers import KVCache, forward
from llama_layers.model.inputs import Inputs
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights

X = np.zeros((2, 4, GQA.hidden_size), np.float32)
PADDED = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])


def test_positions_count_from_the_first_valid_token():
    assert Inputs.of(X, GQA).positions.tolist() == [0, 1, 2, 3]
    found = Inputs.of(X, GQA, attention_mask=PADDED)
    assert found.positions.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    cache = KVCache.create(GQA, 2, 9)
    first = Inputs.of(X, GQA, cache, attention_mask=PADDED)
    assert first.cache.length == 4
    assert cache.length == 0
    after = Inputs.of(X[:, :2], GQA, first.cache)
    assert after.positions.tolist() == [[4, 5], [2, 3]]
    whole = Inputs.of(X, GQA, cache).cache
    assert Inputs.of(X[:, :2], GQA, whole).positions.tolist() == [4, 5]


def test_given_positions_are_those_of_the_rope_table():
    positions = np.array([7, 8, 9, 11])
    found = Inputs.of(X, GQA, positions=positions)
    assert found.positions is positions
    phases = positions[:, None] * 100.0 ** -np.array([0, 0.5])
    (tables,) = found.ropes.values()
    for table, expected in zip(tables, (np.cos(phases), np.sin(phases)), strict=True):
        np.testing.assert_allclose(table, expected, atol=1e-6)


def test_a_mask_for_each_window():
    config = CONFIGS["some windows"]
    cache = Inputs.of(X, config, KVCache.create(config, 2, 9), attention_mask=PADDED).cache
    found = Inputs.of(X[:, :2], config, cache).masks
    causal = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
    near = np.array([[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]], bool)
    valid = np.array([[[1] * 6], [[0, 0, 1, 1, 1, 1]]], bool)
    assert found.keys() == {None, 2}
    assert np.array_equal(found[None].rows(0, 2), causal & valid)
    assert np.array_equal(found[2].rows(0, 2), near & valid)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention_mask": np.array([[1, 0], [1, 1]]), "last_only": True},
        {"attention_mask": np.array([[1, 2], [1, 1]])},
        {"positions": np.array([0, -1])},
        {"positions": np.array([0, 1, 2])},
    ],
)
def test_a_wrong_argument_leaves_the_cache_as_it_is(wrong):
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    ids = np.array([[1, 2, 3, 4], [0, 0, 1, 2]])
    cache = forward(model, ids, cache=KVCache.create(model, 2, 9), attention_mask=PADDED).cache
    cache.keep[:, 4:] = True  # as they were before, in a ring
    before = [array.copy() for array in (*cache.keys, *cache.values, cache.keep, cache.counts)]
    with pytest.raises(ValueError, match=r"^(last_only|attention_mask|positions): "):
        forward(model, ids[:, :2], cache=cache, **wrong)
    after = (*cache.keys, *cache.values, cache.keep, cache.counts)
    assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))
