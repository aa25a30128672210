"""A port made of a copy of the package: every activation, of several models, in several ways.

`run` imports the package, so it belongs in a process of its own: see runner.py.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np

COUNT = 20
CUTS = (7, 8, 9, 14)  # where a run through a cache is cut


def configs():
    """Models that between them use every branch of the forward pass."""
    from random_models import LLAMA3, YARN

    from llama_layers import LlamaConfig

    gqa = LlamaConfig(
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
    some = ("sliding_attention", "full_attention", "sliding_attention")
    return {
        "gqa": gqa,
        "tied mha": replace(gqa, num_key_value_heads=6, tie_word_embeddings=True),
        "biases": replace(gqa, attention_bias=True, mlp_bias=True),
        "qwen2": replace(gqa, model_type="qwen2"),
        "window": replace(gqa, model_type="mistral", sliding_window=5),
        "some windows": replace(gqa, sliding_window=4, layer_types=some),
        "linear": replace(gqa, rope_scaling={"rope_type": "linear", "factor": 3.0}),
        "dynamic": replace(gqa, rope_scaling={"rope_type": "dynamic", "factor": 3.0}),
        "yarn": replace(gqa, rope_scaling=YARN),
        "yarn with mscale": replace(
            gqa, rope_scaling=YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}
        ),
        "llama3": replace(gqa, rope_scaling=LLAMA3),
    }


def weights_of(config, seed=0):
    """Random weights by Hugging Face name, in float32."""
    from random_models import random_weights

    return random_weights(config, seed, np.float32)


def case_ids(config):
    return np.random.default_rng(1).integers(0, config.vocab_size, (2, COUNT))


def keep_of(way):
    """Which tokens are no padding."""
    keep = np.ones((2, COUNT), bool)
    if "padded" in way:
        keep[1, :4] = False
    return keep


WAYS = ("whole", "padded", "cached", "padded and cached", "ring", "padded ring", "in blocks")


def cases():
    """Models and ways to run them, the simplest first."""
    for way in WAYS:
        for kind in configs():
            if ("ring" in way and kind != "window") or (way == "in blocks" and kind != "gqa"):
                continue
            if kind == "dynamic" and way in ("cached", "padded and cached"):
                continue  # the frequencies follow the length so far
            yield kind, way


def recorded(model, ids, way):
    """The array of each site; a run through a cache joined along the sequence."""
    from llama_layers import KVCache, attend, forward

    attend.SCORES = 800 if way == "in blocks" else 1 << 24  # 800 are those of 3 queries
    keep = keep_of(way) if "padded" in way else None
    cuts = CUTS if "cached" in way or "ring" in way else ()
    rolling = COUNT // 2 if "ring" in way else None
    cache = KVCache.create(model, 2, COUNT, rolling=rolling) if cuts else None
    parts: dict[str, list] = {}

    def tap(name, array):
        parts.setdefault(name, []).append(np.array(array))
        return array

    for start, stop in zip((0, *cuts), (*cuts, COUNT), strict=True):
        mask = None if keep is None else keep[:, start:stop]
        cache = forward(model, ids[:, start:stop], cache=cache, attention_mask=mask, tap=tap).cache
    return {name: np.concatenate(arrays, axis=1) for name, arrays in parts.items()}


def run(file):
    """Write every activation of every case to an .npz file; a case that raises is left out."""
    from random_models import model_of

    from llama_layers.backends.numpy import BODIES

    for name in ("attend", "gate_with_silu", "normalise", "turn"):
        del BODIES[name]  # bugs are planted in the definitions

    arrays = {}
    for kind, way in cases():
        with contextlib.suppress(Exception), np.errstate(all="ignore"):
            config = configs()[kind]
            model = model_of(config, weights_of(config))
            for name, array in recorded(model, case_ids(config), way).items():
                arrays[f"{kind}|{way}|{name}"] = array
    np.savez(file, **arrays)
