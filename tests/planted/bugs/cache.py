"""Bugs of the cache: where tokens are written, rings, and what padding does to them."""

from __future__ import annotations

import numpy as np

from llama_layers.layers.cache_state import changed
from tests.planted.planting import NOT_NAMED, wrong

WRITE = "llama_layers.layers.cache:write_tokens"
CACHE = "llama_layers.layers.cache:KVCache"
STATE = "llama_layers.layers.cache_state:CacheState"
FORWARD = "llama_layers.model.forward:forward"
IN_PLACE = "test_cache.py::test_append_keeps_every_token_in_its_place[numpy]"
OVERFLOW = "test_cache.py::test_overflow_raises_before_anything_is_written[numpy-2]"
RING = "test_cache.py::test_ring_holds_the_latest_tokens[numpy]"
FULL = "test_cache.py::test_ring_is_the_full_cache"
PADDING = "test_forward.py::test_padding_reaches_no_token"
COUNTED = "padding counted in positions"


def of_heads(block):
    """Whether a block to be written is of keys or values, and not of padding."""
    return block.ndim == 4


@wrong(WRITE, IN_PLACE, "cache written from its start")
def new_tokens_written_over_the_first(right, xp, buffer, first, block):
    return right(xp, buffer, 0 if of_heads(block) else first, block)


@wrong(WRITE, IN_PLACE, "cache written one place late")
def new_tokens_written_one_place_late(right, xp, buffer, first, block):
    return right(xp, buffer, first + 1 if of_heads(block) else first, block)


@wrong(WRITE, FULL)
def tokens_beyond_the_end_of_a_ring_are_lost(right, xp, buffer, first, block):
    return right(xp, buffer, first, block[:, : buffer.shape[1] - first % buffer.shape[1]])


@wrong(WRITE, RING, "other tokens seen")
def padding_of_a_ring_by_its_first_round(right, xp, buffer, first, block):
    return right(xp, buffer, first, block) if of_heads(block) or first < 5 else buffer


@wrong(f"{CACHE}.append", IN_PLACE, "keys for values")
def keys_written_where_values_belong(right, cache, layer, k, v):
    return right(cache, layer, k, k)


@wrong(f"{CACHE}.append", IN_PLACE, "cache shared by all layers")
def every_layer_in_the_memory_of_one(right, cache, layer, k, v):
    cache, count = right(cache, layer, k, v), len(cache.keys)
    return changed(cache, keys=(cache.keys[layer],) * count, values=(cache.values[layer],) * count)


@wrong(f"{CACHE}.append", "test_layer.py::test_refuses_a_cache_without_room_made_for_the_tokens")
def tokens_written_that_no_room_was_made_for(right, cache, layer, k, v):
    return right(changed(cache, room=k.shape[1]), layer, k, v)


@wrong(
    "llama_layers:LayerCache.append",
    "test_forward.py::test_like_naive_loops",
    NOT_NAMED,
)
def the_cache_filled_and_not_read(right, cache, k, v):
    keys, values = right(cache, k, v)
    return keys if k.shape[1] > 1 else 0 * keys, values


@wrong(f"{CACHE}.create", "test_cache.py::test_starts_as_zeros[numpy]")
def memory_that_is_not_zeroed(right, cls, *arguments, **options):
    cache = right(cls, *arguments, **options)
    for array in (*cache.keys, *cache.values):
        array += 1e30
    return cache


@wrong(f"{CACHE}.create", RING)
def a_ring_one_place_too_small(right, cls, *arguments, rolling=None, **options):
    return right(cls, *arguments, rolling=rolling and max(1, rolling - 1), **options)


@wrong(f"{STATE}.most_at_once", RING)
def a_ring_takes_one_token_too_many_at_a_time(right, cache):
    return right(cache) + (cache.window is not None and cache.capacity < cache.max_len)


@wrong(f"{STATE}.key_slots", FULL)
def slots_of_a_ring_off_by_one(right, cache):
    if cache.window is None:
        return right(cache)
    return right(changed(cache, length=cache.length + 1))[: len(right(cache))]


@wrong(f"{CACHE}.extend", OVERFLOW)
def overflow_unchecked(right, cache, count, keep=None):
    longer = right(changed(cache, max_len=cache.max_len + count), count, keep)
    return changed(longer, max_len=cache.max_len)


@wrong(f"{CACHE}.extend", OVERFLOW)
def overflow_noticed_one_token_late(right, cache, count, keep=None):
    longer = right(changed(cache, max_len=cache.max_len + 1), count, keep)
    return changed(longer, max_len=cache.max_len)


@wrong(f"{CACHE}.extend", PADDING, COUNTED)
def padding_counted_as_tokens(right, cache, count, keep=None):
    longer = right(cache, count, keep)
    if longer.counts is None:
        return longer
    before = cache.length if cache.counts is None else cache.counts
    return changed(longer, counts=0 * longer.counts + before + count)


@wrong(f"{CACHE}.extend", "test_cache.py::test_padding_that_comes_late")
def earlier_tokens_not_counted_where_padding_comes_late(right, cache, count, keep=None):
    longer = right(cache, count, keep)
    if longer.counts is None or cache.counts is not None:
        return longer
    return changed(longer, counts=longer.counts - cache.length)


@wrong(f"{CACHE}.extend", PADDING, COUNTED)
def padding_of_a_pass_with_a_cache_ignored(right, cache, count, keep=None):
    return right(cache, count)


@wrong(f"{STATE}.visible_keep", PADDING, "padding seen")
def padding_forgotten_by_the_next_chunk(right, cache):
    return None


@wrong(f"{CACHE}.copy", "test_cache.py::test_a_copy_goes_its_own_way")
def a_copied_cache_shares_its_memory(right, cache):
    return changed(cache)


@wrong(FORWARD, PADDING, COUNTED)
def padding_counted_in_positions(right, model, input_ids, *, cache=None, positions=None, **options):
    if positions is None:
        positions = np.arange(input_ids.shape[1]) + (0 if cache is None else cache.length)
    return right(model, input_ids, cache=cache, positions=positions, **options)


@wrong(FORWARD, PADDING, COUNTED)
def positions_of_padded_prompts_off_by_one_in_the_cache(
    right, model, input_ids, *, cache=None, positions=None, attention_mask=None, **options
):
    if positions is None and cache is not None and cache.counts is not None:
        valid = np.ones_like(input_ids) if attention_mask is None else attention_mask
        counted = np.cumsum(valid[:, -input_ids.shape[1] :] != 0, axis=1)
        positions = np.maximum(cache.length + counted - 1, 0)
    options |= {"cache": cache, "positions": positions, "attention_mask": attention_mask}
    return right(model, input_ids, **options)


@wrong(FORWARD, "test_cache.py::test_cache_of_another_model_or_batch")
def a_cache_of_more_layers_accepted(right, model, input_ids, *, cache=None, **options):
    if cache is not None:
        layers = model.config.num_hidden_layers
        cache = changed(cache, keys=cache.keys[:layers], values=cache.values[:layers])
    return right(model, input_ids, cache=cache, **options)
