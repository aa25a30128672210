"""One token for each of a few sequences, through all layers, as one captured CUDA graph.

A layer takes nine launches, and Python needs longer to launch a kernel than a GPU to run one on so
little. So the launches are recorded once for each cache, with the addresses of memory that is
taken once, and then replayed: what differs from token to token lies on the device. No token
allocates or is compiled anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.types import Namespace
from llama_layers.backends.cupy import launch
from llama_layers.backends.cupy.compile import FORMATS
from llama_layers.backends.libraries import CupyArray, cupy
from llama_layers.backends.trust import takes
from llama_layers.config.rope_layers import RopeKind
from llama_layers.layers.cache import KVCache
from llama_layers.layers.mask import Mask
from llama_layers.layers.tap import TapFunction, untouched
from llama_layers.layers.weights import known_arrays, layer_fits
from llama_layers.model.llama import Llama
from llama_layers.model.weights import LlamaWeights

# The switches of a config that the kernels know; a layer with other arrays is left to others.
SWITCHES = ("norms_before", "qkv_bias", "o_bias", "mlp_bias")


class Step:
    """The layers on one token for each sequence of a cache, and memory for all between them."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        xp = cupy()
        self.config = config = model.config
        self.layers = tuple(model.weights.layers)
        self.cache = [ref(array) for array in _arrays(cache)]
        sequences, capacity, kv_heads, width = cache.keys[0].shape
        heads, hidden = config.num_attention_heads, config.hidden_size

        def empty(columns: int) -> CupyArray:
            return xp.empty((sequences, columns), dtype=cache.keys[0].dtype)

        self.x, self.normed = empty(hidden), empty(hidden)
        self.qkv, self.q = empty((heads + 2 * kv_heads) * width), empty(heads * width)
        self.weighed = empty(heads * width)
        self.gated = empty(self.layers[0].mlp.gate_proj.shape[0])
        self.scratch = launch.attend_scratch(sequences, heads, width, capacity)
        # Tokens in the cache before this one; a row of cosines and sines for each sequence.
        self.length = xp.zeros((1,), dtype=xp.int32)
        self.rows = xp.arange(sequences, dtype=xp.int32)

    def is_for(self, model: Llama, cache: KVCache) -> bool:
        """Whether the recorded addresses are those of this model and this cache."""
        arrays = _arrays(cache)
        return (
            len(arrays) == len(self.cache)
            and all(known() is array for known, array in zip(self.cache, arrays, strict=True))
            and all(a is b for a, b in zip(self.layers, model.weights.layers, strict=True))
        )

    def launch_layers(self, cos: CupyArray, sin: CupyArray) -> None:
        """Give the current stream all kernels from x, as it was embedded, to x after the layers."""
        count = len(self.layers)
        arrays = [known() for known in self.cache]
        keep = arrays[2 * count] if len(arrays) > 2 * count else None
        for index, layer in enumerate(self.layers):
            attention, mlp = layer.self_attn, layer.mlp
            keys, values = arrays[index], arrays[count + index]
            eps = self.config.rms_norm_eps
            launch.norm(self.x, layer.input_layernorm, self.normed, eps)
            launch.gemv(self.normed, attention.qkv.fused, self.qkv, bias=attention.qkv.bias)
            launch.rope_cache(self.qkv, cos, sin, self.rows, self.length, keys, values, self.q)
            launch.attend(
                self.q, keys, values, self.length, self.weighed, self.scratch,
                window=self.config.window_of(index), keep=keep,
            )  # fmt: skip
            launch.gemv(
                self.weighed, attention.o_proj, self.x, bias=attention.o_bias, residual=self.x
            )
            launch.norm(self.x, layer.post_attention_layernorm, self.normed, eps)
            launch.gemv_swiglu(
                self.normed, mlp.gate_proj, mlp.up_proj, self.gated,
                gate_bias=mlp.gate_bias, up_bias=mlp.up_bias,
            )  # fmt: skip
            launch.gemv(self.gated, mlp.down_proj, self.x, bias=mlp.down_bias, residual=self.x)


class LayersStep(Step):
    """The part of `forward` that a graph takes over: from the embeddings to after the layers."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        xp = cupy()
        super().__init__(model, cache)
        shape = (self.x.shape[0], model.config.head_dim // 2)
        self.cos, self.sin = (xp.empty(shape, dtype=xp.float32) for _ in range(2))
        self.replay = Replay(lambda: self.launch_layers(self.cos, self.sin))

    def run(self, x: CupyArray, rope: tuple[CupyArray, CupyArray], length: int) -> CupyArray:
        """The layers on x [B, 1, H], tokens that come after `length` others."""
        self.x[...] = x.reshape(self.x.shape)
        for own, given in zip((self.cos, self.sin), rope, strict=True):
            own[...] = given.reshape(-1, own.shape[1])
        self.length.fill(length)
        self.replay()
        return self.x.reshape(x.shape).copy()


class Replay:
    """Launches, run by Python the first time and then as a graph.

    The first time compiles and loads the kernels, which cannot happen while a stream captures.
    """

    def __init__(self, launches: Callable[[], None]) -> None:
        self._launches: Callable[[], None] | None = launches
        self._graph: Any = None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.launch()
            return
        assert self._launches is not None
        self._launches()
        self._graph = _captured(self._launches)
        self._launches = None  # whose memory this is a part of, so that both can go at once


def _captured(launches: Callable[[], None]) -> Any:
    """Launches as a graph, which is not run."""
    with cupy().cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            launches()
        finally:
            graph = stream.end_capture()
    return graph


def _taken(
    x: CupyArray,
    model: Llama,
    masks: Mapping[int | None, Mask | CupyArray],
    cache: KVCache | None,
    tap: TapFunction,
) -> bool:
    """Whether a graph can do it; once there is one, only its addresses are looked at."""
    one_each = x.shape[1] == 1
    if cache is None or tap is not untouched or not one_each:
        return False
    if not all(isinstance(mask, Mask) for mask in masks.values()):  # not those of the cache
        return False
    return _known(LayersStep, model, cache) is not None or fits(model, cache)


@takes(lambda xp, x, model, ropes, masks, cache, tap: _taken(x, model, masks, cache, tap))
def decoder_layers(
    xp: Namespace,
    x: CupyArray,
    model: Llama,
    ropes: Mapping[RopeKind | None, tuple[CupyArray, ...] | None],
    masks: Mapping[int | None, Mask | CupyArray],
    cache: KVCache | None,
    tap: TapFunction,
) -> tuple[CupyArray, KVCache | None]:
    """The definition's result, by one graph for all layers."""
    assert cache is not None  # or it is not taken
    (rope,) = ropes.values()  # layers differ only by switches
    assert rope is not None
    cos, sin = rope
    step = step_for(LayersStep, model, cache)
    return step.run(x, (cos, sin), int(cache.length) - 1), cache


S = TypeVar("S", bound=Step)
_STEPS: WeakKeyDictionary[LlamaWeights, list[Step]] = WeakKeyDictionary()


def step_for(kind: type[S], model: Llama, cache: KVCache) -> S:
    """The step that was recorded for a cache, or a new one."""
    if (found := _known(kind, model, cache)) is not None:
        return found
    known = _STEPS.setdefault(model.weights, [])
    known[:] = [step for step in known if all(array() is not None for array in step.cache)]
    known.append(step := kind(model, cache))
    return step


def _known(kind: type[S], model: Llama, cache: KVCache) -> S | None:
    for step in _STEPS.get(model.weights, ()):
        if type(step) is kind and step.is_for(model, cache):
            return step
    return None


def fits(model: Llama, cache: KVCache) -> bool:
    """Whether the kernels take a model's layers and a cache: what they are, not what they hold."""
    config, layers = model.config, model.weights.layers
    expected = (config.num_key_value_heads, config.head_dim)
    shapes = {array.shape for array in (*cache.keys, *cache.values)}
    if (
        not 0 < cache.keys[0].shape[0] <= launch.MAX_TOKENS
        or {(cache.keys[0].shape[0], cache.capacity, *expected)} != shapes
        or config.switches
        or not all(layer_fits(layer, config) for layer in layers)
    ):
        return False
    arrays = [*_arrays(cache)]
    for layer in layers:
        if (weights := known_arrays(layer, SWITCHES)) is None:
            return False
        arrays += [array for array in weights if array is not None]
    kinds = {dtype_name(array.dtype) for array in arrays if array is not cache.keep}
    contiguous = all(array.flags.c_contiguous for array in arrays)
    return len(kinds) == 1 and kinds.pop() in FORMATS and contiguous


def _arrays(cache: KVCache) -> tuple[CupyArray, ...]:
    """The arrays of a cache whose addresses a graph knows."""
    return (*cache.keys, *cache.values, *(() if cache.keep is None else (cache.keep,)))
