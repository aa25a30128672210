"""Mistakes in products with a matrix."""

from __future__ import annotations

import numpy as np

from tests.support.mistakes.mistake import (
    DOWN,
    GATE,
    OUT,
    UP,
    K,
    Mistake,
    Q,
    V,
)
from tests.support.ported import COUNT


def _linear(p, weight, x=None, bias=None):
    x = p["input_layernorm"] if x is None else x
    return x @ weight.T + (p.own_bias if bias is None else bias)


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


def _woven_split_by_halves(half):
    """Rows of gate and up in turn, taken for those of gate above those of up."""

    def wrong(p):
        gate, up = p.weight(GATE), p.weight(UP)
        rows = [row for pair in zip(gate, up, strict=True) for row in pair]
        first = half * len(gate)
        return _linear(p, np.array(rows[first : first + len(gate)]), p["post_attention_layernorm"])

    return wrong


def _halves_split_in_turn(half):
    def wrong(p):
        rows = [*p.weight(GATE), *p.weight(UP)]
        return _linear(p, np.array(rows[half::2]), p["post_attention_layernorm"])

    return wrong


def _wrong_biases(p):
    q, k, v = (p.bias(f"self_attn.{n}_proj") for n in "qkv")
    return _linear(p, p.weight("self_attn.q_proj"), bias=np.concatenate([v, k, q])[: len(q)])


_SPLIT = "joined matrix split in another order"
MISTAKES = [
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
    Mistake("bias missing", K, lambda p: _linear(p, p.weight(K), bias=0), "biases"),
    Mistake(
        "bias missing",
        DOWN,
        lambda p: _linear(p, p.weight(DOWN), p["mlp.act"], bias=0),
        "biases of the MLP",
    ),
    Mistake(
        "bias added twice",
        K,
        lambda p: _linear(p, p.weight(K), bias=2 * p.bias(K)),
        "biases",
    ),
    Mistake("another projection's bias", Q, _wrong_biases, "biases"),
    Mistake("RoPE permutation left in", Q, _rows(Q, _permute, 4)),
    Mistake("RoPE permutation left in", K, _rows(K, _permute, 2)),
    Mistake("values permuted as for RoPE", V, _rows(V, _permute, 2)),
    Mistake("RoPE permutation undone twice", Q, _rows(Q, _unpermute, 4)),
    Mistake(
        "RoPE permutation with the wrong head count",
        K,
        lambda p: _linear(p, _unpermute(_permute(p.weight(K), 2), 4)),
    ),
    Mistake("channels before heads", Q, lambda p: _heads_first(p.right)),
    Mistake("heads in reverse order", Q, lambda p: p.right.reshape(2, COUNT, 4, 8)[:, :, ::-1]),
    Mistake(_SPLIT, Q, _split_otherwise),
    Mistake(_SPLIT, GATE, _woven_split_by_halves(0)),
    Mistake(_SPLIT, UP, _woven_split_by_halves(1)),
    Mistake(_SPLIT, GATE, _halves_split_in_turn(0)),
    Mistake(_SPLIT, UP, _halves_split_in_turn(1)),
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
    Mistake(
        "heads side by side in another order",
        OUT,
        lambda p: _linear(
            p, p.weight(OUT), p["self_attn.attention"].swapaxes(1, 2).reshape(2, COUNT, 32)
        ),
    ),
    Mistake("another layer's weights", V, lambda p: _linear(p, p.weight(V, 2), bias=p.bias(V, 2))),
    Mistake(
        "another layer's weights",
        DOWN,
        lambda p: _linear(p, p.weight(DOWN, 0), p["mlp.act"], p.bias(DOWN, 0)),
    ),
    Mistake(
        "an input channel left out",
        Q,
        lambda p: _linear(p, p.weight(Q)[:, :-1], p["input_layernorm"][..., :-1]),
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
