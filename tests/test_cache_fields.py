"""What belongs together in a cache stays together, and fits the model."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from llama_layers import KVCache, forward
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights

WINDOW = CONFIGS["window"]
BLOCK = np.zeros((2, 1, 2, 4), np.float32)
WHOLE = KVCache.create(GQA, 2, 4)


@pytest.mark.parametrize("name", [f.name for f in fields(KVCache)])
def test_no_field_is_replaced_without_the_others(name):
    for value in (getattr(WHOLE, name), 1, None):
        with pytest.raises(TypeError, match=r"^KVCache: expected KVCache.create .*truncate, take"):
            replace(WHOLE, **{name: value})
        with pytest.raises(FrozenInstanceError):
            setattr(WHOLE, name, value)


def test_fields_make_no_cache():
    with pytest.raises(TypeError, match=r"^KVCache: expected KVCache.create to make it"):
        KVCache(WHOLE.keys, WHOLE.values, 0, 4)


def test_keys_and_values_of_another_library_are_appended(rng):
    """Those of a model's own forward pass, say, which another library has made."""
    model = model_of(GQA, random_weights(GQA))
    ids = rng.integers(GQA.vocab_size, size=(2, 6))
    whole = KVCache.create(model, 2, 6)
    expected = forward(model, ids, cache=whole).logits
    cache = KVCache.create(model, 2, 6).extend(4)
    for layer, (k, v) in enumerate(zip(whole.keys, whole.values, strict=True)):
        cache = cache.append(layer, k[:, :4], v[:, :4])
    logits = forward(model, ids[:, 4:], cache=cache).logits
    np.testing.assert_allclose(logits, expected[:, 4:], rtol=0, atol=1e-12)


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
    cache = WHOLE.copy().extend(1).append(0, BLOCK + 2, (BLOCK + 1).astype(">f4"))
    assert (cache.visible(cache.keys[0]) == 2).all()
    assert (cache.visible(cache.values[0]) == 1).all()
