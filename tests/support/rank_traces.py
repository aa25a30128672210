"""Traces of ranks as engines record them: parts of a whole trace, some of them wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np

from llama_layers.verify import record
from tests.support.random_models import GQA, model_of, random_weights

IDS = np.array([[3, 1, 4, 1, 5]])
# 8 query heads, 2 key heads.
CONFIG = replace(GQA, num_attention_heads=8, num_key_value_heads=2, intermediate_size=12)
LAYER = "model.layers.1"


@cache
def whole_model():
    return model_of(CONFIG, random_weights(CONFIG, dtype=np.float32))


@cache
def whole_trace():
    return record(whole_model(), IDS)


def engine(trace, model, size, *, reduced=True, flat=False):
    """Traces of ranks as other engines split: contiguous heads, one key head each at the least."""
    heads, keys, width = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
    ranks = []
    for rank in range(size):
        q = np.arange(heads)[rank * heads // size : (rank + 1) * heads // size]
        kv = np.arange(rank * keys // size, max((rank + 1) * keys // size, rank * keys // size + 1))
        channels = np.array_split(np.arange(CONFIG.intermediate_size), size)[rank]
        arrays = {}
        for name, array in trace.arrays.items():
            role = name.split(".", 3)[-1]
            units = {"q_": q, "k_": kv, "v_": kv, "at": q}.get(role.removeprefix("self_attn.")[:2])
            if role.startswith("self_attn.") and units is not None:
                some = array.reshape(1, -1, array.size // array.shape[1] // width, width)[
                    :, :, units
                ]
                array = some.reshape(1, array.shape[1], -1) if flat or array.ndim == 3 else some
            elif role in ("mlp.gate_proj", "mlp.up_proj", "mlp.act"):
                array = array[..., channels]
            elif role in ("self_attn.o_proj", "mlp.down_proj") and not reduced:
                layer = model.weights.layers[int(name.split(".")[2])].named()[f"{role}.weight"]
                source = "self_attn.attention" if "o_proj" in role else "mlp.act"
                x = trace.arrays[name.replace(role, source)].reshape(1, array.shape[1], -1)
                some = channels
                if "o_proj" in role:
                    some = (q[:, None] * width + np.arange(width)).ravel()
                array = x[..., some] @ layer[:, some].T
            arrays[name] = array
        ranks.append(replace(trace, arrays=arrays))
    return ranks


def by_heads(trace, bounds):
    """Traces of ranks that have heads from one bound to the next, and three channels for two."""
    ranks, width = [], CONFIG.head_dim
    for start, stop in pairwise(bounds):
        keys = slice(start // 4, (stop - 1) // 4 + 1)
        heads = {"q": slice(start, stop), "k": keys, "v": keys, "a": slice(start, stop)}
        arrays = {}
        for name, array in trace.arrays.items():
            _, attention, role = name.partition("self_attn.")
            if attention and not role.startswith("o_"):
                array = array.reshape(1, IDS.shape[1], -1, width)[:, :, heads[role[0]]]
            elif name.endswith(("gate_proj", "up_proj", "act")):
                array = array[..., start * 3 // 2 : stop * 3 // 2]
            arrays[name] = array
        ranks.append(replace(trace, arrays=arrays))
    return ranks


def wrong_on(ranks, rank, name, change=lambda array: array * 1.01):
    arrays = dict(ranks[rank].arrays)
    arrays[name] = change(np.array(arrays[name])).astype(arrays[name].dtype)
    return [replace(t, arrays=arrays) if r == rank else t for r, t in enumerate(ranks)]


SPOILT = {
    "a reduce that was forgotten": None,
    "NaN": lambda a: a * np.nan,
    "a factor": lambda a: a * 1.5,
    "zeros": np.zeros_like,
}
