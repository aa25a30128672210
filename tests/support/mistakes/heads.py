"""Mistakes in attention."""

from __future__ import annotations

import math

import numpy as np

from tests.support.mistakes.mistake import (
    ATTENTION,
    K,
    Mistake,
    Q,
    V,
)
from tests.support.ported import COUNT, causal, narrow, softmax


def _attention(allowed=None, q=None, k=None, v=None, **options):
    def wrong(p):
        given = zip((q, k, v), p.qkv, strict=True)
        arrays = [array if other is None else _other(p, other) for other, array in given]
        how = dict(options)
        if callable(scale := options.get("scale")):
            how["scale"] = scale(p)
        return p.attended(*arrays, allowed and allowed(p), **how)

    return wrong


def _shifted(scores):
    return np.exp(scores - scores.max(axis=-1, keepdims=True))


def _values_normalised(p):
    q, k, v = p.qkv
    square = (v * v).mean(axis=-1, keepdims=True)
    return p.attended(q, k, v / np.sqrt(square + p.config.rms_norm_eps), None)


def _gated_later(p):
    x, queries = (p[role].reshape(2, COUNT, -1) for role in (ATTENTION, "self_attn.q_rope"))
    return x / (1 + np.exp(-queries)) @ p.weight("self_attn.o_proj").T + p.own_bias


def _other(p, role):
    """The heads of a projection as RoPE reads them; those after RoPE as attention does."""
    normed = p.config.qk_norm != "none" and role[-6] != "v"
    if role.endswith("_proj") and normed and not p.config.qk_norm_after_rope:
        role = role.replace("_proj", "_norm")
    if role.endswith("_rope") and normed and p.config.qk_norm_after_rope:
        role = role.replace("_rope", "_norm")
    return p.heads(role)


def _turned_values(p):
    q, k, v = p.qkv
    return p.attended(q, k, p.turned(v))


def _keys_twice(p):
    q, k, v = p.qkv
    return p.attended(q, p.turned(k), v)


def _layer_0(p):
    return p.attended(p.qkv[0], *p.at(0).qkv[1:])


def _one_late(p):
    q, *kv = p.qkv
    return p.attended(q, *(np.concatenate([0 * y[:, :1], y[:, :-1]], axis=1) for y in kv))


def _exponentials(s):
    return np.exp(s - s.max(axis=-1, keepdims=True))


def _overflowing(s):
    e = np.exp(s.astype(np.float32))
    return e / e.sum(axis=-1, keepdims=True)


def _over_queries(s):
    e = np.exp(s)
    return e / e.sum(axis=-2, keepdims=True)


def _over_both(s):
    e = _exponentials(s)
    e = e / e.sum(axis=-2, keepdims=True)
    return e / e.sum(axis=-1, keepdims=True)


def _unmasked(weights):
    """Attention to all tokens, with the mask for what makes weights of the scores."""

    def wrong(p):
        # The sinks, if there are any, are those of one more token, which each sees.
        seen = (
            p.allowed
            if p.sinks is None
            else np.pad(p.allowed, ((0, 0), (0, 1)), "constant", constant_values=True)
        )
        return p.attended(*p.qkv, _everything(p), weights=lambda s: weights(s, seen))

    return wrong


def _masked_later(s, seen):
    e = np.exp(s)
    return e / e.sum(axis=-1, keepdims=True) * seen


def _one_added(s, seen):
    return softmax(s + seen)


def _odd_tokens(p):
    """The first two tokens are hidden from every third query."""
    allowed = p.allowed.copy()
    allowed[5::3, :2] = False
    return p.attended(*p.qkv, allowed)


def _heads_regrouped(p):
    """Query heads taken for [group, kv] in the place of [kv, group], and left so."""
    q, k, v = p.qkv
    return p.attended(q[:, :, [0, 2, 1, 3]], k, v)


CHUNKS = ((0, 5), (5, 6), (6, 10), (10, 14))


def _cached(first_slot=None, query_slot=None, read_from=None):
    """Attention a chunk at a time over a cache, written and read as the arguments say."""

    def wrong(p):
        q, k, v = p.qkv
        y = np.zeros(q.shape)
        window = p.config.window_of(p.layer) or 2 * COUNT
        cache_k, cache_v = (np.zeros((2, 2 * COUNT, *a.shape[2:])) for a in (k, v))
        for start, stop in CHUNKS:
            slot = start if first_slot is None else first_slot(start)
            cache_k[:, slot : slot + stop - start] = k[:, start:stop]
            cache_v[:, slot : slot + stop - start] = v[:, start:stop]
            for s in range(start, stop):
                low = 0 if read_from is None else read_from(start)
                at = s if query_slot is None else query_slot(s, start)
                low, high = max(low, min(s, at) + 1 - window), min(stop, 1 + at)
                seen = np.ones((1, high - low), bool)
                rows = (cache_k[:, low:high], cache_v[:, low:high])
                y[:, s : s + 1] = p.attended(q[:, s : s + 1], *rows, seen)
        return y

    return wrong


_SEEN = "other tokens seen"
_EYE = np.eye(COUNT, dtype=bool)


def _everything(p):
    return np.ones((COUNT, COUNT), bool)


def _window(other):
    return lambda p: causal(COUNT, other(p.config.sliding_window))


MISTAKES = [
    Mistake("no causal mask", ATTENTION, _attention(_everything)),
    Mistake("a token does not see itself", ATTENTION, _attention(lambda p: p.allowed & ~_EYE)),
    Mistake(
        "a token sees the next",
        ATTENTION,
        _attention(lambda p: p.allowed | np.eye(COUNT, k=1, dtype=bool)),
    ),
    Mistake("another window", ATTENTION, _attention(lambda p: causal(COUNT)), "window"),
    Mistake("another window", ATTENTION, _attention(_window(lambda w: w + 1)), "window"),
    Mistake("another window", ATTENTION, _attention(_window(lambda w: w - 1)), "window"),
    Mistake("another window", ATTENTION, _attention(_window(lambda w: 2 * w)), "window"),
    Mistake("another window", ATTENTION, _attention(_window(lambda w: w)), "some windows"),
    Mistake("mask inverted", ATTENTION, _attention(lambda p: ~p.allowed)),
    Mistake("a token sees only itself", ATTENTION, _attention(lambda p: _EYE)),
    Mistake("hidden keys at 0", ATTENTION, _attention(hidden=0.0)),
    Mistake(
        "mask added as 0 and 1",
        ATTENTION,
        _unmasked(_one_added),
    ),
    Mistake("another scale of scores", ATTENTION, _attention(scale=1.0)),
    Mistake("another scale of scores", ATTENTION, _attention(scale=1 / 8)),
    *(
        Mistake("another scale of scores", ATTENTION, _attention(scale=scale))
        for scale in (1 / math.sqrt(32), 1 / 2, 1 / math.sqrt(2), math.sqrt(8))
    ),
    Mistake(
        "another scale of scores", ATTENTION, _attention(scale=lambda p: p.scale * math.log(2))
    ),
    Mistake("key heads tiled", ATTENTION, _attention(kv_of=lambda h: h % 2)),
    Mistake("first key head for all", ATTENTION, _attention(kv_of=lambda h: 0)),
    Mistake("key heads in reverse order", ATTENTION, _attention(kv_of=lambda h: 1 - h // 2)),
    Mistake("softmax over the queries", ATTENTION, _attention(weights=_over_queries)),
    Mistake("softmax over queries and keys", ATTENTION, _attention(weights=_over_both)),
    Mistake("softmax not normalised", ATTENTION, _attention(weights=_exponentials)),
    Mistake("exponentials without softmax", ATTENTION, _attention(weights=np.exp)),
    Mistake(
        "softmax with one more",
        ATTENTION,
        _attention(weights=lambda s: np.exp(s) / (1 + np.exp(s).sum(axis=-1, keepdims=True))),
    ),
    Mistake(
        "softmax with one more",
        ATTENTION,
        _attention(weights=lambda s: _shifted(s) / (1 + _shifted(s).sum(axis=-1, keepdims=True))),
    ),
    Mistake("values normalised", ATTENTION, _values_normalised),
    Mistake("output gated", "self_attn.o_proj", _gated_later),
    Mistake(
        "masked after softmax",
        ATTENTION,
        _unmasked(_masked_later),
    ),
    Mistake("softmax left out", ATTENTION, _attention(hidden=0.0, weights=lambda s: s)),
    Mistake("keys for values", ATTENTION, _attention(v="self_attn.k_rope")),
    Mistake("keys before RoPE for values", ATTENTION, _attention(v=K)),
    Mistake("values for keys", ATTENTION, _attention(k=V)),
    Mistake("queries before RoPE", ATTENTION, _attention(q=Q)),
    Mistake("keys before RoPE", ATTENTION, _attention(k=K)),
    Mistake("values rotated by RoPE", ATTENTION, _turned_values),
    Mistake("keys rotated twice", ATTENTION, _keys_twice),
    Mistake("another layer's keys and values", ATTENTION, _layer_0),
    Mistake(
        "cache written one place late", ATTENTION, _one_late, also=("newest slot not written",)
    ),
    Mistake("hidden keys at a score too high", ATTENTION, _attention(hidden=-1e4), "huge"),
    Mistake("softmax without the shift", ATTENTION, _attention(weights=_overflowing), "large"),
    Mistake(
        "heads before tokens",
        ATTENTION,
        lambda p: p.right.swapaxes(1, 2).reshape(p.right.shape),
    ),
    Mistake("heads mixed up", ATTENTION, lambda p: p.right[:, :, ::-1]),
    Mistake("other tokens seen", ATTENTION, _odd_tokens),
    Mistake("other heads", ATTENTION, _heads_regrouped),
    Mistake("scores scaled", ATTENTION, _attention(scale=0.3)),
    Mistake(
        "scores capped",
        ATTENTION,
        _attention(weights=lambda s: softmax(np.where(s > -np.inf, 2 * np.tanh(s / 2), s))),
    ),
    Mistake("logits capped", "lm_head", lambda p: 3 * np.tanh(p.right / 3)),
    Mistake("cache not read", ATTENTION, _cached(read_from=lambda start: start), also=(_SEEN,)),
    Mistake("cache written from its start", ATTENTION, _cached(first_slot=lambda start: 0)),
    Mistake(
        "cache written one place late",
        ATTENTION,
        _cached(first_slot=lambda start: start + 1),
        also=("newest slot not written",),
    ),
    Mistake(
        "mask of the first chunk for each",
        ATTENTION,
        _cached(query_slot=lambda s, start: s - start),
        also=(_SEEN,),
    ),
    Mistake(
        "a token sees the next",
        ATTENTION,
        _cached(query_slot=lambda s, start: s + 1),
    ),
    Mistake(
        "padding seen",
        ATTENTION,
        _attention(lambda p: causal(COUNT)),
        padded=True,
    ),
    Mistake(
        "queries rotated twice",
        ATTENTION,
        lambda p: p.attended(p.turned(p.qkv[0]), *p.qkv[1:]),
    ),
    Mistake(
        "inputs rounded to bfloat16",
        ATTENTION,
        lambda p: p.attended(*map(narrow, p.qkv)),
    ),
]
