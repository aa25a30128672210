"""Calls of what a model is made of, and of models with caches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import llama_layers as ll
from tests.fuzz.api_arguments import FLOATS, floats, one_of, sizes, some_dtype
from tests.fuzz.api_models import (
    Arguments,
    Made,
    config,
    layer,
    layer_of,
    mask,
    mask_of,
    model,
    model_of,
)


def _mlp(rng: np.random.Generator) -> Made:
    c = config(rng)
    x = floats(rng, *sizes(rng, 2, 30), c.hidden_size, dtype=some_dtype(rng))
    arguments = {"x": x, "tap": None} | layer(rng, c, "float32")
    return arguments, lambda a: ll.mlp(a["x"], layer_of(a).mlp, tap=a["tap"])


def _qkv_projection(rng: np.random.Generator) -> Made:
    c = config(rng)
    x = floats(rng, *sizes(rng, 2, 30), c.hidden_size, dtype=some_dtype(rng))
    arguments = {"x": x} | layer(rng, c, "float32")
    return arguments, lambda a: ll.qkv_projection(a["x"], layer_of(a).self_attn.qkv)


def _decoder_layer(rng: np.random.Generator) -> Made:
    c, (batch, count) = config(rng), sizes(rng, 2, 20)
    places = np.arange(count)
    x = floats(rng, batch, count, c.hidden_size)
    cos, sin = ll.rope_table(places, c, like=x)
    arguments = {"x": x, "config": c, "cos": cos, "sin": sin, "tap": None, "layer": 0}
    arguments |= layer(rng, c, "float32") | mask(rng, batch, count, count)
    with_cache = rng.random() < 0.5

    def run(a: Arguments) -> Any:
        options = {"rope": (a["cos"], a["sin"]), "mask": mask_of(a), "tap": a["tap"]}
        if with_cache and batch and count:
            cache = ll.KVCache.create(c, batch, count).extend(count)
            options["cache"] = ll.LayerCache(cache, a["layer"])
        return ll.decoder_layer(a["x"], layer_of(a), config=a["config"], **options)

    return arguments, run


def _generate(rng: np.random.Generator) -> Made:
    c, arguments = model(rng)
    batch, count = sizes(rng, 2, 6)
    arguments |= {
        "input_ids": rng.integers(c.vocab_size, size=(batch, count)),
        "max_new_tokens": int(rng.integers(1, 5)),
        "temperature": one_of(rng, (0.0, 1.0)),
        "repetition_penalty": one_of(rng, (1.0, 1.3)),
        "rng": 3,
        "eos_token_id": one_of(rng, (None, 1, (1, 2), ())),
        "attention_mask": None if rng.random() < 0.6 else np.ones((batch, count), np.int64),
        "cache": None,
        "top_k": None,
        "tap": None,
        "logits_processor": None,
        "return_logprobs": bool(rng.random() < 0.3),
    }

    def run(a: Arguments) -> Any:
        options = list(arguments)[list(arguments).index("max_new_tokens") :]
        built = model_of(a, c.num_hidden_layers)
        steps = ll.generate(built, a["input_ids"], **{name: a[name] for name in options})
        # Rounding may choose another token; how many there are may depend on it then.
        ids = [step if isinstance(step, np.ndarray) else step.ids for step in steps]
        return [(step.shape, str(step.dtype)) for step in ids][:1]

    return arguments, run


def _filled(rng: np.random.Generator, c: ll.LlamaConfig, a: Arguments) -> Arguments:
    """The arguments of a cache, in which some tokens are already."""
    batch, room = int(rng.integers(1, 3)), int(rng.integers(4, 12))
    length = int(rng.integers(room - 2))
    dtype = "float64" if a["embed_tokens"].dtype == np.float64 else "float32"
    shape = (batch, length, c.num_key_value_heads, c.head_dim)
    arguments: Arguments = {
        f"{name}[{index}]": floats(rng, *shape, dtype=dtype)
        for name in ("keys", "values")
        for index in range(c.num_hidden_layers)
    }
    keep = None if rng.random() < 0.7 else rng.random((batch, length)) < 0.7
    like = np.zeros(0, FLOATS[dtype])
    return arguments | {
        "batch": batch,
        "max_len": room,
        "length": length,
        "keep": keep,
        "like": like,
    }


def _cache_of(a: Arguments, c: ll.LlamaConfig) -> ll.KVCache:
    cache = ll.KVCache.create(c, a["batch"], a["max_len"], like=a["like"])
    cache = cache.extend(a["length"], a["keep"])
    for i in range(c.num_hidden_layers):
        cache = cache.append(i, a[f"keys[{i}]"], a[f"values[{i}]"])
    return cache


def _forward(rng: np.random.Generator) -> Made:
    """Some tokens after those in a cache, or without one."""
    c, arguments = model(rng)
    cached = rng.random() < 0.7
    batch, count = sizes(rng, 2, 6)
    if cached:
        arguments |= _filled(rng, c, arguments)
        batch, count = arguments["batch"], one_of(rng, (1, 1, 1, 2))
    arguments |= {
        "input_ids": rng.integers(c.vocab_size, size=(batch, count)),
        "positions": None if rng.random() < 0.7 else rng.integers(30, size=(batch, count)),
        "attention_mask": None if rng.random() < 0.7 else rng.random((batch, count)) < 0.8,
        "mask": None,
        "last_only": False,
        "tap": None,
    }
    if rng.random() < 0.3:
        past = arguments["length"] + 1 if cached else 0
        arguments["mask"] = rng.random((batch, count, past + count)) < 0.6
    edit = one_of(rng, EDITS if rng.random() < 0.2 else [_unedited])

    def run(a: Arguments) -> Any:
        built = model_of(a, c.num_hidden_layers)
        cache = _cache_of(a, c) if cached else None
        options = {n: a[n] for n in ("positions", "attention_mask", "mask", "last_only", "tap")}
        if cache is not None:  # with the plan of this model and cache as they were
            cache = ll.forward(built, np.ones((batch, 1), np.int64), cache=cache).cache
        edit(built, cache)
        return ll.forward(built, a["input_ids"], cache=cache, **options)

    return arguments, run


def _unedited(built: ll.Llama, cache: ll.KVCache | None) -> None:
    pass


def _one_layer_more(built: ll.Llama, cache: ll.KVCache | None) -> None:
    built.weights.layers.append(built.weights.layers[0])


def _one_layer_less(built: ll.Llama, cache: ll.KVCache | None) -> None:
    built.weights.layers.pop()


def _no_layer(built: ll.Llama, cache: ll.KVCache | None) -> None:
    built.weights.layers[0] = 5


def _a_smaller_mlp(built: ll.Llama, cache: ll.KVCache | None) -> None:
    first = built.weights.layers[0]
    parts = vars(first.mlp)
    smaller = ll.MLPWeights(
        *(parts[f"{name}_proj"][:1] for name in ("gate", "up")),
        parts["down_proj"][:, :1],
        *(
            None if parts[f"{name}_bias"] is None else parts[f"{name}_bias"][:1]
            for name in ("gate", "up")
        ),
        parts["down_bias"],
    )
    built.weights.layers[0] = replace(first, mlp=smaller)


def _a_read_only_cache(built: ll.Llama, cache: ll.KVCache | None) -> None:
    if cache is not None:
        cache.values[-1].setflags(write=False)


def _a_flat_cache(built: ll.Llama, cache: ll.KVCache | None) -> None:
    if cache is not None and cache.keys[0].flags.c_contiguous:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache.keys[0].shape = (cache.keys[0].size,)


def _other_cache(built: ll.Llama, cache: ll.KVCache | None) -> None:
    if cache is not None:
        replace(cache, length=cache.length - 1)


EDITS = [
    _one_layer_more, _one_layer_less, _no_layer, _a_smaller_mlp, _a_read_only_cache, _a_flat_cache,
    _other_cache,
]  # fmt: skip


def _create(rng: np.random.Generator) -> Made:
    c = config(rng)
    arguments = {
        "config": c, "batch": int(rng.integers(1, 3)), "max_len": int(rng.integers(1, 9)),
        "like": one_of(rng, (None, floats(rng, 1, dtype=some_dtype(rng)))),
        "rolling": one_of(rng, (None, None, 2)),
    }  # fmt: skip
    return arguments, lambda a: ll.KVCache.create(
        a["config"], a["batch"], a["max_len"], like=a["like"], rolling=a["rolling"]
    )


def _append(rng: np.random.Generator) -> Made:
    c, a = model(rng)
    arguments = {"embed_tokens": a["embed_tokens"]} | _filled(rng, c, a)
    shape = (arguments["batch"], 2, c.num_key_value_heads, c.head_dim)
    arguments |= {"count": 2, "layer": 0, "kept": one_of(rng, (None, np.ones(shape[:2], bool)))}
    arguments |= {name: rng.standard_normal(shape).astype(arguments["like"].dtype) for name in "kv"}

    def run(a: Arguments) -> Any:
        cache = _cache_of(a, c).copy().extend(a["count"], a["kept"])
        view = ll.LayerCache(cache, a["layer"])
        return view.append(a["k"], a["v"]), view.cache, view.cache.key_slots()

    return arguments, run


def _changed(rng: np.random.Generator) -> Made:
    """One method after the other, and then a token."""
    c, arguments = model(rng)
    arguments |= _filled(rng, c, arguments)
    batch, length = arguments["batch"], arguments["length"]
    rows = rng.integers(-batch, batch, size=int(rng.integers(1, 4)))
    arguments |= {"rows": rows, "n": 2, "shorter": length // 2, "longer": 14}

    def run(a: Arguments) -> Any:
        cache = _cache_of(a, c).take(a["rows"]).repeat(a["n"])
        cache = cache.truncate(a["shorter"]).grow(a["longer"])
        ids = np.ones((cache.keys[0].shape[0], 1), np.int64)
        return ll.forward(model_of(a, c.num_hidden_layers), ids, cache=cache)

    return arguments, run


SESSIONS: dict[str, Callable[[np.random.Generator], Made]] = {
    "mlp": _mlp,
    "qkv_projection": _qkv_projection,
    "decoder_layer": _decoder_layer,
    "forward": _forward,
    "generate": _generate,
    "KVCache.create": _create,
    "KVCache.append": _append,
    "KVCache.take": _changed,
}
