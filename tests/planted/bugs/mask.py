"""Bugs of the mask: causality, sliding windows, padding and slots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.planted.planting import wrong

ROWS = "llama_layers.layers.mask:Mask.rows"
LOOPS = "test_mask.py::test_like_loops[numpy]"
PADDING = "test_forward.py::test_padding_reaches_no_token"


def rows_by(rule, mask, start, stop):
    """The rows of a mask by a rule of query slot, key slot and window, which may be endless."""
    queries, keys = np.int64(mask.queries[start:stop, None]), np.int64(mask.keys[None])
    allowed = rule(queries, keys, min(mask.window or 2**60, 2**60))[None]
    return allowed if mask.keep is None else allowed & mask.keep[:, None]


@wrong(ROWS, LOOPS, "no causal mask")
def no_causal_mask(right, mask, start, stop):
    return rows_by(lambda q, k, window: (k >= 0) & (k > q - window), mask, start, stop)


@wrong(ROWS, LOOPS, "a token does not see itself")
def a_token_does_not_see_itself(right, mask, start, stop):
    return rows_by(lambda q, k, window: (k >= 0) & (k < q) & (k > q - window), mask, start, stop)


@wrong(ROWS, "test_forward.py::test_causal", "a token sees the next")
def a_token_sees_the_next(right, mask, start, stop):
    return rows_by(
        lambda q, k, window: (k >= 0) & (k <= q + 1) & (k > q - window), mask, start, stop
    )


@wrong(ROWS, LOOPS, "another window")
def window_one_too_long(right, mask, start, stop):
    return rows_by(lambda q, k, window: (k >= 0) & (k <= q) & (k >= q - window), mask, start, stop)


@wrong(ROWS, LOOPS, "another window")
def window_one_too_short(right, mask, start, stop):
    return rows_by(
        lambda q, k, window: (k >= 0) & (k <= q) & (k > q + 1 - window), mask, start, stop
    )


@wrong(ROWS, LOOPS)
def places_that_hold_no_token_yet_are_seen(right, mask, start, stop):
    return rows_by(lambda q, k, window: (k <= q) & (k > q - window), mask, start, stop)


@wrong(ROWS, "test_layer.py::test_like_naive_loops", "another window")
def window_ignored(right, mask, start, stop):
    return right(replace(mask, window=None), start, stop)


@wrong(ROWS, "test_forward.py::test_garbage_under_padding_changes_no_token", "padding seen")
def padding_ignored(right, mask, start, stop):
    return right(replace(mask, keep=None), start, stop)


@wrong(
    ROWS,
    "test_attention.py::test_blocks_of_queries",
    "mask of the first chunk for each",
)
def mask_of_the_first_block_for_every_block(right, mask, start, stop):
    return right(mask, 0, stop - start)


@wrong(ROWS, PADDING, "padding seen")
def padding_hides_queries_instead_of_keys(right, mask, start, stop):
    rows = right(replace(mask, keep=None), start, stop)
    return rows if mask.keep is None else rows & mask.keep[:, start:stop, None]


@wrong(
    ROWS,
    "test_forward.py::test_like_naive_loops",
    "mask of the first chunk for each",
)
def queries_of_a_chunk_at_the_slots_of_the_first(right, mask, start, stop):
    return right(replace(mask, queries=mask.queries - mask.queries[:1]), start, stop)


@wrong(ROWS, "test_forward.py::test_like_naive_loops", "a token sees the next")
def queries_of_a_later_chunk_one_slot_late(right, mask, start, stop):
    return right(replace(mask, queries=mask.queries + (mask.queries[:1] > 0)), start, stop)


@wrong(
    "llama_layers.config.llama_config:LlamaConfig.window_of",
    "test_forward.py::test_like_naive_loops",
    "another window",
)
def one_window_for_all_layers(right, config, layer):
    return right(config, 0)
