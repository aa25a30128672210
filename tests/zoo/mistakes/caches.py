"""Keys and values that are kept between calls."""

from __future__ import annotations

import numpy as np

from tests.zoo.models import DECODED, Setting
from tests.zoo.numbers import by_rows, fp8
from tests.zoo.registry import edit, step

DECODE, CHUNKS = Setting(chunks=DECODED), Setting(chunks=(10, 10, 4))


@step("store", "0.attention", DECODE)
def slot_not_written(port, right, k, v, layer, past):
    if k.shape[1] > 1:
        right(k, v, layer, past)
    else:  # one step late
        port.late = getattr(port, "late", {})
        if layer in port.late:
            right(*port.late[layer], layer, past - 1)
        port.late[layer] = k, v


@step("read", "0.attention", DECODE)
def slot_overwritten(port, right, layer, end):
    k, v = (x.copy() for x in right(layer, end))
    if end > 20:
        for x in (k, v):
            x[:, : end - 20] = x[:, 20:end]
    return k, v


@step("attention", "0.attention", DECODE)
def slot_beyond_end(port, right, q, k, v, layer, past):
    if q.shape[1] > 1:
        return right(q, k, v, layer, past)
    k, v = (np.concatenate([x, np.zeros_like(x[:, :1])], 1) for x in (k, v))
    seen = np.ones((1, 1, 1, k.shape[1]), bool)
    return port.weigh(port.softmax(port.scores(q, k, layer), seen), v, layer)


@step("read", "0.attention", DECODE)
def block_read_twice(port, right, layer, end):
    k, v = (x.copy() for x in right(layer, end))
    if end > 16:
        for x in (k, v):
            x[:, 8:16] = x[:, :8]
    return k, v


@step("read", "0.attention", DECODE)
def blocks_of_first_row(port, right, layer, end):
    k, v = right(layer, end)
    return (k, v) if end <= 16 else (k[[0, 0]], v[[0, 0]])


@step("mask", "0.attention", CHUNKS)
def chunk_blind_to_past(port, right, count, past, layer):
    seen = right(count, past, layer)
    seen[..., :past] = False
    return seen


@step("read", "0.attention", DECODE)
def cached_keys_rotated_again(port, right, layer, end):
    k, v = (x.copy() for x in right(layer, end))
    if end > 16:
        k[:, : end - 1] = port.rotate(k[:, : end - 1], port.positions(0, end - 1), "k_rope")
    return k, v


@step("read", "1.attention", DECODE)
def cache_of_first_layer(port, right, layer, end):
    return right(0 if end > 16 else layer, end)


@step("store", "0.attention")
def cache_before_rope(port, right, k, v, layer, past):
    name = f"model.layers.{layer}.self_attn.k_proj"
    right(port.recorded[name][-1].reshape(k.shape), v, layer, past)


@step("store", "0.attention")
def cache_int8(port, right, k, v, layer, past):
    right(by_rows(k, 127), by_rows(v, 127), layer, past)


@step("store", "0.attention")
def cache_fp8(port, right, k, v, layer, past):
    right(fp8(k), fp8(v), layer, past)


@step("store", "0.attention")
def cache_scale_lost(port, right, k, v, layer, past):
    right(fp8(k), fp8(v) / np.float32(1.25), layer, past)


@step("read", "0.attention", CHUNKS)
def cache_of_other_prompt(port, right, layer, end):
    k, v = (x.copy() for x in right(layer, end))
    if end > 10:
        rng = np.random.default_rng(6)
        k[:, :4] = rng.standard_normal(k[:, :4].shape)
        v[:, :4] = rng.standard_normal(v[:, :4].shape)
    return k, v


@step("read", "0.attention", DECODE)
def cache_shifted_after_eviction(port, right, layer, end):
    k, v = right(layer, end)
    if end <= 16:
        return k, v
    k = np.concatenate([k[:, 4:], k[:, -4:]], 1)
    return k, v


@edit("0.attention", DECODE)
def cache_values_of_keys(port):
    right = port.read
    port.read = lambda layer, end: right(layer, end)[:1] * 2 if end > 16 else right(layer, end)
