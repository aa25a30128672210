"""`KVCache`: what comes out is what went in, rings, padding, and that nothing is half written."""

from __future__ import annotations

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
from array_api_compat import device
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import KVCache, forward
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import assert_same_bits
from tests.support import decoder_oracle
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights, run_in_chunks
from tests.test_forward import FLOAT32, assert_close

WINDOW = CONFIGS["window"]


def blocks(rng, counts, config=GQA, batch=2):
    shape = (config.num_key_value_heads, config.head_dim)
    return [rng.standard_normal((batch, count, *shape)).astype(np.float32) for count in counts]


def test_starts_as_zeros(backend):
    like = backend.array(np.zeros(0, np.float32))
    cache = KVCache.create(GQA, 2, 5, like=like)
    assert (cache.length, cache.max_len, cache.capacity) == (0, 5, 5)
    assert len(cache.keys) == len(cache.values) == GQA.num_hidden_layers
    for array in (*cache.keys, *cache.values):
        assert backend.holds(array)
        assert_same_bits(array, np.zeros((2, 5, 2, 4), np.float32))


def test_created_for_a_model(backend):
    model = model_of(GQA, random_weights(GQA, dtype=np.float32), backend.array)
    cache = KVCache.create(model, 1, 3)
    assert cache.keys[0].dtype == model.weights.norm.dtype
    assert device(cache.keys[0]) == device(model.weights.norm)
    wide = KVCache.create(model_of(GQA, random_weights(GQA)), 1, 3)
    assert wide.keys[0].dtype == np.float64
    narrow = KVCache.create(model_of(GQA, random_weights(GQA, dtype=np.float16)), 1, 3)
    assert narrow.keys[0].dtype == np.float32  # NumPy widens activations
    assert KVCache.create(GQA, 1, 3).keys[0].dtype == np.float32


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_append_keeps_every_token_in_its_place(backend, counts, seed):
    rng = np.random.default_rng(seed)
    cache = KVCache.create(GQA, 2, sum(counts) + 1, like=backend.array(np.zeros(0, np.float32)))
    keys = [blocks(rng, counts) for _ in range(2)]
    values = [blocks(rng, counts) for _ in range(2)]
    for step, count in enumerate(counts):
        cache = cache.extend(count)
        for layer in range(2):
            k, v = keys[layer][step], values[layer][step]
            cache = cache.append(layer, backend.array(k), backend.array(v))
    assert cache.length == sum(counts)
    for layer in range(2):
        assert_same_bits(cache.visible(cache.keys[layer]), np.concatenate(keys[layer], axis=1))
        assert_same_bits(cache.visible(cache.values[layer]), np.concatenate(values[layer], axis=1))
        assert not to_numpy(cache.keys[layer])[:, sum(counts) :].any()
    np.testing.assert_array_equal(to_numpy(cache.key_slots()), np.arange(sum(counts)))


@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=12),
    window=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_ring_holds_the_latest_tokens(backend, counts, window, seed):
    rng = np.random.default_rng(seed)
    config = replace(WINDOW, sliding_window=window)
    like = backend.array(np.zeros(0, np.float32))
    cache = KVCache.create(config, 1, 99, like=like, rolling=3)
    assert cache.capacity == window + 2
    assert cache.most_at_once() == 3
    past = np.zeros((1, 0, 2, 4), np.float32)
    for count in counts:
        before = past.shape[1]
        (block,) = blocks(rng, [count], batch=1)
        past = np.concatenate([past, block], axis=1)
        keep = np.arange(before, before + count)[None] % 3 != 0
        cache = cache.extend(count, backend.array(keep))
        cache = cache.append(0, backend.array(block), backend.array(-block))
        slots = to_numpy(cache.key_slots())
        keys = to_numpy(cache.visible(cache.keys[0]))
        kept = to_numpy(cache.visible_keep())
        # All that the first of these tokens sees is there, under the right number.
        needed = range(max(0, before - window + 1), before + count)
        assert set(needed) <= set(slots.tolist())
        assert len(set(slots.tolist())) == len(slots)
        for place, slot in enumerate(slots):
            assert_same_bits(keys[:, place], past[:, slot])
            assert kept[0, place] == (slot % 3 != 0)
    assert to_numpy(cache.counts).tolist() == [sum(slot % 3 != 0 for slot in range(past.shape[1]))]


@given(data=st.data(), seed=st.integers(0, 2**32 - 1), window=st.integers(1, 4))
def test_ring_is_the_full_cache(data, seed, window):
    rng = np.random.default_rng(seed)
    config = replace(CONFIGS["biases"], sliding_window=window)
    weights = random_weights(config, seed)
    ids = rng.integers(config.vocab_size, size=(2, 12))
    most = data.draw(st.integers(1, 4))
    cuts, at = [], 0
    while (at := at + data.draw(st.integers(1, most))) < 12:
        cuts.append(at)
    if 12 - (cuts[-1] if cuts else 0) > most:
        cuts.append(12 - most)
    start = int(rng.integers(6))
    keep = np.arange(12) >= np.array([[0], [start]])
    model = model_of(config, weights)
    computed = run_in_chunks(model, ids, cuts, keep=keep, rolling=most)
    for row, first in ((0, 0), (1, start)):
        expected = decoder_oracle.logits(weights, config, ids[row, first:])
        assert_close(computed[row, first:], expected)


def test_ring_on_every_library(backend, rng):
    weights = random_weights(WINDOW, dtype=np.float32)
    model = model_of(WINDOW, weights, backend.array)
    ids = rng.integers(WINDOW.vocab_size, size=(1, 9))
    computed = run_in_chunks(model, ids, [2, 4, 5, 6, 8], array=backend.array, rolling=2)
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    assert_close(computed[0], decoder_oracle.logits(wide, WINDOW, ids[0]), FLOAT32)


def test_ring_takes_no_more_memory_than_a_full_cache():
    assert KVCache.create(WINDOW, 1, 3, rolling=512).capacity == 3
    assert KVCache.create(WINDOW, 1, 3, rolling=512).most_at_once() == 3
    assert KVCache.create(WINDOW, 1, 600, rolling=512).capacity == 514


def contents(cache):
    parts = (*cache.keys, *cache.values, cache.keep, cache.counts)
    return [b"" if part is None else to_numpy(part).tobytes() for part in parts]


@pytest.mark.parametrize("rolling", [None, 2])
def test_overflow_raises_before_anything_is_written(backend, rolling, rng):
    model = model_of(WINDOW, random_weights(WINDOW, dtype=np.float32), backend.array)
    ids = backend.array(rng.integers(WINDOW.vocab_size, size=(2, 2)))
    keep = backend.array(np.array([[0, 1], [1, 1]]))
    cache = KVCache.create(model, 2, 5, rolling=rolling)
    for _ in range(2):
        cache = forward(model, ids, cache=cache, attention_mask=keep).cache
    before = contents(cache)
    with pytest.raises(ValueError, match="cache: expected room for 6 tokens, got max_len = 5"):
        forward(model, ids, cache=cache, attention_mask=keep)
    assert contents(cache) == before
    cache = forward(model, ids[:, :1], cache=cache).cache  # the last that fits
    assert cache.length == 5
    with pytest.raises(ValueError, match="cache: expected room for 6 tokens"):
        forward(model, ids[:, :1], cache=cache)


def test_more_at_once_than_a_ring_can_take(rng):
    model = model_of(WINDOW, random_weights(WINDOW))
    cache = KVCache.create(model, 1, 99, rolling=2)
    before = contents(cache)
    with pytest.raises(ValueError, match="cache: expected at most 2 tokens at a time, got 3"):
        forward(model, rng.integers(13, size=(1, 3)), cache=cache)
    assert contents(cache) == before


def test_refused_pass_leaves_the_cache(rng):
    model = model_of(GQA, random_weights(GQA))
    ids = rng.integers(13, size=(1, 3))
    cache = forward(model, ids, cache=KVCache.create(model, 1, 8)).cache
    before = contents(cache)
    for options in (
        {"positions": np.arange(2)},
        {"positions": np.arange(3) - 5},
        {"attention_mask": np.ones((1, 5), int)},
        {"attention_mask": 2 * np.ones((1, 3), int)},
    ):
        with pytest.raises(ValueError, match="expected"):
            forward(model, ids, cache=cache, **options)
    assert contents(cache) == before


@pytest.mark.parametrize("cuts", [[2, 4], [5]])
def test_attention_mask_of_new_tokens_or_of_all(cuts, rng):
    model = model_of(GQA, random_weights(GQA))
    ids = rng.integers(13, size=(2, 7))
    keep = np.array([[0, 0, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 1, 1]])
    cache = KVCache.create(model, 2, 7)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, 7], strict=True):
        output = forward(model, ids[:, start:stop], cache=cache, attention_mask=keep[:, :stop])
        cache = output.cache
        parts.append(output.logits)
    assert_same_bits(np.concatenate(parts, axis=1), run_in_chunks(model, ids, cuts, keep=keep))


def test_padding_that_comes_late(rng):
    """Some tokens without a mask, then some with one, then some without again."""
    weights = random_weights(GQA)
    model = model_of(GQA, weights)
    ids = rng.integers(13, size=(2, 7))
    cache = forward(model, ids[:, :3], cache=KVCache.create(model, 2, 7)).cache
    assert cache.keep is None
    keep = np.array([[1, 0], [1, 1]])
    cache = forward(model, ids[:, 3:5], cache=cache, attention_mask=keep).cache
    assert cache.counts.tolist() == [4, 5]
    logits = forward(model, ids[:, 5:], cache=cache).logits
    real = np.delete(ids[0], 4)
    assert_close(logits[0], decoder_oracle.logits(weights, GQA, real)[-2:])
    assert_close(logits[1], decoder_oracle.logits(weights, GQA, ids[1])[-2:])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((GQA, 0, 4), {}, "batch: expected a positive integer, got 0"),
        ((GQA, 1, -1), {}, "max_len: expected a positive integer, got -1"),
        ((GQA, 1, 4.0), {}, "max_len: expected a positive integer, got 4.0"),
        ((GQA, True, 4), {}, "batch: expected a positive integer, got True"),
        ((GQA, None, 4), {}, "batch: expected a positive integer, got None"),
        ((WINDOW, 1, 4), {"rolling": 0}, "rolling: expected a positive integer, got 0"),
        ((GQA, 1, 4), {"rolling": 2}, "rolling: expected a config with a sliding window on every"),
        ((CONFIGS["some windows"], 1, 4), {"rolling": 2}, "rolling: expected a config"),
    ],
)
def test_create_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        KVCache.create(*arguments, **options)


BLOCK = np.zeros((2, 1, 2, 4), np.float32)


@pytest.mark.parametrize(
    ("k", "v", "error", "message"),
    [
        (BLOCK[:1], BLOCK, ValueError, r"k: expected shape \[2, 1, 2, 4\], .* got \[1,"),
        (BLOCK, BLOCK[..., :2], ValueError, r"v: expected shape .* got \[2, 1, 2, 2\]"),
        (BLOCK, BLOCK[:, :0], ValueError, r"v: expected shape .* got \[2, 0, 2, 4\]"),
        (BLOCK, np.repeat(BLOCK, 2, axis=1), ValueError, r"v: .* got \[2, 2, 2, 4\]"),
        (BLOCK, BLOCK[0], ValueError, r"v: expected shape .* got \[1, 2, 4\]"),
        (BLOCK.astype(float), BLOCK, TypeError, "k: expected the dtype of the cache, float32, got"),
        (BLOCK, array_api_strict.asarray(BLOCK), TypeError, "v: .* same library as cache"),
        (BLOCK.tolist(), BLOCK, TypeError, "k: expected an array"),
    ],
)
def test_append_refuses(k, v, error, message):
    cache = KVCache.create(GQA, 2, 4).extend(1)
    before = contents(cache)
    with pytest.raises(error, match=message):
        cache.append(0, k, v)
    assert contents(cache) == before


@pytest.mark.parametrize("count", [1, 3])
def test_append_refuses_other_tokens_than_room_was_made_for(backend, count):
    like = backend.array(np.zeros(0, np.float32))
    tokens = backend.array(np.ones((2, 2, 2, 4), np.float32))
    cache = KVCache.create(GQA, 2, 9, like=like).extend(2).append(0, tokens, tokens)
    cache = cache.extend(2).append(0, 2 * tokens, tokens).append(0, 3 * tokens, tokens)  # retried
    before = contents(cache)
    other = backend.array(np.ones((2, count, 2, 4), np.float32))
    message = rf"k: expected shape \[2, 2, 2, 4\], .* extended by, got \[2, {count}, 2, 4\]"
    with pytest.raises(ValueError, match=message):
        cache.append(0, other, other)
    assert contents(cache) == before


def test_append_refuses_tokens_after_a_pass_without_more_room():
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    cache = forward(model, np.ones((2, 1), int), cache=KVCache.create(model, 2, 4)).cache
    before = contents(cache)
    with pytest.raises(ValueError, match=r"k: expected shape \[2, 0, 2, 4\], .* got \[2, 1, 2, 4"):
        cache.append(0, BLOCK, BLOCK)
    assert contents(cache) == before
    cache.extend(1).append(0, BLOCK, BLOCK)


@pytest.mark.parametrize("layer", [-1, 2, True, 0.0])
def test_append_refuses_a_layer(layer):
    cache = KVCache.create(GQA, 2, 4).extend(1)
    before = contents(cache)
    with pytest.raises(ValueError, match=f"layer: expected an integer from 0 to 1, got {layer!r}"):
        cache.append(layer, BLOCK + 1, BLOCK + 1)
    assert contents(cache) == before


@pytest.mark.parametrize("count", [-1, True, 1.0, "1", None])
def test_extend_refuses_a_count(count):
    cache = KVCache.create(GQA, 2, 4).extend(2)
    with pytest.raises(ValueError, match=f"count: expected an integer from 0 on, got {count!r}"):
        cache.extend(count)


KEEP = np.ones((2, 1), bool)


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (KEEP.astype(int), TypeError, "keep: expected bool, got int64"),
        (KEEP[:1], ValueError, r"keep: expected shape \[2, 1\], got \[1, 1\]"),
        (KEEP[:, 0], ValueError, r"keep: expected shape \[2, 1\], got \[2\]"),
        (np.ones((2, 2), bool), ValueError, r"keep: expected shape \[2, 1\], got \[2, 2\]"),
        (KEEP.tolist(), TypeError, "keep: expected an array"),
        (array_api_strict.asarray(KEEP), TypeError, "keep: .* same library as cache"),
    ],
)
def test_extend_refuses_what_to_keep(keep, error, message):
    cache = KVCache.create(GQA, 2, 4).extend(2, np.ones((2, 2), bool))
    before = contents(cache)
    with pytest.raises(error, match=message):
        cache.extend(1, keep)
    assert contents(cache) == before


@pytest.mark.parametrize(
    ("config", "batch", "message"),
    [
        (replace(GQA, num_hidden_layers=1), 2, "cache: expected 2 layers, got 1"),
        (replace(GQA, num_hidden_layers=3), 2, "cache: expected 2 layers, got 3"),
        (GQA, 3, r"cache: expected keys of shape \[2, 4, 2, 4\], got \[3, 4, 2, 4\]"),
        (replace(GQA, head_dim=2), 2, r"cache: expected keys of shape .*, got \[2, 4, 2, 2\]"),
        (CONFIGS["mqa"], 2, "cache: expected 2 layers, got 3"),
    ],
)
def test_cache_of_another_model_or_batch(config, batch, message):
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    with pytest.raises(ValueError, match=message):
        forward(model, np.ones((2, 2), int), cache=KVCache.create(config, batch, 4))


def test_cache_of_another_dtype_or_library():
    model = model_of(GQA, random_weights(GQA))
    ids = np.ones((2, 2), int)
    with pytest.raises(TypeError, match=r"cache: expected the dtype of .*, float64, got float32"):
        forward(model, ids, cache=KVCache.create(GQA, 2, 4))
    like = array_api_strict.zeros(0)
    with pytest.raises(TypeError, match="cache: expected an array of the same library"):
        forward(model, ids, cache=KVCache.create(GQA, 2, 4, like=like))


def test_a_copy_goes_its_own_way():
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    prefix = forward(model, np.array([[1, 2, 3]]), cache=KVCache.create(model, 1, 8)).cache
    other = prefix.copy()
    first = forward(model, np.array([[4]]), cache=prefix).cache
    forward(model, np.array([[5]]), cache=other)
    logits = forward(model, np.array([[6]]), cache=first).logits
    whole = forward(model, np.array([[1, 2, 3, 4, 6]])).logits[:, -1:]
    np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-5)
