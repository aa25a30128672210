"""Mistakes in formulas that the register has, too, written once more in naive code."""

from __future__ import annotations

import math

import numpy as np

from tests.support.mistakes.mistake import (
    ACT,
    ATTENTION,
    DOWN,
    EMBEDDING,
    GATE,
    K_ROPE,
    NORM,
    OUT,
    PLACES,
    Q_ROPE,
    RESIDUAL,
    UP,
    K,
    Mistake,
    Q,
    V,
)
from tests.support.ported import (
    COUNT,
    attended,
    causal,
    narrow,
    normed,
    omega,
    silu,
    softmax,
    turned,
)

HALF = np.float32(8**-0.5)
_BLOCKS_BEGUN = PLACES[:, None] // 4 * 4 + 3 >= PLACES  # keys of four that a query has begun


def _gate(formula):
    return lambda p: formula(p[GATE].astype(np.float64), p[UP].astype(np.float64))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _attention(allowed=None, q=lambda q: q, k=lambda k: k, v=lambda v: v, **options):
    def wrong(p):
        arrays = q(p.heads(Q_ROPE)), k(p.heads(K_ROPE)), v(p.heads(V))
        return attended(*arrays, causal(COUNT) if allowed is None else allowed, **options)

    return wrong


def _scores(p):
    """[heads, B, S, S], after the causal mask."""
    q, k = p.heads(Q_ROPE).astype(np.float64), p.heads(K_ROPE).astype(np.float64)
    scores = np.array([np.einsum("bsd,btd->bst", q[:, :, h], k[:, :, h // 2]) for h in range(4)])
    return np.where(causal(COUNT), scores / math.sqrt(8), -np.inf)


def _weighed(p, weights):
    v = p.heads(V)
    return np.stack([w @ v[:, :, h // 2] for h, w in enumerate(weights)], axis=2)


def _over_heads(hidden):
    """Keys that a query does not see weigh nothing, or with one and the same score."""

    def wrong(p):
        e = np.exp(np.maximum(_scores(p), hidden))
        return _weighed(p, np.divide(e, e.sum(axis=0), out=np.zeros_like(e), where=e > 0))

    return wrong


def _alibi(p):
    distance = PLACES[:, None] - PLACES
    slopes = [2.0 ** (-2 * (h + 1)) for h in range(4)]  # of four heads: 1/4, 1/16 ...
    scores = [s - slope * distance for s, slope in zip(_scores(p), slopes, strict=True)]
    return _weighed(p, [softmax(s) for s in scores])


def _never_rescaled(p):
    """Blocks of four keys, whose sums are added up as they are."""
    weights = []
    for scores in _scores(p):
        w, largest = np.zeros_like(scores), np.full(scores.shape[:-1], -np.inf)
        for start in range(0, COUNT, 4):
            block = scores[..., start : start + 4]
            largest = np.maximum(largest, block.max(axis=-1))
            w[..., start : start + 4] = np.exp(block - largest[..., None])
        weights.append(w / w.sum(axis=-1, keepdims=True))
    return _weighed(p, weights)


def _value_of(head):
    """Query heads with the keys that are theirs, and the values of other heads."""
    return lambda p: np.stack(
        [softmax(s) @ p.heads(V)[:, :, head(h)] for h, s in enumerate(_scores(p))], axis=2
    )


def _beside(array):
    return np.roll(array, 1, axis=1)


def _product(role, source, weight=lambda w: w, x=lambda x: x):
    return lambda p: x(p[source]) @ weight(p.weight(role)).T


def _larger_of_two(w):
    pairs = w.reshape(len(w), -1, 2)
    return np.where(np.abs(pairs) < np.abs(pairs[..., ::-1]), 0, pairs).reshape(w.shape)


def _some_inputs(start, stop, factor):
    def changed(x):
        x = x.copy()
        x[..., start:stop] *= factor
        return x

    return changed


def _tiles(w):
    out = w.copy()
    for i in range(0, len(w), 8):
        for j in range(0, w.shape[1], 8):
            out[i : i + 8, j : j + 8] = w[i : i + 8, j : j + 8].T
    return out


def _viewed(array):
    """Memory of [tokens, heads, D], taken for [heads, tokens, D]."""
    tokens, heads, width = array.shape[1:]
    return np.stack([y.ravel().reshape(heads, tokens, width).swapaxes(0, 1) for y in array])


def _turned_whole_row(p):
    row = p.heads(Q).reshape(2, COUNT, 1, 32)
    rates = np.array([2000.0 ** (-2 * i / 32) for i in range(16)])
    return turned(row, np.outer(PLACES, rates))


def _without_a_minus(p):
    x, half = p.heads(K).astype(np.float64), 4
    cos, sin = (f(np.outer(PLACES, omega(p.config)))[:, None] for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos + b * sin, b * cos + a * sin], axis=-1)


def _neighbours_angles(p):
    """Angles that are each there twice, side by side, for pairs half a head apart."""
    x = p.heads(K).astype(np.float64)
    phases = np.repeat(np.outer(PLACES, omega(p.config)), 2, axis=1)[:, None]
    other = np.concatenate([-x[..., 4:], x[..., :4]], axis=-1)
    return x * np.cos(phases) + other * np.sin(phases)


def _in_groups(p):
    """Rows of queries, a key and a value, group after group, taken for all queries and so on."""
    q, k, v = (p.weight(role).reshape(-1, 8, 32) for role in (Q, K, V))
    rows = [q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]]
    return p[NORM] @ np.concatenate(rows[:4]).T


def _capped(y, cap):
    return cap * np.tanh(y / cap)


def _cap_first(s):
    raw = np.where(np.isfinite(s), s, 0) / HALF
    return softmax(np.where(np.isfinite(s), _capped(raw, 1.5) * HALF, -np.inf))


def _head(p):
    return p.arrays["lm_head"].astype(np.float64)


def _rows(p):
    return p.weights["model.embed_tokens.weight"][p.ids]


def _scaled_again(p):
    return (p[NORM] * p.weight(NORM)) @ p.weight(Q).T


IN_MLP = [
    Mistake("hard swish for silu", ACT, _gate(lambda g, u: g * np.clip(g + 3, 0, 6) / 6 * u)),
    Mistake(
        "hard sigmoid for sigmoid", ACT, _gate(lambda g, u: g * np.clip(g / 5 + 0.5, 0, 1) * u)
    ),
    Mistake("mish for silu", ACT, _gate(lambda g, u: g * np.tanh(np.log(1 + np.exp(g))) * u)),
    Mistake("softplus for silu", ACT, _gate(lambda g, u: np.log(1 + np.exp(g)) * u)),
    Mistake("sigmoid of minus gate", ACT, _gate(lambda g, u: g * _sigmoid(-g) * u)),
    Mistake("sigmoid of up", ACT, _gate(lambda g, u: g * _sigmoid(u))),
    Mistake("one added to up", ACT, _gate(lambda g, u: silu(g) * (u + 1))),
    Mistake("silu for gelu", ACT, _gate(lambda g, u: silu(g) * u), "gemma"),
    Mistake(
        "gelu with sigmoid for gelu", ACT, _gate(lambda g, u: g * _sigmoid(1.702 * g) * u), "gemma"
    ),
    Mistake(
        "gelu with erf for gelu",
        ACT,
        _gate(lambda g, u: g / 2 * (1 + np.vectorize(math.erf)(g / math.sqrt(2))) * u),
        "gemma",
    ),
    Mistake(
        "activation from a table in bfloat16",
        ACT,
        lambda p: narrow(silu(narrow(p[GATE]))) * p[UP],
    ),
    Mistake(
        "activation from a table in float16",
        ACT,
        lambda p: narrow(silu(narrow(p[GATE], np.float16)), np.float16) * p[UP],
    ),
]
IN_ATTENTION = [
    Mistake("softmax over the heads", ATTENTION, _over_heads(-np.inf)),
    Mistake("softmax over the heads", ATTENTION, _over_heads(-100.0)),
    Mistake("scores lowered by distance", ATTENTION, _alibi),
    Mistake("online softmax without rescaling", ATTENTION, _never_rescaled),
    Mistake("value heads tiled", ATTENTION, _value_of(lambda h: h % 2)),
    Mistake("first value head for all", ATTENTION, _value_of(lambda h: 0)),
    Mistake("keys or values of the token beside", ATTENTION, _attention(v=_beside)),
    Mistake("another sequence's keys and values", ATTENTION, _attention(v=lambda v: v[::-1])),
    Mistake("another sequence's keys and values", ATTENTION, _attention(v=lambda v: v[[0, 0]])),
    Mistake("mask transposed", ATTENTION, _attention(causal(COUNT).T)),
    Mistake("causal mask by the block", ATTENTION, _attention(_BLOCKS_BEGUN)),
    Mistake("last keys left out", ATTENTION, _attention(causal(COUNT) & (PLACES < 12))),
    Mistake(
        "probabilities rounded to bfloat16",
        ATTENTION,
        _attention(weights=lambda s: narrow(softmax(s))),
    ),
    Mistake(
        "probabilities rounded to float16",
        ATTENTION,
        _attention(weights=lambda s: narrow(softmax(s), np.float16)),
    ),
    Mistake("heads by a view", ATTENTION, _attention(k=_viewed)),
    Mistake("cap of scores missing", ATTENTION, _attention(), "gemma"),
    Mistake("cap of scores before the scale", ATTENTION, _attention(weights=_cap_first), "gemma"),
    Mistake("RoPE over all heads at once", Q_ROPE, _turned_whole_row),
    Mistake("RoPE without a minus sign", K_ROPE, _without_a_minus),
    Mistake("RoPE table in the other layout", K_ROPE, _neighbours_angles),
]
IN_PRODUCTS = [
    Mistake("a part of the sum left out", DOWN, _product(DOWN, ACT, x=_some_inputs(32, 48, 0))),
    Mistake("a part of the sum added twice", DOWN, _product(DOWN, ACT, x=_some_inputs(0, 16, 2))),
    Mistake(
        "weights off by one element",
        Q,
        _product(Q, NORM, lambda w: np.roll(w.ravel(), -1).reshape(w.shape)),
    ),
    Mistake("weights pruned", Q, _product(Q, NORM, _larger_of_two)),
    Mistake("joined matrix split by group", Q, _in_groups),
    Mistake("norm's weight counted otherwise", Q, _scaled_again),
    Mistake("tiles of the matrix transposed", DOWN, _product(DOWN, ACT, _tiles)),
    Mistake("heads by a view", K, lambda p: _viewed(p.right.reshape(2, COUNT, 2, 8))),
    Mistake("logits scaled", "lm_head", lambda p: p.right / np.float32(32**0.5)),
    Mistake("vocabulary shifted", "lm_head", lambda p: np.roll(p.right, 1, axis=-1)),
]
IN_STREAMS = [
    Mistake(
        "residual from the wrong place",
        "",
        lambda p: p.arrays["model.embed_tokens"] + p[DOWN],
    ),
    Mistake("sum normalised", RESIDUAL, lambda p: normed(p["x"] + p[OUT], p.weight(NORM), 1e-4)),
    Mistake(
        "what is added normalised",
        RESIDUAL,
        lambda p: p["x"] + normed(p[OUT], p.weight("post_attention_layernorm"), 1e-4),
    ),
    Mistake(
        "norm weight without its plus one",
        NORM,
        lambda p: normed(p["x"], p.weight(NORM), 1e-4),
        "gemma",
    ),
]
WITH_FACTORS = [
    Mistake("embedding not multiplied", EMBEDDING, _rows, "multipliers"),
    Mistake("another embedding multiplier", EMBEDDING, lambda p: _rows(p) * 144, "multipliers"),
    Mistake(
        "embedding multiplier rounded otherwise",
        EMBEDDING,
        lambda p: _rows(p) * narrow(np.array(5.7)),
        "gemma",
    ),
    Mistake("residual multiplier left out", RESIDUAL, lambda p: p["x"] + p[OUT], "multipliers"),
    Mistake(
        "residual multiplier in the wrong place",
        RESIDUAL,
        lambda p: (p["x"] + p[OUT]) * np.float32(0.22),
        "multipliers",
    ),
    Mistake(
        "residual multiplier divides", RESIDUAL, lambda p: p["x"] + p[OUT] / 0.22, "multipliers"
    ),
    Mistake("logits for what the head gives", "lm_head", lambda p: p.right / 6, "multipliers"),
    Mistake("logits scaling multiplies", "logits", lambda p: _head(p) * 6, "multipliers"),
    Mistake("logits not scaled", "logits", _head, "multipliers"),
    Mistake("cap of logits missing", "logits", _head, "gemma"),
    Mistake("another cap of logits", "logits", lambda p: _capped(_head(p), 30), "gemma"),
]
MISTAKES = [*IN_MLP, *IN_ATTENTION, *IN_PRODUCTS, *IN_STREAMS, *WITH_FACTORS]
