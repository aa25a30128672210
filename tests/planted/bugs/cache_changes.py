"""Bugs of caches that are cut, reordered, repeated or made longer."""

from __future__ import annotations

import numpy as np

from llama_layers.layers.cache_buffers import lengthened
from llama_layers.layers.cache_state import changed
from tests.planted.planting import wrong

CACHE = "llama_layers.layers.cache:KVCache"
CHANGES = "test_cache_changes.py::test_any_changes_in_any_order[numpy]"


@wrong(f"{CACHE}.truncate", CHANGES)
def counts_of_a_longer_cache_after_it_was_cut(right, cache, length):
    return changed(right(cache, length), counts=cache.counts)


@wrong(f"{CACHE}.truncate", CHANGES)
def a_ring_cut_by_one_token_too_many(right, cache, length):
    if cache.window is None:
        return right(cache, length)
    cut = right(changed(cache, window=cache.window - 1), length)
    return changed(cut, window=cache.window)


@wrong(f"{CACHE}.truncate", CHANGES)
def a_ring_cut_twice_forgets_what_it_has_lost(right, cache, length):
    return right(changed(cache, first=max(0, cache.length - cache.capacity)), length)


@wrong(
    f"{CACHE}.truncate",
    "test_cache_changes.py::test_a_ring_that_was_cut_remembers_what_it_has_lost",
)
def an_emptied_ring_remembers_what_it_had_lost(right, cache, length):
    return changed(right(cache, length), first=cache.first)


@wrong(f"{CACHE}.take", CHANGES)
def taken_sequences_without_their_padding(right, cache, rows):
    return changed(right(cache, rows), keep=None, counts=None)


@wrong(f"{CACHE}.take", CHANGES)
def taken_sequences_with_the_counts_of_others(right, cache, rows):
    taken = right(cache, rows)
    counts = None if taken.counts is None else np.resize(cache.counts, taken.counts.shape)
    return changed(taken, counts=counts)


@wrong(f"{CACHE}.take", CHANGES)
def all_sequences_in_order_are_not_copied(right, cache, rows):
    same = [int(row) for row in rows] == list(range(cache.keys[0].shape[0]))
    return changed(cache) if same else right(cache, rows)


@wrong(f"{CACHE}.repeat", CHANGES)
def sequences_tiled_and_not_repeated(right, cache, n):
    return cache.take([*range(cache.keys[0].shape[0])] * n)


@wrong(f"{CACHE}.grow", CHANGES)
def a_ring_that_grows_is_made_longer_too(right, cache, max_len):
    longer, more = right(cache, max_len), max_len - cache.max_len
    if cache.capacity == cache.max_len or not more:
        return longer
    arrays = {n: tuple(lengthened(a, more) for a in getattr(cache, n)) for n in ("keys", "values")}
    keep = None if cache.keep is None else lengthened(cache.keep, more)
    return changed(longer, keep=keep, **arrays)


@wrong(f"{CACHE}.grow", CHANGES)
def a_cache_that_grows_forgets_its_padding(right, cache, max_len):
    return changed(right(cache, max_len), keep=None, counts=None)
