"""Bugs of attention: scores, softmax, heads and blocks of queries."""

from __future__ import annotations

import math

from llama_layers.layers import attention
from tests.planted.planting import NOT_NAMED, wrong

ATTENTION = "llama_layers.layers.attention:attention"
ATTEND = "llama_layers.layers.attention:attend"
SOFTMAX = "llama_layers.layers.attention:shifted_exp"
LOOPS = "test_attention.py::test_like_loops"
BLOCKS = "test_attention.py::test_blocks_of_queries"
FAR_BELOW = "test_attention.py::test_scores_far_below_zero"
ANOTHER_SCALE = "another scale of scores"


@wrong(ATTEND, LOOPS, ANOTHER_SCALE)
def scores_not_scaled(right, xp, q, k, v, mask, scale):
    return right(xp, q, k, v, mask, 1.0)


@wrong(ATTEND, LOOPS, ANOTHER_SCALE)
def scores_scaled_twice(right, xp, q, k, v, mask, scale):
    return right(xp, q, k, v, mask, scale**2)


@wrong(
    ATTENTION,
    "test_attention.py::test_default_scale_is_one_over_the_root_of_head_dim",
    ANOTHER_SCALE,
)
def scaled_by_the_width_of_a_head_and_not_its_root(right, q, k, v, **options):
    return right(q, k, v, **options | {"scale": 1 / q.shape[3]})


@wrong(ATTENTION, "test_layer.py::test_like_naive_loops", ANOTHER_SCALE)
def scaled_by_the_number_of_heads(right, q, k, v, **options):
    return right(q, k, v, **options | {"scale": 1 / math.sqrt(q.shape[2])})


@wrong(ATTENTION, LOOPS)
def a_given_scale_ignored(right, q, k, v, **options):
    return right(q, k, v, **options | {"scale": None})


@wrong(ATTENTION, "test_sinks.py::test_like_naive_loops")
def sinks_left_out(right, q, k, v, **options):
    return right(q, k, v, **options | {"sinks": None})


@wrong("llama_layers.layers.attention:check_finite", "test_attention.py::test_refuses_a_scale")
def a_scale_that_is_not_a_finite_number(right, name, value, **options):
    return float(value)


@wrong(SOFTMAX, FAR_BELOW)
def softmax_of_masked_scores_without_the_shift(right, xp, scores, allowed):
    if allowed is None:
        return right(xp, scores, allowed)
    return xp.exp(xp.where(allowed, scores, -math.inf))


@wrong(SOFTMAX, FAR_BELOW)
def softmax_without_the_shift_where_nothing_is_masked(right, xp, scores, allowed):
    return xp.exp(scores) if allowed is None else right(xp, scores, allowed)


@wrong(SOFTMAX, "test_attention.py::test_rows_of_very_different_scores")
def one_maximum_for_all_rows(right, xp, scores, allowed):
    return xp.exp(scores - xp.max(scores)) if allowed is None else right(xp, scores, allowed)


@wrong(SOFTMAX, "test_attention.py::test_huge_scores")
def one_maximum_for_all_masked_rows(right, xp, scores, allowed):
    if allowed is None:
        return right(xp, scores, allowed)
    scores = xp.where(allowed, scores, -math.inf)
    largest = xp.max(scores, axis=(-1, -2), keepdims=True)
    return xp.exp(scores - xp.where(largest == -math.inf, xp.zeros_like(largest), largest))


@wrong(
    SOFTMAX,
    "test_attention.py::test_zero_queries_give_the_running_mean",
    "softmax over queries and keys",
)
def softmax_over_the_queries(right, xp, scores, allowed):
    weights = right(xp, scores, allowed)
    return weights / xp.sum(weights, axis=-2, keepdims=True)


@wrong(ATTEND, "test_attention.py::test_constant_values", "softmax not normalised")
def softmax_not_normalised(right, xp, q, k, v, mask, scale):
    return right(xp, q, k, v, mask, scale) * totals(xp, q, k, mask, scale)


def totals(xp, q, k, mask, scale):
    """The sums of the shifted_exp of each query and head, [B, S, num_heads, 1]."""
    k = xp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    q, k = (xp.permute_dims(array, (0, 2, 1, 3)) for array in (q, k))
    scores = q @ xp.permute_dims(k, (0, 1, 3, 2)) * scale
    if mask is not None:
        mask = mask if hasattr(mask, "ndim") else mask.rows(0, q.shape[2])
        mask = xp.reshape(mask, (-1, 1, *mask.shape[-2:]))
    weights = attention.shifted_exp(xp, scores, mask)
    return xp.permute_dims(xp.sum(weights, axis=-1, keepdims=True), (0, 2, 1, 3))


@wrong(SOFTMAX, "test_attention.py::test_a_hidden_key_weighs_nothing_at_any_score")
def hidden_keys_at_minus_10000(right, xp, scores, allowed):
    return right(xp, hidden_at(xp, scores, allowed, -1e4), None)


@wrong(SOFTMAX, "test_attention.py::test_causal", "hidden keys at 0")
def hidden_keys_at_0(right, xp, scores, allowed):
    return right(xp, hidden_at(xp, scores, allowed, 0.0), None)


@wrong(SOFTMAX, "test_attention.py::test_empty_rows_give_exact_zeros[definition-numpy]")
def empty_rows_average_everything(right, xp, scores, allowed):
    return right(xp, hidden_at(xp, scores, allowed, -1e38), None)


def hidden_at(xp, scores, allowed, value):
    return scores if allowed is None else xp.where(allowed, scores, value)


@wrong(SOFTMAX, LOOPS, "mask inverted")
def the_mask_the_other_way_round(right, xp, scores, allowed):
    return right(xp, scores, None if allowed is None else ~allowed)


@wrong(ATTEND, BLOCKS)
def masks_in_the_rows_of_the_first_block(right, xp, q, k, v, mask, scale):
    if mask is None or not hasattr(mask, "ndim"):
        return right(xp, q, k, v, mask, scale)
    step = block_of(q, k)
    return right(xp, q, k, v, mask[..., [i % step for i in range(q.shape[1])], :], scale)


@wrong(ATTEND, f"{BLOCKS}[definition-none-48]", NOT_NAMED)
def blocks_in_reverse_order(right, xp, q, k, v, mask, scale):
    y, step = right(xp, q, k, v, mask, scale), block_of(q, k)
    blocks = [y[:, start : start + step] for start in range(0, y.shape[1], step)]
    return xp.concat(blocks[::-1], axis=1) if blocks else y


def block_of(q, k):
    """How many queries the definition takes at a time."""
    return max(1, attention.SCORES // max(1, q.shape[0] * q.shape[2] * k.shape[1]))


def regrouped(xp, x, kv_heads):
    """Heads [B, S, kv_heads * group, D] in the order of group after group."""
    batch, seq, heads, width = x.shape
    parts = xp.reshape(x, (batch, seq, kv_heads, heads // kv_heads, width))
    return xp.reshape(xp.permute_dims(parts, (0, 1, 3, 2, 4)), x.shape)


@wrong(ATTEND, "test_attention.py::test_grouped_is_repeated", "key heads tiled")
def key_heads_tiled_instead_of_repeated(right, xp, q, k, v, mask, scale):
    kv_heads = k.shape[2]
    y = right(xp, regrouped(xp, q, q.shape[2] // kv_heads), k, v, mask, scale)
    return regrouped(xp, y, kv_heads)


@wrong(ATTEND, LOOPS, "heads mixed up")
def heads_of_a_group_in_reverse_order(right, xp, q, k, v, mask, scale):
    y = right(xp, q, k, v, mask, scale)
    batch, seq, heads, width = y.shape
    groups = xp.reshape(y, (batch, seq, k.shape[2], heads // k.shape[2], width))
    return xp.reshape(xp.flip(groups, axis=3), y.shape)


@wrong(ATTEND, LOOPS, "heads before tokens")
def heads_and_queries_mixed(right, xp, q, k, v, mask, scale):
    y = right(xp, q, k, v, mask, scale)
    return xp.reshape(xp.permute_dims(y, (0, 2, 1, 3)), y.shape)


@wrong(ATTEND, LOOPS, "keys for values")
def keys_for_values(right, xp, q, k, v, mask, scale):
    return right(xp, q, k, k, mask, scale)


@wrong(
    "llama_layers.layers.attention:accumulate_format",
    "test_attention.py::test_narrow_formats_are_computed_in_float32_and_rounded_once",
)
def sums_of_attention_in_16_bits(right, form):
    return form
