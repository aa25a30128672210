"""Mistakes whose place, order or numbers are read off the port's own array."""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np

from tests.support.mistakes.mistake import (
    ACT,
    ATTENTION,
    DOWN,
    EMBEDDING,
    GATE,
    NORM,
    OUT,
    Q_ROPE,
    RESIDUAL,
    UP,
    K,
    Mistake,
    Q,
    V,
)
from tests.support.ported import COUNT, narrow, normed, softmax

_GROUPS = np.concatenate([np.arange(8 * i, 8 * i + 8) for i in (2, 0, 5, 3, 1, 4)])
POST = "post_attention_layernorm"


def _product(p, role, source, weight=None, x=None):
    x = p[source] if x is None else x
    weight = p.weight(role) if weight is None else weight
    return x.astype(np.float64) @ weight.astype(np.float64).T + p.own_bias


def _changed(change):
    """The right array, with some numbers written over."""

    def wrong(p):
        y = p.right.copy()
        change(p, y)
        return y

    return wrong


def _tile_twice(p, y):
    y[..., 16:32] = y[..., 0:16]


def _head_twice(p, y):
    y[..., 24:32] = y[..., 8:16]


def _bit(p, y):
    (bits,) = struct.unpack("<I", struct.pack("<f", y[1, 6, 20]))
    (y[1, 6, 20],) = struct.unpack("<f", struct.pack("<I", bits ^ 1 << 27))


def _eightfold(p, y):
    y[0, 3, 11] *= -8


def _negative(p, y):
    y[..., 7] = -y[..., 7]


def _row_of_another_layer(p, y):
    y[:, -1] = p.arrays["model.layers.0.mlp.down_proj"][:, -1]


def _tail_without_weight(p, y):
    x, eps = p.read, p.config.rms_norm_eps
    y[..., 24:] = (x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps))[..., 24:]


def _slab_lost(p, y):
    lost = np.random.default_rng(3).random(y.shape) < 0.05
    x, w = p[ACT].astype(np.float64), p.weight(DOWN).astype(np.float64)
    for b, s, n in np.argwhere(lost):
        y[b, s, n] -= sum(x[b, s, i] * w[n, i] for i in range(12, 24))


def _first_row_added(p, y):
    y[p.ids > 48] += p.rows(0)


def _one_head_sees_all(p, y):
    y[:, :, 2] = p.attended(*p.qkv, np.ones((COUNT, COUNT), bool))[:, :, 2]


def _averaged_tile(p, y):
    v = p.heads(V).mean(axis=1, keepdims=True)
    y[:, 4:8] = np.repeat(v, 2, axis=2)


def _gated(p):
    return p.right / (1 + np.exp(-p.qkv[0].astype(np.float64)))


def _heads(weights=None, allowed=None, k=lambda k: k, v=lambda v: v):
    def wrong(p):
        arrays = p.qkv[0], k(p.qkv[1]), v(p.qkv[2])
        return p.attended(*arrays, allowed, weights=weights)

    return wrong


def _of_largest(count):
    def weights(scores):
        least = -np.sort(-scores, axis=-1)[..., count - 1, None]
        return softmax(np.where(scores >= least, scores, -np.inf))

    return weights


def _alike(scores):
    """The same score for each key that is seen; a sink keeps its own."""
    keys = np.arange(scores.shape[-1]) < COUNT
    return softmax(np.where(keys & (scores > -1e9), 0.0, scores))


def _by_bits(scores):
    """Schraudolph's exponentials, in integers."""
    x = np.maximum(scores - scores.max(axis=-1, keepdims=True), -80)
    bits = np.round(x * (2**23 / np.log(2)) + 127 * 2**23 - 486411).astype(np.int32)
    e = np.where(np.isfinite(scores), bits.view(np.float32).astype(np.float64), 0)
    return e / e.sum(axis=-1, keepdims=True)


def _by_squares(scores):
    x = np.where(np.isfinite(scores), scores - scores.max(axis=-1, keepdims=True), -1e9)
    e = np.maximum(1 + x / 256, 0)
    for _ in range(8):
        e = e * e
    return e / e.sum(axis=-1, keepdims=True)


def _newest_of_zeros(p):
    q, k, v = p.qkv
    y = np.zeros(q.shape)
    for s in range(COUNT):
        now = [a[:, : s + 1].copy() for a in (k, v)]
        if s >= 10:  # decoded one by one
            now[0][:, s] = now[1][:, s] = 0
        y[:, s : s + 1] = p.attended(q[:, s : s + 1], *now, p.allowed[s : s + 1, : s + 1])
    return y


def _halves_averaged(p):
    q, k, v = p.qkv
    first, second = (
        p.attended(q, k[:, part], v[:, part], p.allowed[:, part])
        for part in (slice(0, 7), slice(7, COUNT))
    )
    late = (np.arange(COUNT) >= 7)[:, None, None]
    return np.where(late, (first + second) / 2, first)


def _nearest_of_table(p):
    step = np.float32(1 / 32)
    return p.act(np.round(p[GATE] / step) * step) * p[UP]


def _lines_of_table(p):
    grid = np.linspace(-8, 8, 129)
    return np.interp(p[GATE], grid, p.act(grid)) * p[UP]


def _estimated_root(p):
    root = (1 / np.sqrt((p.read**2).mean(-1, keepdims=True) + p.config.rms_norm_eps)) * 4096
    return p.read * (np.floor(root) / 4096) * p.gain()


def _norm_in(dtype):
    def cut(y):
        return narrow(np.asarray(y), dtype)

    def wrong(p):
        x = cut(p.read)
        total = np.zeros_like(x[..., :1])
        for i in range(x.shape[-1]):
            total = cut(total + cut(x[..., i : i + 1] ** 2))
        root = cut(np.sqrt(cut(cut(total / x.shape[-1]) + np.float32(p.config.rms_norm_eps))))
        return cut(cut(x / root) * p.gain())

    return wrong


def _by(divisor):
    return lambda p: p.read / divisor(p.read.astype(np.float64)) * p.gain()


def _bits(weight, stored, read):
    return weight.astype(stored).view(read).astype(np.float64)


def _zero_one_late(w):
    blocks = w.reshape(len(w), -1, 16).astype(np.float64)
    low, high = blocks.min(axis=-1, keepdims=True), blocks.max(axis=-1, keepdims=True)
    scale = (high - low) / 15
    zero = np.round(-low / scale)
    codes = np.clip(np.round(blocks / scale) + zero, 0, 15)
    return (scale * (codes - zero - 1)).reshape(w.shape)


def _scales_of_the_next(w):
    out, width = np.empty(w.shape), w.shape[1]
    for row in range(len(w)):
        scales = [np.abs(w[row, i : i + 16]).max() / 7 for i in range(0, width, 16)]
        for i in range(width):
            code = np.round(np.float64(w[row, i]) / scales[i // 16])
            out[row, i] = code * scales[(i // 16 + 1) % len(scales)]
    return out


def _in_padded_blocks(w):
    """Int4 in blocks of 32 of a row of 48: the second block is half empty."""
    parts = [w[:, :32], w[:, 32:]]
    scales = [np.abs(part).max(axis=1, keepdims=True) / 7 for part in parts]
    return np.concatenate(
        [np.round(part / s) * s for part, s in zip(parts, scales, strict=True)], 1
    )


def _halves_of_blocks(w):
    out = w.copy()
    for start in range(0, w.shape[1], 8):
        out[:, start : start + 4], out[:, start + 4 : start + 8] = (
            w[:, start + 4 : start + 8],
            w[:, start : start + 4],
        )
    return out


def _transposed_view(p):
    x = p[ATTENTION].reshape(2, COUNT, -1)
    return np.stack([row.T.ravel().reshape(row.shape) for row in x])


MISTAKES = [
    Mistake("outputs repeated", UP, _changed(_tile_twice)),
    Mistake("heads repeated", Q, _changed(_head_twice)),
    Mistake("a corrupted element", DOWN, _changed(_bit)),
    Mistake("a corrupted element", RESIDUAL, _changed(_eightfold)),
    Mistake("sign flipped", GATE, _changed(_negative)),
    Mistake("sign flipped", NORM, lambda p: -p.right),
    Mistake("everything scaled", Q_ROPE, lambda p: p.right * np.float32(8**-0.5)),
    Mistake("array of another site", DOWN, _changed(_row_of_another_layer)),
    Mistake("norm weight skipped", NORM, _changed(_tail_without_weight)),
    Mistake("partial sums lost", DOWN, _changed(_slab_lost)),
    Mistake("another row added", EMBEDDING, _changed(_first_row_added)),
    Mistake("no causal mask", ATTENTION, _changed(_one_head_sees_all)),
    Mistake("uniform attention", ATTENTION, _changed(_averaged_tile)),
    Mistake("uniform attention", ATTENTION, _heads(_alike)),
    Mistake("output gated", ATTENTION, _gated),
    Mistake("only the largest scores", ATTENTION, _heads(_of_largest(5))),
    Mistake("exponentials approximated", ATTENTION, _heads(_by_bits)),
    Mistake("exponentials approximated", ATTENTION, _heads(_by_squares)),
    Mistake("newest slot not written", ATTENTION, _newest_of_zeros),
    Mistake("blocks of keys averaged", ATTENTION, _halves_averaged),
    Mistake("value heads in reverse order", ATTENTION, _heads(v=lambda v: v[:, :, ::-1])),
    Mistake("activation from a table of steps", ACT, _nearest_of_table),
    Mistake("activation from a table of steps", ACT, _lines_of_table),
    Mistake("another root in the norm", NORM, _estimated_root),
    Mistake("norm computed in bfloat16", NORM, _norm_in(ml_dtypes.bfloat16)),
    Mistake("norm computed in float16", NORM, _norm_in(np.float16)),
    Mistake(
        "mean over another width",
        NORM,
        _by(lambda x: np.sqrt((x * x).sum(axis=-1, keepdims=True) / 64 + 1e-4)),
    ),
    Mistake(
        "mean of magnitudes", NORM, _by(lambda x: np.abs(x).mean(axis=-1, keepdims=True) + 1e-4)
    ),
    Mistake(
        "largest magnitude for the root mean square",
        NORM,
        _by(lambda x: np.abs(x).max(axis=-1, keepdims=True) + 1e-4),
    ),
    Mistake(
        "another layer's weights",
        NORM,
        lambda p: normed(p.read, p.gain(layer=2), p.config.rms_norm_eps),
    ),
    Mistake(
        "bits of weights misread",
        V,
        lambda p: _product(p, V, NORM, _bits(p.weight(V), ml_dtypes.bfloat16, np.float16)),
    ),
    Mistake(
        "bits of weights misread",
        NORM,
        lambda p: p.right / p.gain() * _bits(p.gain(), np.float16, ml_dtypes.bfloat16),
    ),
    Mistake(
        "zero points off by one", Q, lambda p: _product(p, Q, NORM, _zero_one_late(p.weight(Q)))
    ),
    Mistake(
        "scales of another block",
        UP,
        lambda p: _product(p, UP, POST, _scales_of_the_next(p.weight(UP))),
    ),
    Mistake(
        "weights quantised",
        DOWN,
        lambda p: _product(p, DOWN, ACT, _in_padded_blocks(p.weight(DOWN))),
    ),
    Mistake(
        "input channels in another order",
        K,
        lambda p: _product(p, K, NORM, _halves_of_blocks(p.weight(K))),
    ),
    Mistake(
        "input channels in another order",
        DOWN,
        lambda p: _product(p, DOWN, ACT, p.weight(DOWN)[:, _GROUPS]),
    ),
    Mistake(
        "input seen through a wrong view",
        OUT,
        lambda p: _product(p, OUT, ATTENTION, x=_transposed_view(p)),
    ),
]
