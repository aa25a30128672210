"""All decoder layers of a few tokens, as one kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.types import Namespace
from llama_layers.backends.numba import kernels
from llama_layers.backends.numba.kernel_dtypes import readable, ready
from llama_layers.backends.numba.sizes import MAX_DECODE_TOKENS, ROWS
from llama_layers.backends.numba.threadpool import THREADS, num_threads
from llama_layers.backends.trust import takes
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.config.rope_layers import RopeKind
from llama_layers.layers.cache import KVCache
from llama_layers.layers.mask import Mask, mask_rows
from llama_layers.layers.tap import TapFunction, untouched
from llama_layers.layers.weights import LayerWeights, known_arrays, layer_fits
from llama_layers.model.llama import Llama
from llama_layers.model.weights import LlamaWeights

# The switches of a config that the kernel knows; a layer with other arrays is left to others.
SWITCHES = ("norms_before", "qkv_bias", "o_bias", "mlp_bias")


class Plan:
    """The addresses of all layers' weights, in one format, of the sizes that a config says."""

    def __init__(self, layers: tuple[LayerWeights, ...], config: LlamaConfig) -> None:
        self.layers, self.config = layers, config
        self.kind: int | None = None
        # The kernel reads and writes as much memory as the config says.
        if config.switches or not all(layer_fits(layer, config) for layer in layers):
            return
        arrays: list[list[Any]] = []
        for layer in layers:
            if (row := known_arrays(layer, SWITCHES)) is None:
                return
            arrays.append(row)
        present = [a for row in arrays for a in row if a is not None]
        kinds = {readable(a) if a.flags.c_contiguous else None for a in present}
        if len(kinds) == 1 and min(a.shape[0] for a in present if a.ndim == 2) >= ROWS:
            self.kind = kinds.pop()
        self.addresses = np.array([[0 if a is None else a.ctypes.data for a in r] for r in arrays])
        # While these are there, nobody can give the memory at the addresses another size.
        self._views = [a.view() for a in present]
        self._last: tuple[list[ref[np.ndarray]], NDArray[np.int64]] = ([], np.empty((0, 2), int))

    def is_for(self, layers: tuple[LayerWeights, ...], config: LlamaConfig) -> bool:
        """Whether these are the layers, and the config, that the plan was made for."""
        same = self.config == config and len(self.layers) == len(layers)
        return same and all(a is b for a, b in zip(self.layers, layers, strict=True))

    def caches(self, cache: KVCache) -> NDArray[np.int64] | None:
        """Addresses of each layer's keys and values; None unless they lie in the kernel's order.

        They are the same from token to token, and asking for the addresses takes longer than
        seeing that. The memory order is looked at each time, since it can be changed in place;
        `forward` has looked at the shapes.
        """
        layers = zip(cache.keys, cache.values, strict=True)
        arrays: list[Any] = [array for pair in layers for array in pair]
        if not all(a.flags.carray and a.dtype == np.float32 for a in arrays):
            return None
        buffers, found = self._last
        if len(arrays) != len(buffers) or any(
            known() is not array for known, array in zip(buffers, arrays, strict=True)
        ):
            found = np.array([a.ctypes.data for a in arrays]).reshape(-1, 2)
            self._last = ([ref(array) for array in arrays], found)
        return found


_PLANS: WeakKeyDictionary[LlamaWeights, Plan] = WeakKeyDictionary()


def _plan(model: Llama) -> Plan:
    """The plan for a model, made once, and again if a layer was replaced."""
    layers = tuple(model.weights.layers)
    plan = _PLANS.get(model.weights)
    if plan is None or not plan.is_for(layers, model.config):
        plan = _PLANS[model.weights] = Plan(layers, model.config)
    return plan


def _fitted(
    model: Llama, x: np.ndarray, cache: KVCache | None, tap: TapFunction
) -> tuple[Plan, NDArray[np.int64]] | None:
    """The plan and the places of the cache, if the kernel takes all layers."""
    config = model.config
    few = 0 < x.shape[0] * x.shape[1] <= MAX_DECODE_TOKENS and x.dtype == np.float32
    if cache is None or tap is not untouched or not few:
        return None
    plan = _plan(model)
    if plan.kind is None or x.shape[2] != config.hidden_size:
        return None
    caches = plan.caches(cache)
    return None if caches is None else (plan, caches)


@takes(lambda xp, x, model, ropes, masks, cache, tap: _fitted(model, x, cache, tap) is not None)
def decoder_layers(
    xp: Namespace,
    x: np.ndarray,
    model: Llama,
    ropes: Mapping[RopeKind | None, tuple[np.ndarray, ...] | None],
    masks: Mapping[int | None, Mask | np.ndarray],
    cache: KVCache | None,
    tap: TapFunction,
) -> tuple[np.ndarray, KVCache | None]:
    """The definition's result, by one kernel for all layers."""
    found = _fitted(model, x, cache, tap)
    assert found is not None  # or it is not taken
    assert cache is not None
    plan, caches = found
    (rope,) = ropes.values()  # layers differ only by switches
    assert rope is not None
    cos, sin = rope
    return _run(x, model.config, plan, (cos, sin), masks, cache, caches), cache


def _run(
    x: np.ndarray,
    config: LlamaConfig,
    plan: Plan,
    rope: tuple[np.ndarray, np.ndarray],
    masks: Mapping[int | None, Mask | np.ndarray],
    cache: KVCache,
    caches: NDArray[np.int64],
) -> np.ndarray:
    batch, seq, hidden = x.shape
    tokens, size = batch * seq, num_threads()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width, half = config.head_dim, config.head_dim // 2
    windows = list(masks)
    rows: list[Any] = [mask_rows(np, masks[w], 0, seq) for w in windows]
    visible = rows[0].shape[-1]
    allowed = np.stack([np.broadcast_to(r, (batch, seq, visible)) for r in rows]).reshape(
        len(windows), tokens, visible
    )
    cos, sin = (np.broadcast_to(t, (batch, seq, half)).reshape(tokens, half) for t in rope)
    assert plan.kind is not None  # or the plan is for nothing
    inputs = kernels.decode.Inputs(
        dtype=plan.kind,
        weights=plan.addresses,
        caches=caches,
        capacity=cache.capacity,
        length=int(cache.length) - seq,
        seq=seq,
        eps=np.float32(config.rms_norm_eps),
        scale=np.float32(1 / math.sqrt(width)),
        cos=ready(cos, np.float32),
        sin=ready(sin, np.float32),
        allowed=ready(allowed, np.bool_).view(np.uint8),
        mask_of=np.array([windows.index(config.window_of(i)) for i in range(len(plan.layers))]),
    )
    scratch = kernels.decode.scratch(
        size, tokens, hidden, config.intermediate_size, heads, kv_heads, width, visible
    )
    y = np.array(x.reshape(tokens, hidden), order="C")
    sync = np.zeros(2, np.int64)  # how many threads have come, and whether one never will
    THREADS.run(size, kernels.decode.layers, sync, inputs, y, scratch, stop=sync)
    return y.reshape(x.shape)
