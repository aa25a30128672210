"""Time bodies against their definitions, on a prompt of a small model."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from llama_layers.arrays.dispatch import Function, definitions, only
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.transfer import from_numpy
from llama_layers.arrays.types import Array, Namespace
from llama_layers.backends.libraries import cupy
from llama_layers.backends.trust import Body
from llama_layers.bench.models import RandomWeights
from llama_layers.config.llama_config import LlamaConfig, with_layers
from llama_layers.layers.cache import KVCache
from llama_layers.layers.mask import Mask
from llama_layers.layers.rope import rope_table
from llama_layers.model.forward import forward
from llama_layers.model.generate import generate

CONFIG = with_layers(LlamaConfig.smollm2_135m(), 4)
TOKENS = (512, 4)
"""Tokens of the prompt; the smaller number for bodies that take few tokens only."""
ROUNDS = 5


def times_as_fast(body: Body) -> float | None:
    """Divide the time of a definition by that of its body: the best of a few rounds in turns.

    Returns None for a body that does something other than its definition.
    """
    if body.name == "activations":  # the definition leaves embeddings as they are
        return None
    dtype = "float32" if body.library == "numpy" else "bfloat16"
    whole = body.name in ("decoder_layers", "decode_loop")
    pair = _decoding(body, dtype) if whole else _operation(body, dtype)
    if pair is None:
        return None
    best = [math.inf, math.inf]
    wait = _waiting(body.library)
    for round_ in range(1 + ROUNDS):  # the first warms up
        for index, call in enumerate(pair):
            wait()
            start = time.perf_counter()
            call()
            wait()
            if round_:
                best[index] = min(best[index], time.perf_counter() - start)
    return best[1] / best[0]


def _waiting(library: str) -> Callable[[], object]:
    if library != "cupy":
        return lambda: None
    return cupy().cuda.Device().synchronize


Pair = tuple[Callable[[], object], Callable[[], object]]


def _operation(body: Body, dtype: str) -> Pair | None:
    xp = namespace(like=importlib.import_module(body.library).empty(0))
    for tokens in TOKENS:
        arguments = (xp, *_inputs(xp, dtype, tokens)[body.name])
        if body.function(*arguments) is not NotImplemented:
            return partial(body.function, *arguments), partial(definitions[body.name], *arguments)
    return None


def _inputs(xp: Namespace, dtype: str, tokens: int) -> dict[str, tuple[object, ...]]:
    """The arguments of each operation in a model, apart from the namespace."""
    rng = np.random.default_rng(0)
    kind = np.dtype(RandomWeights(dtype).ones(1).dtype)
    heads, kv_heads, width = (
        CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim,
    )  # fmt: skip
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size

    def drawn(*shape: int) -> Array:
        return from_numpy(rng.standard_normal(shape).astype(kind), xp)

    slots = from_numpy(np.arange(tokens), xp)
    x, q = drawn(1, tokens, hidden), drawn(1, tokens, heads, width)
    k, v = drawn(1, tokens, kv_heads, width), drawn(1, tokens, kv_heads, width)
    return {
        "normalise": (x, drawn(hidden), 1e-5),
        "rotate": (q, *rope_table(slots, CONFIG, like=x), "half"),
        "gate_with_silu": (drawn(1, tokens, inner), drawn(1, tokens, inner)),
        "linear_2d": (drawn(tokens, hidden), drawn(inner, hidden), None),
        "attend": (q, k, v, Mask(slots, slots), 1 / math.sqrt(width)),
    }


def _decoding(body: Body, dtype: str) -> Pair:
    """Decode one token, or several, after a short prompt."""
    model = RandomWeights(dtype, "cupy" if body.library == "cupy" else "numpy").model(CONFIG)
    ids = from_numpy(np.arange(8)[None], namespace(like=model.weights.norm))

    def tokens(bodies: dict[str, Function]) -> None:
        with only(bodies):
            for _ in generate(model, ids, max_new_tokens=8, eos_token_id=()):
                pass

    def token(bodies: dict[str, Function]) -> None:
        with only(bodies):
            forward(model, ids[:, :1], cache=cache)

    cache = forward(model, ids, cache=KVCache.create(model, 1, 16)).cache
    call = token if body.name == "decoder_layers" else tokens
    return lambda: call({body.name: body.function}), lambda: call({})
