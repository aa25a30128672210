"""Bugs of NumPy's own attention: tiles, the keys that they leave out, and their scores."""

from __future__ import annotations

import numpy as np

from tests.planted.bugs.attention import regrouped
from tests.planted.planting import wrong

ATTEND = "llama_layers.backends.numpy.attention:attend"
SPAN = "llama_layers.backends.numpy.attention:_span"
ROWS = "llama_layers.backends.numpy.attention:mask_rows"
TILE = "llama_layers.backends.numpy.attention:_tile"
LIKE_ROWS = "test_attention_tiles.py::test_tiles_like_one_row_at_a_time"


@wrong(SPAN, LIKE_ROWS)
def the_last_visible_key_of_a_block_cut_off(right, where):
    span = right(where)
    return slice(span.start, max(span.start, span.stop - 1))


@wrong(SPAN, LIKE_ROWS)
def keys_cut_to_those_that_the_first_query_of_a_block_sees(right, where):
    return right(where[:, :1] if where.ndim == 3 else where)


@wrong(ROWS, LIKE_ROWS)
def the_padding_of_the_first_sequence_for_all(right, xp, mask, start, stop):
    rows = right(xp, mask, start, stop)
    return rows if rows is None else rows[:1]


@wrong(ROWS, LIKE_ROWS)
def the_rows_of_the_first_block_for_every_block(right, xp, mask, start, stop):
    return right(xp, mask, 0, stop - start)


@wrong("llama_layers.backends.numpy.attention:_parts", LIKE_ROWS)
def heads_beyond_the_first_of_a_tile_left_out(right, count, size):
    return right(count, size)[:1]


@wrong(ATTEND, LIKE_ROWS)
def heads_of_a_group_scattered_into_the_result_of_another(right, xp, q, k, v, mask, scale):
    return regrouped(np, right(xp, q, k, v, mask, scale), k.shape[2])


@wrong(TILE, LIKE_ROWS)
def queries_that_see_nothing_see_every_key(right, q, kt, v, hidden, scale):
    if hidden is not None:
        hidden = hidden & ~hidden.all(axis=-1, keepdims=True)
    return right(q, kt, v, hidden, scale)


@wrong(TILE, "test_attention.py::test_scores_that_overflow")
def scaled_before_the_product_which_then_does_not_overflow(right, q, kt, v, hidden, scale):
    return right(q * np.asarray(scale, q.dtype), kt, v, hidden, 1.0)


def tile(q, kt, v, hidden, scale, *, hide=-np.inf, largest=np.max, form=None):
    """A tile of attention: what hides a key, what is the largest score, and the scores' format."""
    scores = np.swapaxes(q, -1, -2)  # [..., group, D, rows]
    scores = np.swapaxes(np.swapaxes(kt, -1, -2)[..., None, :, :] @ scores, -1, -2) * scale
    scores = scores.astype(form or scores.dtype).astype(scores.dtype)
    if hidden is not None:
        scores = np.where(hidden, hide, scores)
    weights = np.exp(scores - largest(scores, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v[..., None, :, :]


@wrong(TILE, "test_attention.py::test_a_hidden_key_weighs_nothing_at_any_score")
def hidden_scores_of_a_tile_lowered_and_not_removed(right, q, kt, v, hidden, scale):
    return tile(q, kt, v, hidden, scale, hide=-1e4)


@wrong(TILE, "test_attention.py::test_rows_of_very_different_scores")
def one_maximum_for_all_rows_of_a_tile(right, q, kt, v, hidden, scale):
    with np.errstate(invalid="ignore"):
        return tile(q, kt, v, hidden, scale, largest=lambda scores, **_: np.max(scores))


@wrong(TILE, "test_attention_tiles.py::test_tiles_are_within_the_bound[float32]")
def scores_of_a_tile_in_16_bits(right, q, kt, v, hidden, scale):
    return tile(q, kt, v, hidden, scale, form=np.float16)
