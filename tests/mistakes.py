"""Mistakes of ports: the name that a diagnosis should give, where it shows, and the wrong code."""

from __future__ import annotations

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np
from ported import (
    COUNT,
    LAYER,
    attended,
    causal,
    narrow,
    normed,
    omega,
    silu,
    turned,
)


class Mistake(NamedTuple):
    name: str
    role: str
    wrong: object
    config: str = "base"
    also: tuple[str, ...] = ()
    """Other mistakes that leave the same array, or one too much like it."""
    padded: bool = False
    first: int = 0
    """The position of the first token."""
    dtype: object = np.float32

    @property
    def site(self):
        if self.role.startswith(("model.", "lm_head")):
            return self.role
        return f"model.layers.{LAYER}.{self.role}".removesuffix(".")


PLACES = np.arange(COUNT)


# RoPE -------------------------------------------------------------------------------------------
def _rope(role, **how):
    def wrong(p):
        phases = how.get("phases", lambda config: np.outer(PLACES, omega(config)))(p.config)
        options = {k: v for k, v in how.items() if k in ("layout", "factor", "sign")}
        return turned(p.heads(role), phases, **options)

    return wrong


def _theta(theta):
    return _rope("self_attn.q_proj", phases=lambda c: np.outer(PLACES, omega(c, theta)))


def _at(places):
    return _rope("self_attn.q_proj", phases=lambda c: np.outer(places, omega(c)))


def _put_back(p):
    x = p.heads("self_attn.q_proj").astype(np.float64)
    a, b = x[..., 0::2], x[..., 1::2]
    phases = np.outer(PLACES, omega(p.config))[None, :, None]
    parts = [a * np.cos(phases) - b * np.sin(phases), b * np.cos(phases) + a * np.sin(phases)]
    return np.concatenate(parts, axis=-1)


def _cos_sin(p):
    x = p.heads("self_attn.q_proj").astype(np.float64)
    a, b = np.split(x, 2, axis=-1)
    phases = np.outer(PLACES, omega(p.config))[None, :, None]
    parts = [a * np.sin(phases) - b * np.cos(phases), b * np.sin(phases) + a * np.cos(phases)]
    return np.concatenate(parts, axis=-1)


def _one_half(p):
    right, x = p.right.copy(), p.heads("self_attn.q_proj")
    right[..., x.shape[-1] // 2 :] = x[..., x.shape[-1] // 2 :]
    return right


def _partial(p):
    x, half = p.heads("self_attn.q_proj"), p.config.head_dim // 2
    small = [p.config.rope_theta ** (-2 * i / half) for i in range(half // 2)]
    first = turned(x[..., :half], np.outer(PLACES, small))
    return np.concatenate([first, x[..., half:]], axis=-1)


def _by_head(p):
    x = p.heads("self_attn.q_proj")
    return turned(x.swapaxes(1, 2), np.outer(np.arange(x.shape[2]), omega(p.config))).swapaxes(1, 2)


def _narrow_phases(dtype):
    def wrong(p):
        places = narrow(p.positions.astype(np.float32), dtype)
        phases = narrow(np.outer(places, narrow(omega(p.config).astype(np.float32), dtype)), dtype)
        return turned(p.heads("self_attn.q_proj"), phases)

    return wrong


def _narrow_table(rounding):
    def wrong(p):
        x = p.heads("self_attn.q_proj")
        a, b = np.split(x, 2, axis=-1)
        phases = np.outer(PLACES, omega(p.config))[None, :, None]
        cos, sin = (rounding(f(phases).astype(np.float32)) for f in (np.cos, np.sin))
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    return wrong


def _yarn_sine(p):
    # The right array's cosines carry the factor; divide the sines' part by it.
    x = p.heads("self_attn.q_proj").astype(np.float64)
    factor = 0.1 * math.log(p.config.rope_scaling.factor) + 1
    a, b = np.split(x, 2, axis=-1)
    c, d = np.split(p.right.astype(np.float64), 2, axis=-1)
    size = a * a + b * b
    cos, sin = (a * c + b * d) / size, (a * d - b * c) / size / factor
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _yarn_factor(power):
    def wrong(p):
        factor = 0.1 * math.log(p.config.rope_scaling.factor) + 1
        return p.right * factor**power

    return wrong


STALE = np.concatenate([np.arange(9), np.arange(COUNT - 9)])
Q_ROPE = "self_attn.q_rope"
ROPE = [
    Mistake("RoPE layout interleaved", Q_ROPE, _rope("self_attn.q_proj", layout="interleaved")),
    Mistake(
        "RoPE layout interleaved",
        "self_attn.k_rope",
        _rope("self_attn.k_proj", layout="interleaved"),
    ),
    Mistake("RoPE pairs put back in the other layout", Q_ROPE, _put_back),
    Mistake("RoPE turned the other way", Q_ROPE, _rope("self_attn.q_proj", sign=-1)),
    Mistake("another rope_theta", Q_ROPE, _theta(10000.0)),
    Mistake("another rope_theta", Q_ROPE, _theta(500000.0)),
    Mistake("RoPE exponent", Q_ROPE, _theta(2000.0**2)),
    Mistake("RoPE position off by one", Q_ROPE, _at(PLACES + 1)),
    Mistake("RoPE position off by one", Q_ROPE, _at(PLACES - 1)),
    Mistake("RoPE at other positions", Q_ROPE, _at(STALE)),
    Mistake("RoPE at other positions", Q_ROPE, _at(np.full(COUNT, 3))),
    Mistake("RoPE by head", Q_ROPE, _by_head),
    Mistake(
        "RoPE scaling ignored",
        Q_ROPE,
        _rope("self_attn.q_proj"),
        "linear",
    ),
    Mistake("RoPE scaling ignored", Q_ROPE, _rope("self_attn.q_proj"), "llama3"),
    Mistake("RoPE scaling ignored", Q_ROPE, _rope("self_attn.q_proj"), "yarn"),
    Mistake("RoPE scaling ignored", Q_ROPE, _rope("self_attn.q_proj"), "dynamic"),
    Mistake(
        "RoPE scaling of another kind",
        Q_ROPE,
        _rope("self_attn.q_proj", phases=lambda c: np.outer(PLACES, omega(c) / 8)),
        "llama3",
    ),
    Mistake(
        "RoPE scaling factor inverted",
        Q_ROPE,
        _rope("self_attn.q_proj", phases=lambda c: np.outer(PLACES, omega(c) * 3)),
        "linear",
    ),
    Mistake(
        "RoPE with other frequencies",
        Q_ROPE,
        _rope("self_attn.q_proj", phases=lambda c: np.outer(PLACES, omega(c)[::-1] / 2)),
    ),
    Mistake("attention factor of yarn missing", Q_ROPE, _yarn_factor(-1), "yarn"),
    Mistake("attention factor of yarn misused", Q_ROPE, _yarn_factor(1), "yarn"),
    Mistake("attention factor of yarn misused", Q_ROPE, _yarn_sine, "yarn"),
    Mistake("RoPE not applied", Q_ROPE, lambda p: p.heads("self_attn.q_proj")),
    Mistake(
        "RoPE applied twice",
        Q_ROPE,
        lambda p: turned(p.right, np.outer(PLACES, omega(p.config))),
    ),
    Mistake("RoPE cosine and sine swapped", Q_ROPE, _cos_sin),
    Mistake("RoPE on half of the channels", Q_ROPE, _one_half),
    Mistake("partial RoPE", Q_ROPE, _partial),
    Mistake("RoPE phases in bfloat16", Q_ROPE, _narrow_phases(ml_dtypes.bfloat16), first=300),
    Mistake("RoPE phases in float16", Q_ROPE, _narrow_phases(np.float16), first=3000),
    Mistake("RoPE table in bfloat16", Q_ROPE, _narrow_table(lambda y: narrow(y))),
    Mistake(
        "RoPE table in float16",
        Q_ROPE,
        _narrow_table(lambda y: narrow(y, np.float16)),
    ),
    Mistake("RoPE table in few bits", Q_ROPE, _narrow_table(lambda y: np.round(y * 256) / 256)),
    Mistake("padding counted in positions", Q_ROPE, _at(PLACES), padded=True),
]


# Projections ------------------------------------------------------------------------------------
def _linear(p, weight, x=None, bias=None):
    x = p["input_layernorm"] if x is None else x
    y = x @ weight.T
    return y if bias is None else y + bias


def _permute(w, heads):
    """Halves to pairs, row by row."""
    out, width = np.empty_like(w), len(w) // heads
    for h in range(heads):
        for i in range(width // 2):
            out[h * width + 2 * i] = w[h * width + i]
            out[h * width + 2 * i + 1] = w[h * width + i + width // 2]
    return out


def _unpermute(w, heads):
    out, width = np.empty_like(w), len(w) // heads
    for h in range(heads):
        for i in range(width // 2):
            out[h * width + i] = w[h * width + 2 * i]
            out[h * width + i + width // 2] = w[h * width + 2 * i + 1]
    return out


def _rows(role, change, *arguments):
    return lambda p: _linear(p, change(p.weight(role), *arguments))


def _zeroed(p):
    y = p.right.copy()
    y[..., 5] = 0
    return y


def _zero_head(p):
    y = p.right.copy()
    y[..., 8:16] = 0
    return y


def _heads_first(y):
    return y.reshape(*y.shape[:2], 4, 8).swapaxes(2, 3).reshape(y.shape)


def _split_otherwise(p):
    q, k, v = (p.weight(f"self_attn.{n}_proj") for n in "qkv")
    return _linear(p, np.concatenate([k, v, q])[: len(q)])


def _wrong_biases(p):
    q, k, v = (p.bias(f"self_attn.{n}_proj") for n in "qkv")
    return _linear(p, p.weight("self_attn.q_proj"), bias=np.concatenate([v, k, q])[: len(q)])


Q, K, V, OUT = (f"self_attn.{n}_proj" for n in "qkvo")
GATE, UP, DOWN = (f"mlp.{n}_proj" for n in ("gate", "up", "down"))
_SPLIT = "joined matrix split in another order"
LINEAR = [
    Mistake("weight transposed", Q, lambda p: _linear(p, p.weight(Q).T)),
    Mistake("weight transposed", K, lambda p: _linear(p, p.weight(K).reshape(32, -1).T)),
    Mistake("keys and values swapped", K, lambda p: _linear(p, p.weight(V)), also=(_SPLIT,)),
    Mistake("keys and values swapped", V, lambda p: _linear(p, p.weight(K)), also=(_SPLIT,)),
    Mistake(
        "queries and values swapped", V, lambda p: _linear(p, p.weight(Q)), "mha", also=(_SPLIT,)
    ),
    Mistake("queries and the output of attention swapped", Q, lambda p: _linear(p, p.weight(OUT))),
    Mistake(
        "gate and up swapped",
        GATE,
        lambda p: _linear(p, p.weight(UP), p["post_attention_layernorm"]),
    ),
    Mistake(
        "queries and keys swapped", Q, lambda p: _linear(p, p.weight(K)), "mha", also=(_SPLIT,)
    ),
    Mistake("bias missing", K, lambda p: _linear(p, p.weight(K)), "biases"),
    Mistake("bias missing", DOWN, lambda p: _linear(p, p.weight(DOWN), p["mlp.act"]), "biases"),
    Mistake(
        "bias added twice",
        K,
        lambda p: _linear(p, p.weight(K), bias=2 * p.bias(K)),
        "biases",
    ),
    Mistake("another projection's bias", Q, _wrong_biases, "biases"),
    Mistake("RoPE permutation left in", Q, _rows(Q, _permute, 4)),
    Mistake("RoPE permutation left in", K, _rows(K, _permute, 2)),
    Mistake("RoPE permutation undone twice", Q, _rows(Q, _unpermute, 4)),
    Mistake(
        "RoPE permutation with the wrong head count",
        K,
        lambda p: _linear(p, _unpermute(_permute(p.weight(K), 2), 4)),
    ),
    Mistake("channels before heads", Q, lambda p: _heads_first(p.right)),
    Mistake("heads in reverse order", Q, lambda p: p.right.reshape(2, COUNT, 4, 8)[:, :, ::-1]),
    Mistake("joined matrix split in another order", Q, _split_otherwise),
    Mistake("input not normalised", Q, lambda p: _linear(p, p.weight(Q), p["x"])),
    Mistake(
        "input not normalised", UP, lambda p: _linear(p, p.weight(UP), p["attention_residual"])
    ),
    Mistake("input from the wrong place", GATE, lambda p: _linear(p, p.weight(GATE))),
    Mistake("input from the wrong place", OUT, lambda p: _linear(p, p.weight(OUT), p[Q])),
    Mistake(
        "heads side by side in another order",
        OUT,
        lambda p: _linear(
            p, p.weight(OUT), p["self_attn.attention"].swapaxes(2, 3).reshape(2, COUNT, 32)
        ),
    ),
    Mistake("another layer's weights", V, lambda p: _linear(p, p.weight(V, 2))),
    Mistake("another layer's weights", DOWN, lambda p: _linear(p, p.weight(DOWN, 0), p["mlp.act"])),
    Mistake(
        "an input channel left out",
        Q,
        lambda p: p["input_layernorm"][..., :-1] @ p.weight(Q)[:, :-1].T,
    ),
    Mistake("zeros", Q, _zeroed),
    Mistake("zeros", Q, _zero_head),
    Mistake("everything scaled", Q, lambda p: p.right * np.float32(1.25)),
    Mistake(
        "heads in another order", Q, lambda p: p.right.reshape(2, COUNT, 4, 8)[:, :, [0, 3, 1, 2]]
    ),
    Mistake("tokens in another place", Q, lambda p: np.roll(p.right, 1, axis=1)),
    Mistake("array of another site", OUT, lambda p: p["input_layernorm"]),
]


# Norms ------------------------------------------------------------------------------------------
def _norm(eps=None, weight=None):
    def wrong(p):
        w = p.weight("input_layernorm")
        return normed(
            p["x"],
            w if weight is None else weight(p, w),
            p.config.rms_norm_eps if eps is None else eps,
        )

    return wrong


def _by(divisor, centre=False):
    def wrong(p):
        x = p["x"].astype(np.float64)
        if centre:
            x = x - x.mean(axis=-1, keepdims=True)
        return x / divisor(x, p.config.rms_norm_eps) * p.weight("input_layernorm")

    return wrong


def _square(x, axis=-1):
    return (x * x).mean(axis=axis, keepdims=True)


def _narrow_mean(dtype):
    def wrong(p):
        x = p["x"].astype(np.float32)
        total = np.zeros((*x.shape[:2], 1), dtype)
        for i in range(x.shape[-1]):
            total = (total.astype(np.float32) + x[..., i : i + 1] ** 2).astype(dtype)
        mean = narrow(total.astype(np.float32) / x.shape[-1], dtype)
        return x / np.sqrt(mean + np.float32(p.config.rms_norm_eps)) * p.weight(NORM)

    return wrong


NORM = "input_layernorm"
NORMS = [
    Mistake("another eps", NORM, _norm(1e-5)),
    Mistake("another eps", NORM, _norm(1e-6)),
    Mistake("another eps", NORM, _norm(0.0)),
    Mistake("eps outside the root", NORM, _by(lambda x, eps: np.sqrt(_square(x)) + eps)),
    Mistake("norm weight plus one", NORM, _norm(weight=lambda p, w: w + 1)),
    Mistake("norm weight skipped", NORM, _norm(weight=lambda p, w: 1)),
    Mistake(
        "another norm's weight",
        NORM,
        _norm(weight=lambda p, w: p.weight("post_attention_layernorm")),
    ),
    Mistake("another norm's weight", NORM, _norm(weight=lambda p, w: p.weight(NORM, 2))),
    Mistake("mean subtracted", NORM, _by(lambda x, eps: np.sqrt(_square(x) + eps), centre=True)),
    Mistake(
        "sum in the place of the mean", NORM, _by(lambda x, eps: np.sqrt(32 * _square(x) + eps))
    ),
    Mistake("mean over one less", NORM, _by(lambda x, eps: np.sqrt(32 / 31 * _square(x) + eps))),
    Mistake("root forgotten", NORM, _by(lambda x, eps: _square(x) + eps)),
    Mistake(
        "normalised over several tokens",
        NORM,
        _by(lambda x, eps: np.sqrt(_square(x, (1, 2)) + eps)),
    ),
    Mistake("norm skipped", NORM, lambda p: p["x"]),
    Mistake("weight without the norm", NORM, lambda p: p["x"] * p.weight(NORM)),
    Mistake("norm's mean in bfloat16", NORM, _narrow_mean(ml_dtypes.bfloat16)),
    Mistake("norm's mean in float16", NORM, _narrow_mean(np.float16)),
    Mistake(
        "input from the wrong place",
        "post_attention_layernorm",
        lambda p: normed(p["x"], p.weight("post_attention_layernorm"), p.config.rms_norm_eps),
    ),
]


# Attention --------------------------------------------------------------------------------------
def _attention(allowed=None, q=None, k=None, v=None, **options):
    def wrong(p):
        arrays = [
            p.heads(other or name)
            for other, name in ((q, Q_ROPE), (k, "self_attn.k_rope"), (v, "self_attn.v_proj"))
        ]
        return attended(*arrays, causal(COUNT) if allowed is None else allowed, **options)

    return wrong


def _turned_values(p):
    phases = np.outer(PLACES, omega(p.config))
    v = turned(p.heads(V), phases)
    return attended(p.heads(Q_ROPE), p.heads("self_attn.k_rope"), v, causal(COUNT))


def _keys_twice(p):
    phases = np.outer(PLACES, omega(p.config))
    k = turned(p.heads("self_attn.k_rope"), phases)
    return attended(p.heads(Q_ROPE), k, p.heads(V), causal(COUNT))


def _layer_0(p):
    k, v = (
        p.arrays[f"model.layers.0.self_attn.{n}"].reshape(2, COUNT, -1, 8)
        for n in ("k_rope", "v_proj")
    )
    return attended(p.heads(Q_ROPE), k, v, causal(COUNT))


def _one_late(p):
    k, v = (p.heads(n) for n in ("self_attn.k_rope", V))
    k, v = (np.concatenate([0 * y[:, :1], y[:, :-1]], axis=1) for y in (k, v))
    return attended(p.heads(Q_ROPE), k, v, causal(COUNT))


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


def _masked_later(s):
    e = np.exp(s)
    return e / e.sum(axis=-1, keepdims=True) * causal(COUNT)


def _one_added(scores):
    return np.exp(scores + causal(COUNT)) / np.exp(scores + causal(COUNT)).sum(-1, keepdims=True)


def _odd_tokens(p):
    """The first two tokens are hidden from every third query."""
    allowed = causal(COUNT).copy()
    allowed[5::3, :2] = False
    return attended(p.heads(Q_ROPE), p.heads("self_attn.k_rope"), p.heads(V), allowed)


def _heads_regrouped(p):
    """Query heads taken for [group, kv] in the place of [kv, group], and left so."""
    q = p.heads(Q_ROPE)[:, :, [0, 2, 1, 3]]
    return attended(q, p.heads("self_attn.k_rope"), p.heads(V), causal(COUNT))


CHUNKS = ((0, 5), (5, 6), (6, 10), (10, 14))


def _cached(first_slot=None, query_slot=None, read_from=None):
    """Attention a chunk at a time over a cache, written and read as the arguments say."""

    def wrong(p):
        q, k, v = (p.heads(n) for n in (Q_ROPE, "self_attn.k_rope", V))
        y = np.zeros(q.shape)
        cache_k, cache_v = (np.zeros((2, 2 * COUNT, *a.shape[2:])) for a in (k, v))
        for start, stop in CHUNKS:
            slot = start if first_slot is None else first_slot(start)
            cache_k[:, slot : slot + stop - start] = k[:, start:stop]
            cache_v[:, slot : slot + stop - start] = v[:, start:stop]
            for s in range(start, stop):
                low = 0 if read_from is None else read_from(start)
                high = min(stop, 1 + (s if query_slot is None else query_slot(s, start)))
                seen = np.ones((1, high - low), bool)
                rows = (cache_k[:, low:high], cache_v[:, low:high])
                y[:, s : s + 1] = attended(q[:, s : s + 1], *rows, seen)
        return y

    return wrong


ATTENTION_SITE = "self_attn.attention"
_SEEN = "other tokens seen"
_EYE = np.eye(COUNT, dtype=bool)
ATTENTION = [
    Mistake("no causal mask", ATTENTION_SITE, _attention(np.ones((COUNT, COUNT), bool))),
    Mistake("a token does not see itself", ATTENTION_SITE, _attention(causal(COUNT) & ~_EYE)),
    Mistake(
        "a token sees the next",
        ATTENTION_SITE,
        _attention(causal(COUNT) | np.eye(COUNT, k=1, dtype=bool)),
    ),
    Mistake("another window", ATTENTION_SITE, _attention(causal(COUNT)), "window"),
    Mistake("another window", ATTENTION_SITE, _attention(causal(COUNT, 5)), "window"),
    Mistake("another window", ATTENTION_SITE, _attention(causal(COUNT, 4)), "some windows"),
    Mistake("mask inverted", ATTENTION_SITE, _attention(~causal(COUNT))),
    Mistake("a token sees only itself", ATTENTION_SITE, _attention(_EYE)),
    Mistake("hidden keys at 0", ATTENTION_SITE, _attention(hidden=0.0)),
    Mistake(
        "mask added as 0 and 1",
        ATTENTION_SITE,
        _attention(np.ones((COUNT, COUNT), bool), weights=_one_added),
    ),
    Mistake("another scale of scores", ATTENTION_SITE, _attention(scale=1.0)),
    Mistake("another scale of scores", ATTENTION_SITE, _attention(scale=1 / 8)),
    Mistake("another scale of scores", ATTENTION_SITE, _attention(scale=1 / math.sqrt(32))),
    Mistake("key heads tiled", ATTENTION_SITE, _attention(kv_of=lambda h: h % 2)),
    Mistake("first key head for all", ATTENTION_SITE, _attention(kv_of=lambda h: 0)),
    Mistake("key heads in reverse order", ATTENTION_SITE, _attention(kv_of=lambda h: 1 - h // 2)),
    Mistake("softmax over the queries", ATTENTION_SITE, _attention(weights=_over_queries)),
    Mistake("softmax over queries and keys", ATTENTION_SITE, _attention(weights=_over_both)),
    Mistake("softmax not normalised", ATTENTION_SITE, _attention(weights=_exponentials)),
    Mistake("exponentials without softmax", ATTENTION_SITE, _attention(weights=np.exp)),
    Mistake(
        "softmax with one more",
        ATTENTION_SITE,
        _attention(weights=lambda s: np.exp(s) / (1 + np.exp(s).sum(axis=-1, keepdims=True))),
    ),
    Mistake(
        "masked after softmax",
        ATTENTION_SITE,
        _attention(np.ones((COUNT, COUNT), bool), weights=_masked_later),
    ),
    Mistake("softmax left out", ATTENTION_SITE, _attention(hidden=0.0, weights=lambda s: s)),
    Mistake("keys for values", ATTENTION_SITE, _attention(v="self_attn.k_rope")),
    Mistake("keys before RoPE for values", ATTENTION_SITE, _attention(v=K)),
    Mistake("values for keys", ATTENTION_SITE, _attention(k=V)),
    Mistake("queries before RoPE", ATTENTION_SITE, _attention(q=Q)),
    Mistake("keys before RoPE", ATTENTION_SITE, _attention(k=K)),
    Mistake("values turned by RoPE", ATTENTION_SITE, _turned_values),
    Mistake("keys turned twice", ATTENTION_SITE, _keys_twice),
    Mistake("another layer's keys and values", ATTENTION_SITE, _layer_0),
    Mistake("cache written one place late", ATTENTION_SITE, _one_late),
    Mistake("hidden keys at -1e4", ATTENTION_SITE, _attention(hidden=-1e4), "huge"),
    Mistake("softmax without the shift", ATTENTION_SITE, _attention(weights=_overflowing), "large"),
    Mistake(
        "heads mixed up", ATTENTION_SITE, lambda p: p.right.swapaxes(1, 2).reshape(p.right.shape)
    ),
    Mistake("heads mixed up", ATTENTION_SITE, lambda p: p.right[:, :, ::-1]),
    Mistake("other tokens seen", ATTENTION_SITE, _odd_tokens),
    Mistake("other heads", ATTENTION_SITE, _heads_regrouped),
    Mistake(
        "cache not read", ATTENTION_SITE, _cached(read_from=lambda start: start), also=(_SEEN,)
    ),
    Mistake("cache written from its start", ATTENTION_SITE, _cached(first_slot=lambda start: 0)),
    Mistake(
        "cache written one place late", ATTENTION_SITE, _cached(first_slot=lambda start: start + 1)
    ),
    Mistake(
        "mask of the first chunk for each",
        ATTENTION_SITE,
        _cached(query_slot=lambda s, start: s - start),
        also=(_SEEN,),
    ),
    Mistake(
        "a token sees the next",
        ATTENTION_SITE,
        _cached(query_slot=lambda s, start: s + 1),
    ),
    Mistake(
        "padding seen",
        ATTENTION_SITE,
        _attention(causal(COUNT)),
        padded=True,
    ),
    Mistake(
        "queries turned twice",
        ATTENTION_SITE,
        lambda p: attended(
            turned(p.heads(Q_ROPE), np.outer(PLACES, omega(p.config))),
            p.heads("self_attn.k_rope"),
            p.heads(V),
            causal(COUNT),
        ),
    ),
    Mistake(
        "inputs rounded to bfloat16",
        ATTENTION_SITE,
        lambda p: attended(
            *(narrow(p.heads(n)) for n in (Q_ROPE, "self_attn.k_rope", V)), causal(COUNT)
        ),
    ),
]


# The MLP ----------------------------------------------------------------------------------------
_erf = np.vectorize(math.erf)


def _gate(formula):
    return lambda p: formula(p[GATE].astype(np.float64), p[UP].astype(np.float64))


ACT = "mlp.act"
MLP = [
    Mistake("gelu for silu", ACT, _gate(lambda g, u: 0.5 * g * (1 + _erf(g / 2**0.5)) * u)),
    Mistake(
        "gelu (tanh) for silu",
        ACT,
        _gate(lambda g, u: 0.5 * g * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3))) * u),
    ),
    Mistake("gelu (sigmoid) for silu", ACT, _gate(lambda g, u: g / (1 + np.exp(-1.702 * g)) * u)),
    Mistake("relu for silu", ACT, _gate(lambda g, u: np.maximum(g, 0) * u)),
    Mistake("relu squared for silu", ACT, _gate(lambda g, u: np.maximum(g, 0) ** 2 * u)),
    Mistake("sigmoid for silu", ACT, _gate(lambda g, u: u / (1 + np.exp(-g)))),
    Mistake("tanh for silu", ACT, _gate(lambda g, u: np.tanh(g) * u)),
    Mistake("gate and up swapped in the product", ACT, _gate(lambda g, u: silu(u) * g)),
    Mistake("up left out", ACT, _gate(lambda g, u: silu(g))),
    Mistake("gate left out", ACT, _gate(lambda g, u: u)),
    Mistake("no activation", ACT, _gate(lambda g, u: g * u)),
    Mistake("silu of the product", ACT, _gate(lambda g, u: silu(g * u))),
    Mistake("silu twice", ACT, _gate(lambda g, u: silu(silu(g)) * u)),
    Mistake("silu of both", ACT, _gate(lambda g, u: silu(g) * silu(u))),
    Mistake("gate and up added", ACT, _gate(lambda g, u: silu(g) + u)),
]

# Residuals --------------------------------------------------------------------------------------
RESIDUAL = "attention_residual"
STREAMS = [
    Mistake("residual missing", RESIDUAL, lambda p: p[OUT]),
    Mistake("block not added", RESIDUAL, lambda p: p["x"]),
    Mistake("added twice", RESIDUAL, lambda p: p["x"] + 2 * p[OUT]),
    Mistake("added twice", RESIDUAL, lambda p: p["x"] * 2 + p[OUT]),
    Mistake("subtracted for added", RESIDUAL, lambda p: p["x"] - p[OUT]),
    Mistake("residual from the wrong place", RESIDUAL, lambda p: p[NORM] + p[OUT]),
    Mistake("another block added", RESIDUAL, lambda p: p["x"] + p[Q]),
    Mistake("one array more added", RESIDUAL, lambda p: p["x"] + p[OUT] + p[NORM]),
    Mistake("added block scaled", RESIDUAL, lambda p: p["x"] + np.float32(0.3) * p[OUT]),
    Mistake("residual from the wrong place", "", lambda p: p["x"] + p[DOWN]),
]


# Rounding ---------------------------------------------------------------------------------------
def _tf32(x, nearest=True):
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(4096 if nearest else 0)) & np.uint32(0xFFFFE000)).view(np.float32)


def _rounded(how):
    return lambda p: how(p["input_layernorm"]).astype(np.float64) @ how(p.weight(Q)).T


def _sums(dtype):
    def wrong(p):
        x, w = p["input_layernorm"], p.weight(Q)
        total = np.zeros((*x.shape[:2], len(w)), np.float32)
        for i in range(x.shape[-1]):
            total = narrow(total + narrow(x[..., i, None] * w[:, i], dtype), dtype)
        return total

    return wrong


ROUNDING = [
    Mistake("inputs rounded to TF32", Q, _rounded(_tf32), also=("inputs rounded to float16",)),
    Mistake("inputs rounded to TF32", Q, _rounded(lambda x: _tf32(x, False))),
    Mistake("inputs rounded to bfloat16", Q, _rounded(narrow)),
    Mistake("inputs rounded to float16", Q, _rounded(lambda x: narrow(x, np.float16)), "small"),
    Mistake("result rounded to bfloat16", Q, lambda p: narrow(p.right)),
    Mistake("result rounded to float16", Q, lambda p: narrow(p.right, np.float16)),
    Mistake("sums kept in bfloat16", Q, _sums(ml_dtypes.bfloat16)),
    Mistake("sums kept in float16", Q, _sums(np.float16)),
]


# Outside the layers ------------------------------------------------------------------------------
def _table(p):
    return p.weights["model.embed_tokens.weight"]


EMBEDDING = "model.embed_tokens"
OUTSIDE = [
    Mistake(
        "embedding scaled by the root of hidden_size",
        EMBEDDING,
        lambda p: _table(p)[p.ids] * np.float32(32**0.5),
    ),
    Mistake("token ids shifted", EMBEDDING, lambda p: _table(p)[p.ids - 1]),
    Mistake("tokens shifted", EMBEDDING, lambda p: _table(p)[np.roll(p.ids, 1, axis=1)]),
    Mistake("another embedding table", EMBEDDING, lambda p: p.weights["lm_head.weight"][p.ids]),
    Mistake("another embedding table", EMBEDDING, lambda p: _table(p).reshape(32, -1).T[p.ids]),
    Mistake("norm skipped", "model.norm", lambda p: p.arrays["model.layers.2"]),
    Mistake(
        "input from the wrong place",
        "model.norm",
        lambda p: normed(
            p.arrays["model.layers.1"], p.weights["model.norm.weight"], p.config.rms_norm_eps
        ),
    ),
    Mistake(
        "embedding used as the head", "lm_head", lambda p: p.arrays["model.norm"] @ _table(p).T
    ),
    Mistake(
        "input not normalised",
        "lm_head",
        lambda p: p.arrays["model.layers.2"] @ p.weights["lm_head.weight"].T,
    ),
]
MISTAKES = [*OUTSIDE, *ROPE, *LINEAR, *NORMS, *ATTENTION, *MLP, *STREAMS, *ROUNDING]
