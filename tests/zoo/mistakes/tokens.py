"""Tokens, the embedding, and positions."""

from __future__ import annotations

import numpy as np

from tests.zoo.models import DECODED, Setting
from tests.zoo.numbers import bfloat16, by_rows
from tests.zoo.registry import edit, step

RELATIVE = "RoPE depends on differences of positions, and these are right"
PADDED = Setting(padding=5)


@step("look_up", "embed_tokens")
def ids_shifted(port, right, ids):
    return right(np.roll(ids, -1, 1))


@step("look_up", "embed_tokens")
def bos_added_again(port, right, ids):
    return right(np.concatenate([np.ones_like(ids[:, :1]), ids[:, :-1]], 1))


@step("look_up", "embed_tokens")
def padding_index_zeroed(port, right, ids):
    return right(ids) * (ids != 0)[..., None]


@step("look_up", "embed_tokens")
def embedding_scaled(port, right, ids):
    return port.round(right(ids) * port.config.hidden_size**0.5)


@step("look_up", "embed_tokens")
def vocabulary_shard_unmasked(port, right, ids):
    return port.round(right(ids) + right(0 * ids) * (ids >= 49)[..., None])


@step("look_up", "embed_tokens")
def vocabulary_floor_division(port, right, ids):
    return right(ids) * (ids < 97 // 4 * 4)[..., None]


@step("look_up", "embed_tokens")
def ids_of_first_row(port, right, ids):
    return right(np.broadcast_to(ids[:1], ids.shape))


@step("look_up", "embed_tokens")
def added_tokens_mean_row(port, right, ids):
    mean = port.round(port.w["model.embed_tokens.weight"].mean(0))
    return np.where((ids >= 88)[..., None], mean, right(ids))


@edit("embed_tokens")
def embedding_int8(port):
    name = "model.embed_tokens.weight"
    port.w[name] = port.round(by_rows(port.w[name], 127))


@step("look_up", "embed_tokens")
def one_token_zero(port, right, ids):
    found = right(ids).copy()
    found[1, 11] = 0
    return found


@step("look_up", "embed_tokens")
def ids_sorted(port, right, ids):
    return right(np.unique(ids, return_inverse=True)[1].reshape(ids.shape))


@step("positions", "0.q_rope", unseen=RELATIVE)
def positions_from_one(port, right, first, count):
    return right(first, count) + 1


@step("positions", "0.q_rope", PADDED, unseen=RELATIVE)
def positions_ignore_padding(port, right, first, count):
    return np.tile(np.arange(first, first + count), (2, 1))


@step("positions", "0.q_rope", PADDED)
def positions_of_padded_row(port, right, first, count):
    return np.tile(right(first, count)[1], (2, 1))


@step("positions", "0.q_rope", unseen=RELATIVE)
def positions_flattened(port, right, first, count):
    return np.arange(2 * count).reshape(2, count)


@step("positions", "0.q_rope", Setting(start=1000))
def positions_bfloat16(port, right, first, count):
    return bfloat16(right(first, count))


@step("positions", "0.q_rope", Setting(chunks=(10, 10, 4)))
def positions_restart_each_chunk(port, right, first, count):
    return right(0, count)


@step("positions", "0.q_rope", Setting(chunks=DECODED))
def positions_stuck_in_decode(port, right, first, count):
    return right(min(first, 16), count)


@step("positions", "0.q_rope", Setting(chunks=DECODED))
def positions_skip_before_decode(port, right, first, count):
    return right(first + (first >= 16), count)


@edit("1.q_rope", unseen=RELATIVE)
def positions_advance_per_layer(port):
    right = port.rotate
    port.rotate = lambda x, at, site: right(x, at + int(site.split(".")[2]), site)


@step("positions", "0.q_rope")
def positions_clamped(port, right, first, count):
    return np.minimum(right(first, count), 15)


@step("positions", "0.q_rope")
def positions_reversed(port, right, first, count):
    return right(first, count)[:, ::-1]
