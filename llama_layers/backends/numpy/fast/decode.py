"""All decoder layers of a few tokens, as one kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
from numpy.typing import NDArray

from llama_layers.backends.dispatch import takes
from llama_layers.backends.numpy.fast.formats import CHUNK, MOST, ROWS, kind_of
from llama_layers.backends.numpy.fast.team import TEAM, threads
from llama_layers.cache import KVCache
from llama_layers.config import LlamaConfig
from llama_layers.llama import Llama
from llama_layers.mask import Mask
from llama_layers.tap import Tap, untouched
from llama_layers.weights import LayerWeights, LlamaWeights


class Plan:
    """Where the weights of all layers are, in one format."""

    def __init__(self, layers: tuple[LayerWeights, ...]) -> None:
        self.layers = layers
        arrays = [_arrays(layer) for layer in layers]
        present = [a for row in arrays for a in row if a is not None]
        kinds = {kind_of(a.dtype) for a in present}
        rows = [w.shape[0] for row in arrays for w in row if w is not None and w.ndim == 2]
        self.kind = kinds.pop() if len(kinds) == 1 else None
        if min(rows, default=0) < ROWS or not all(a.flags.c_contiguous for a in present):
            self.kind = None
        # The kernel reads as much memory as the first layer and its heads say.
        sizes = [_sizes(layer, row) for layer, row in zip(layers, arrays, strict=True)]
        if any(size != sizes[0] for size in sizes):
            self.kind = None
        self.addresses = np.array([[0 if a is None else a.ctypes.data for a in r] for r in arrays])
        self._last: tuple[list[ref[NDArray[Any]]], NDArray[np.int64] | None] = ([], None)

    def caches(self, cache: KVCache) -> NDArray[np.int64] | None:
        """Where the keys and values of each layer are; None if they are not in the kernel's order.

        They are the same from token to token, and to ask for so many addresses takes longer than
        to see that.
        """
        arrays = [array for pair in zip(cache.keys, cache.values, strict=True) for array in pair]
        buffers, found = self._last
        if len(arrays) != len(buffers) or any(
            known() is not array for known, array in zip(buffers, arrays, strict=True)
        ):
            usable = all(a.flags.c_contiguous and a.flags.writeable for a in arrays)
            addresses = np.array([a.ctypes.data for a in arrays]).reshape(-1, 2)
            found = addresses if usable else None
            self._last = ([ref(array) for array in arrays], found)
        return found


def _arrays(w: LayerWeights) -> tuple[NDArray[Any] | None, ...]:
    """In the order in which the kernel takes them."""
    attention, mlp = w.self_attn, w.mlp
    return (
        w.input_layernorm,
        attention.qkv.fused,
        attention.qkv.bias,
        attention.o_proj,
        attention.o_bias,
        w.post_attention_layernorm,
        mlp.gate_proj,
        mlp.gate_bias,
        mlp.up_proj,
        mlp.up_bias,
        mlp.down_proj,
        mlp.down_bias,
    )


def _sizes(w: LayerWeights, arrays: tuple[NDArray[Any] | None, ...]) -> tuple[Any, ...]:
    """Heads, and the shapes of all that every layer has."""
    qkv = w.self_attn.qkv
    found = [a.shape for a in arrays if a is not None and a.ndim == 2]
    return qkv.num_heads, qkv.num_kv_heads, w.input_layernorm.shape, *found


_PLANS: WeakKeyDictionary[LlamaWeights, Plan] = WeakKeyDictionary()


def _plan(weights: LlamaWeights) -> Plan:
    """The plan for a model's weights, made once, and again if a layer was exchanged."""
    plan = _PLANS.get(weights)
    if plan is None or any(a is not b for a, b in zip(plan.layers, weights.layers, strict=True)):
        plan = _PLANS[weights] = Plan(tuple(weights.layers))
    return plan


def _fitted(
    model: Llama, x: NDArray[Any], cache: KVCache | None, tap: Tap
) -> tuple[Plan, NDArray[np.int64]] | None:
    """The plan and the places of the cache, if the kernel takes all layers."""
    config = model.config
    few = 0 < x.shape[0] * x.shape[1] <= MOST and x.dtype == np.float32
    if cache is None or tap is not untouched or not few:
        return None
    plan = _plan(model.weights)
    qkv = plan.layers[0].self_attn.qkv
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    same = (qkv.num_heads, qkv.num_kv_heads, qkv.head_dim) == heads
    if plan.kind is None or not same or qkv.hidden_size != x.shape[2]:
        return None
    caches = plan.caches(cache)
    return None if caches is None else (plan, caches)


def _taken(
    xp: Any,
    x: NDArray[Any],
    model: Llama,
    rope: tuple[Any, Any],
    masks: Mapping[int | None, Mask],
    cache: KVCache | None,
    tap: Tap,
) -> bool:
    return _fitted(model, x, cache, tap) is not None


@takes(_taken)
def decoder_layers(
    xp: Any,
    x: NDArray[Any],
    model: Llama,
    rope: tuple[Any, Any],
    masks: Mapping[int | None, Mask],
    cache: KVCache | None,
    tap: Tap,
) -> tuple[NDArray[Any], KVCache | None]:
    """The definition's result, by one kernel for all layers."""
    found = _fitted(model, x, cache, tap)
    assert found is not None  # or it is not taken
    assert cache is not None
    plan, caches = found
    return _run(x, model.config, plan, rope, masks, cache, caches), cache


def _run(
    x: NDArray[Any],
    config: LlamaConfig,
    plan: Plan,
    rope: tuple[Any, Any],
    masks: Mapping[int | None, Mask],
    cache: KVCache,
    caches: NDArray[np.int64],
) -> NDArray[Any]:
    from llama_layers.backends.numpy.fast import kernels  # loads numba, which takes a while

    batch, seq, hidden = x.shape
    tokens, size = batch * seq, threads()
    heads, kv_heads, width = (
        config.num_attention_heads, config.num_key_value_heads, config.head_dim,
    )  # fmt: skip
    windows = list(masks)
    visible = masks[windows[0]].keys.shape[0]
    allowed = np.stack(
        [np.broadcast_to(masks[w].rows(0, seq), (batch, seq, visible)) for w in windows]
    ).reshape(len(windows), tokens, visible)
    mask_of = np.array([windows.index(config.window_of(i)) for i in range(len(plan.layers))])
    cos, sin = (
        np.broadcast_to(t, (batch, seq, width // 2)).reshape(tokens, width // 2) for t in rope
    )
    chunks = -(-visible // CHUNK)
    inner = plan.layers[0].mlp.gate_proj.shape[0]
    qkv = (heads + 2 * kv_heads) * width

    def empty(*shape: int) -> NDArray[Any]:
        return np.empty(shape, np.float32)

    y = np.array(x.reshape(tokens, hidden), order="C")
    sync = np.zeros(2, np.int64)  # how many have come, and whether one never will
    TEAM.run(
        size, kernels.layers, sync, plan.kind, plan.addresses, caches,
        cache.capacity, int(cache.length) - seq, seq, np.float32(config.rms_norm_eps),
        np.float32(1 / math.sqrt(width)), np.ascontiguousarray(cos), np.ascontiguousarray(sin),
        allowed.view(np.uint8), mask_of, y, empty(size, max(hidden, inner, qkv)),
        empty(size, tokens, hidden), empty(tokens, qkv), empty(tokens, chunks, heads, width),
        empty(tokens, chunks, heads, 2), empty(size, heads // kv_heads, CHUNK),
        empty(size, tokens, heads * width), empty(tokens, hidden), empty(tokens, inner),
        empty(tokens, inner), stop=sync,
    )  # fmt: skip
    return y.reshape(x.shape)
