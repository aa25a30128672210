"""A port to be checked: the package itself, with a bug, run on several models in several ways."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from llama_layers import KVCache, Llama, LlamaConfig, forward
from llama_layers.backends.numpy import ROUTES
from llama_layers.layers import attention
from llama_layers.verify import Trace
from tests.support.random_models import LLAMA3, YARN, model_of, random_weights

COUNT = 20
CUTS = (7, 8, 9, 14)  # where a run through a cache is cut
WAYS = ("whole", "padded", "cached", "padded and cached", "ring", "padded ring", "in blocks")
Case = tuple[str, str]
"""The name of a config, and one of WAYS."""
Arrays = dict[str, Any]

GQA = LlamaConfig(
    vocab_size=64,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-3,
    rope_theta=5000.0,
    max_position_embeddings=16,
)
SOME = ("sliding_attention", "full_attention", "sliding_attention")
# Between them they use every branch of the forward pass.
CONFIGS = {
    "gqa": GQA,
    "tied mha": replace(GQA, num_key_value_heads=6, tie_word_embeddings=True),
    "biases": replace(GQA, attention_bias=True, mlp_bias=True),
    "qwen2": replace(GQA, model_type="qwen2"),
    "window": replace(GQA, model_type="mistral", sliding_window=5),
    "some windows": replace(GQA, sliding_window=4, layer_types=SOME),
    "linear": replace(GQA, rope_scaling={"rope_type": "linear", "factor": 3.0}),
    "dynamic": replace(GQA, rope_scaling={"rope_type": "dynamic", "factor": 3.0}),
    "yarn": replace(GQA, rope_scaling=YARN),
    "yarn with mscale": replace(GQA, rope_scaling=YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}),
    "llama3": replace(GQA, rope_scaling=LLAMA3),
}


def cases() -> Iterator[Case]:
    """Models and ways to run them, the simplest first."""
    for way in WAYS:
        for kind in CONFIGS:
            if ("ring" in way and kind != "window") or (way == "in blocks" and kind != "gqa"):
                continue
            if kind == "dynamic" and way in ("cached", "padded and cached"):
                continue  # the frequencies follow the length so far
            yield kind, way


@cache
def model(kind: str) -> Llama:
    """A model of random weights in float32."""
    return model_of(CONFIGS[kind], random_weights(CONFIGS[kind], 0, np.float32))


def token_ids() -> Any:
    """The tokens of every case, [2, COUNT]."""
    return np.random.default_rng(1).integers(0, GQA.vocab_size, (2, COUNT))


def valid_tokens(way: str) -> Any:
    """Which of the tokens are not padding."""
    valid = np.ones((2, COUNT), bool)
    if "padded" in way:
        valid[1, :4] = False
    return valid


def run() -> dict[Case, Arrays]:
    """The array of each site, in each case that runs to its end.

    The definitions compute, but for linear maps.
    """
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for bodies in ROUTES.values():
            for name in ("attend", "gate_with_silu", "normalise", "rotate"):
                patch.delitem(bodies, name, raising=False)
        for kind, way in cases():
            # In blocks of 3 queries.
            patch.setattr(attention, "SCORES", 800 if way == "in blocks" else 1 << 24)
            with contextlib.suppress(Exception), np.errstate(all="ignore"):
                found[kind, way] = _recorded(model(kind), way)
    return found


def _recorded(port: Llama, way: str) -> Arrays:
    """The array of each site; those of a run through a cache joined along the sequence."""
    ids, valid = token_ids(), valid_tokens(way) if "padded" in way else None
    cuts = CUTS if "cached" in way or "ring" in way else ()
    rolling = COUNT // 2 if "ring" in way else None
    cache = KVCache.create(port, 2, COUNT, rolling=rolling) if cuts else None
    parts: dict[str, list[Any]] = {}

    def tap(name: str, array: Any) -> Any:
        parts.setdefault(name, []).append(np.array(array))
        return array

    for start, stop in zip((0, *cuts), (*cuts, COUNT), strict=True):
        mask = None if valid is None else valid[:, start:stop]
        cache = forward(port, ids[:, start:stop], cache=cache, attention_mask=mask, tap=tap).cache
    return {name: np.concatenate(arrays, axis=1) for name, arrays in parts.items()}


def trace_of(arrays: Arrays, way: str) -> Trace:
    """What a port would hand over."""
    valid = valid_tokens(way)
    return Trace(arrays, token_ids(), attention_mask=None if valid.all() else valid)
