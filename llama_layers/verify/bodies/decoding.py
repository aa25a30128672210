"""Whole models through the bodies that take all layers, or all of a step, at once.

No derived bound exists for a whole model: layer by layer its worst case grows beyond all use. So
the error allowed is a multiple of the definition's own in the same formats, against the same pass
in float64: 4 times its largest, since another order of summation moves an error by no more than a
few times its size, and 8 roundings of the largest logit, for where it is near zero by chance. Wrong
masks, positions or weights are off by many times that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.backends.dispatch import Body, only, taken
from llama_layers.backends.dtypes import FLOATS, dtype_name
from llama_layers.backends.transfer import to_numpy
from llama_layers.cache import KVCache
from llama_layers.config import LlamaConfig
from llama_layers.generation import generate
from llama_layers.llama import Llama
from llama_layers.model import forward
from llama_layers.verify.bodies.operations import DTYPES
from llama_layers.verify.bodies.place import Place, Seen
from llama_layers.weights import (
    AttentionWeights,
    LayerWeights,
    LlamaWeights,
    MLPWeights,
    QKVWeights,
)

Move = Callable[[NDArray[Any]], Any]

# Biases, groups of three heads, a window on one layer; sizes that fill vectors of 8.
EVEN = LlamaConfig(
    vocab_size=19,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-4,
    rope_theta=100.0,
    max_position_embeddings=512,
    attention_bias=True,
    mlp_bias=True,
    sliding_window=4,
    layer_types=("sliding_attention", "full_attention"),
)
# Sizes that fill nothing.
ODD = replace(
    EVEN,
    hidden_size=22,
    intermediate_size=27,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=6,
    attention_bias=False,
    mlp_bias=False,
    sliding_window=None,
    layer_types=None,
)
ALLOWED, ROUNDINGS = 4, 8


@dataclass(frozen=True)
class Feed:
    """Tokens, and after how many of them each part of them ends."""

    ids: NDArray[Any]
    cuts: tuple[int, ...]
    keep: NDArray[np.bool_] | None = None


def _feed(batch: int, count: int, cuts: tuple[int, ...], padded: bool) -> Feed:
    ids = np.random.default_rng(0).integers(0, EVEN.vocab_size, (batch, count))
    starts = 3 * np.arange(batch)[:, None]
    return Feed(ids, (*cuts, count), np.arange(count) >= starts if padded else None)


STEPS = (5, 8, 9, 10, 11)
SHORT, PADDED = _feed(3, 12, STEPS, False), _feed(2, 12, STEPS, True)
# More keys than a piece of attention holds, of any body.
LONG = _feed(1, 261, (256, 257, 258, 260), False)


def decoder_layers(body: Body, place: Place) -> Iterator[Seen]:
    """A few tokens at a time after others, in every format of the weights."""
    for name, config, feed in (
        ("float32", EVEN, PADDED),
        ("bfloat16", EVEN, PADDED),
        ("float16", EVEN, PADDED),
        ("float32", ODD, SHORT),
        ("float32", EVEN, LONG),
    ):
        label = f"{name}, {feed.ids.shape[0]} sequences of {feed.ids.shape[1]} tokens"
        found = _layers_seen(body, _Model(config, name, place), feed, label)
        if found is not None:
            yield found
    found = _layers_seen(body, _Model(EVEN, "float32", place, 1e25), SHORT, "scores that overflow")
    if found is not None:
        yield found


class _Model:
    """A random model in its formats, where a body is tried and in main memory, and in float64."""

    def __init__(self, config: LlamaConfig, name: str, place: Place, scale: float = 1.0) -> None:
        self.place = place
        numbers = _numbers(config, DTYPES[name])
        for layer in numbers.layers:
            layer.self_attn.qkv.fused[...] *= np.float32(scale)
        # NumPy computes in float32 whatever the layers are stored in, and CuPy in one format.
        if place.xp is np:
            table = numbers.embed_tokens.astype(np.float32)
            numbers = replace(numbers, embed_tokens=table)
        self.plain = Llama(config, numbers)
        self.there = Llama(config, _mapped(numbers, place.array))
        self.exact = Llama(config, _mapped(numbers, lambda array: array.astype(np.float64)))


def _layers_seen(body: Body, model: _Model, feed: Feed, label: str) -> Seen | None:
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return body(*arguments)

    vars(counted)["takes"] = lambda *arguments: taken(body, *arguments)
    computed = _logits(model.there, feed, model.place.array, {"decoder_layers": counted})
    if not calls:
        return None
    alone, exact = (_logits(one, feed, _same, {}) for one in (model.plain, model.exact))
    kept = np.ones(feed.ids.shape, bool) if feed.keep is None else feed.keep
    computed, alone, exact = (a[kept] for a in (computed, alone, exact))
    if not np.array_equal(np.isfinite(computed), np.isfinite(alone)):
        return Seen(label, math.inf, f"NaN or infinity is not where it should be ({label})")
    finite = np.isfinite(alone) & np.isfinite(exact)
    off = abs(computed[finite].astype(np.float64) - exact[finite])
    if not off.size:
        return Seen(label, 0.0)
    return Seen(label, float(off.max() / _allowed(alone[finite], exact[finite])))


def _allowed(alone: NDArray[Any], exact: NDArray[Any]) -> float:
    u = FLOATS[dtype_name(alone.dtype)].unit_roundoff
    own = abs(alone.astype(np.float64) - exact).max()
    return float(ALLOWED * own + ROUNDINGS * u * abs(exact).max())


def drawn_tokens(body: Body, place: Place) -> Iterator[Seen]:
    """Tokens that follow a prompt, the likeliest and drawn ones.

    Each is to be the one that exact logits after the tokens before it give, or one that errors
    within what is allowed of the logits could make of it.
    """
    count = 6
    for name in ("float32", "bfloat16", "float16"):
        model = _Model(EVEN, name, place)
        for temperature in (0.0, 0.8):
            prompts = SHORT.ids[:, :4]
            with only({"drawn_tokens": body}):
                steps = generate(
                    model.there, place.array(prompts), max_new_tokens=count,
                    temperature=temperature, rng=7, eos_token_id=(),
                )  # fmt: skip
                drawn = np.stack([to_numpy(step) for step in steps], axis=1)
            label = f"{name}, temperature {temperature:g}"
            if not ((drawn >= 0) & (drawn < EVEN.vocab_size)).all():
                yield Seen(label, math.inf, f"it draws what is no token ({label})")
                continue
            feed = Feed(
                np.concatenate([prompts, drawn[:, :-1]], axis=1), (prompts.shape[1] + count - 1,)
            )
            alone, exact = (_logits(one, feed, _same, {}) for one in (model.plain, model.exact))
            off = _allowed(alone, exact)
            exact = exact[:, prompts.shape[1] - 1 :]
            if temperature == 0:
                chosen = np.take_along_axis(exact, drawn[..., None], axis=-1)[..., 0]
                ratio = (exact.max(axis=-1) - chosen).max() / (2 * off)
            else:
                ratio = _beyond_share(exact / temperature, drawn, 2 * off / temperature)
            yield Seen(label, float(ratio))


def _beyond_share(scaled: NDArray[Any], drawn: NDArray[Any], off: float) -> float:
    """How far uniform numbers are outside their tokens' shares, over what moves the shares."""
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    ends = np.cumsum(weights, axis=-1) / weights.sum(axis=-1, keepdims=True)
    uniforms = np.random.default_rng(7).random(drawn.shape[::-1]).T
    end = np.take_along_axis(ends, drawn[..., None], axis=-1)[..., 0]
    shares = weights / weights.sum(axis=-1, keepdims=True)
    begin = end - np.take_along_axis(shares, drawn[..., None], axis=-1)[..., 0]
    outside = np.maximum(begin - uniforms, uniforms - end)
    return float(max(0.0, outside.max()) / math.expm1(off))


def _logits(model: Llama, feed: Feed, move: Move, bodies: dict[str, Body]) -> NDArray[Any]:
    """The logits [B, S, vocab_size] of all tokens, by some bodies and the definitions."""
    cache = KVCache.create(model, *feed.ids.shape, like=model.weights.embed_tokens)
    parts, start = [], 0
    with only(bodies):
        for stop in feed.cuts:
            keep = None if feed.keep is None else move(feed.keep[:, start:stop])
            output = forward(model, move(feed.ids[:, start:stop]), cache=cache, attention_mask=keep)
            assert output.cache is not None
            cache, start = output.cache, stop
            parts.append(to_numpy(output.logits))
    return np.concatenate(parts, axis=1)


def _same(array: NDArray[Any]) -> NDArray[Any]:
    return array


def _numbers(config: LlamaConfig, dtype: np.dtype[Any]) -> LlamaWeights:
    """Matrices that keep a row's size, and norms and biases that make a difference."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        return (rng.standard_normal((rows, columns)) / math.sqrt(columns)).astype(dtype)

    def norm() -> NDArray[Any]:
        return (1 + rng.standard_normal(hidden) / 4).astype(dtype)

    def bias(there: bool, rows: int) -> NDArray[Any] | None:
        return rng.standard_normal(rows).astype(dtype) if there else None

    hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rows = (heads + 2 * kv_heads) * width

    def layer() -> LayerWeights:
        attention, mlp = config.attention_bias, config.mlp_bias
        return LayerWeights(
            norm(),
            AttentionWeights(
                QKVWeights(matrix(rows, hidden), heads, kv_heads, bias(attention, rows)),
                matrix(hidden, heads * width),
                bias(attention, hidden),
            ),
            norm(),
            MLPWeights(
                matrix(inner, hidden), matrix(inner, hidden), matrix(hidden, inner),
                bias(mlp, inner), bias(mlp, inner), bias(mlp, hidden),
            ),
        )  # fmt: skip

    table = rng.standard_normal((config.vocab_size, hidden)).astype(dtype)
    layers = [layer() for _ in range(config.num_hidden_layers)]
    return LlamaWeights(table, layers, norm(), matrix(config.vocab_size, hidden))


def _mapped(weights: LlamaWeights, move: Move) -> LlamaWeights:
    """The same numbers elsewhere, or in another format."""

    def moved(array: Any | None) -> Any | None:
        return None if array is None else move(array)

    def layer(w: LayerWeights) -> LayerWeights:
        attention, mlp = w.self_attn, w.mlp
        qkv = attention.qkv
        return LayerWeights(
            move(w.input_layernorm),
            AttentionWeights(
                QKVWeights(move(qkv.fused), qkv.num_heads, qkv.num_kv_heads, moved(qkv.bias)),
                move(attention.o_proj),
                moved(attention.o_bias),
            ),
            move(w.post_attention_layernorm),
            MLPWeights(
                move(mlp.gate_proj), move(mlp.up_proj), move(mlp.down_proj),
                moved(mlp.gate_bias), moved(mlp.up_bias), moved(mlp.down_bias),
            ),
        )  # fmt: skip

    return LlamaWeights(
        move(weights.embed_tokens), [layer(w) for w in weights.layers], move(weights.norm),
        move(weights.lm_head),
    )  # fmt: skip
