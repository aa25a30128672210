"""Heads, scales and masks of attention."""

from __future__ import annotations

import numpy as np

from tests.zoo.models import DECODED, Setting
from tests.zoo.registry import dumped, edit, step

PADDED, WINDOW = Setting(padding=5), Setting("window")


@step("split", "0.q_rope")
def heads_by_view(port, right, x, site):
    if site.endswith("v_proj"):
        return right(x, site)
    return x.reshape(x.shape[0], -1, x.shape[1], port.width).swapaxes(1, 2)


@dumped("0.q_rope", Setting(count=4), "only what is written is wrong")
def recorded_heads_first(arrays):
    for name in arrays:
        if name.endswith("q_rope"):
            arrays[name] = np.ascontiguousarray(arrays[name].swapaxes(1, 2))


@step("weigh", "0.attention")
def value_heads_rolled(port, right, p, v, layer):
    return right(p, np.roll(v, 1, 2), layer)


@edit("0.attention")
def key_heads_tiled(port):
    port.spread = lambda x: np.tile(x, (1, 1, port.heads // port.kv, 1))


@edit("0.attention")
def first_key_head_only(port):
    port.spread = lambda x: np.repeat(x[:, :, :1], port.heads, 2)


@edit("0.attention")
def last_query_head_group(port):
    port.spread = lambda x: x[:, :, [0, 0, 1, 0]]


@step("softmax", "0.attention")
def scores_over_heads(port, right, scores, seen):
    masked = np.where(seen, scores, -1e9)
    powers = np.exp(masked - masked.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True) * seen


@step("softmax", "0.attention")
def scores_over_queries(port, right, scores, seen):
    masked = np.where(seen, scores, -1e9)
    powers = np.exp(masked - masked.max(2, keepdims=True))
    return powers / powers.sum(2, keepdims=True) * seen


@edit("0.attention")
def scale_missing(port):
    port.scale = 1.0


@edit("0.attention")
def scale_of_hidden_size(port):
    port.scale = 1 / 8


@edit("0.attention")
def scale_of_padded_head(port):
    port.scale = 32**-0.5


@edit("0.attention")
def scale_without_root(port):
    port.scale = 1 / port.width


@step("rotate", "0.q_rope")
def scale_twice(port, right, x, at, site):
    return right(x * port.work(0.25 if site.endswith("q_rope") else 1), at, site)


@edit("0.attention", Setting("wide_heads"))
def scale_of_config_heads(port):
    port.scale = (64 / 4) ** -0.5


@step("scores", "0.attention")
def soft_cap(port, right, q, k, layer):
    return 2 * np.tanh(right(q, k, layer) / 2)


@step("scores", "0.attention")
def linear_bias(port, right, q, k, layer):
    scores = right(q, k, layer)
    far = np.arange(scores.shape[-1]) - np.arange(scores.shape[-2])[:, None]
    slopes = 2.0 ** (-2 * np.arange(1, 5))
    return scores + (slopes[:, None, None] * far).astype(scores.dtype)


@step("mask", "0.attention")
def mask_missing(port, right, count, past, layer):
    return np.ones_like(right(count, past, layer))


@step("mask", "0.attention")
def mask_without_diagonal(port, right, count, past, layer):
    seen = right(count, past, layer) & ~np.eye(count, dtype=bool)
    seen[..., 0, 0] = True
    return seen


@step("mask", "0.attention")
def mask_one_late(port, right, count, past, layer):
    return right(count, past, layer) | np.eye(count, k=1, dtype=bool)


@step("mask", "0.attention")
def mask_transposed(port, right, count, past, layer):
    return right(count, past, layer).swapaxes(-1, -2)


@step("softmax", "0.attention")
def mask_too_small(port, right, scores, seen):
    return right(np.where(seen, scores, scores - 4), np.ones_like(seen))


@step("mask", "0.attention", Setting(chunks=DECODED))
def mask_top_left(port, right, count, past, layer):
    keys, queries = np.arange(past + count), np.arange(count)
    return (keys <= queries[:, None])[None, None]


@step("mask", "0.attention")
def mask_of_prefix(port, right, count, past, layer):
    first = np.arange(count) < 6
    return right(count, past, layer) | (first & first[:, None])


@step("mask", "0.attention", PADDED)
def mask_of_padding_missing(port, right, count, past, layer):
    return np.tri(count, dtype=bool)[None, None]


@step("mask", "0.attention", PADDED)
def mask_of_padding_on_right(port, right, count, past, layer):
    return np.tri(count, dtype=bool)[None, None] & port.keep[:, None, None, ::-1]


@step("window", "0.attention", WINDOW)
def window_one_wide(port, right, layer):
    found = right(layer)
    return found and found + 1


@step("window", "0.attention", WINDOW)
def window_ignored(port, right, layer):
    return None


@step("window", "1.attention", WINDOW)
def window_in_every_layer(port, right, layer):
    return port.config.sliding_window


@step("weigh", "0.attention")
def rows_of_batch_mixed(port, right, p, v, layer):
    return right(p, v[[0, 0]], layer)


@step("attention", "0.attention")
def sequences_see_each_other(port, right, q, k, v, layer, past):
    (b, s), flat = q.shape[:2], lambda x: x.reshape(1, -1, *x.shape[2:])
    p = port.softmax(port.scores(flat(q), flat(k), layer), np.tri(b * s, dtype=bool))
    return port.weigh(p, flat(v), layer).reshape(q.shape)


@step("weigh", "0.attention")
def heads_not_transposed_back(port, right, p, v, layer):
    found = right(p, v, layer)
    return found.swapaxes(1, 2).reshape(found.shape)


@step("weigh", "0.attention")
def channels_before_heads(port, right, p, v, layer):
    found = right(p, v, layer)
    return found.swapaxes(2, 3).reshape(found.shape)


@step("mask", "0.attention")
def first_token_ignored(port, right, count, past, layer):
    seen = right(count, past, layer)
    seen[..., 1:, 0] = False
    return seen


@step("weigh", "0.attention")
def values_unweighted_tile(port, right, p, v, layer):
    found = right(p, v, layer)
    found[:, 12:16] = port.spread(v.mean(1, keepdims=True))
    return found


@step("attention", "0.attention")
def output_gated(port, right, q, k, v, layer, past):
    return right(q, k, v, layer, past) / (1 + np.exp(-q))
