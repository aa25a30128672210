"""Calls of public functions with arguments that fit, most of them: each argument under a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import llama_layers as ll
from tests.fuzz.api_arguments import floats, mutated, one_of, sizes, some_dtype
from tests.fuzz.api_models import Arguments, Made, config, mask, mask_of
from tests.fuzz.api_sessions import SESSIONS


def call(rng: np.random.Generator) -> tuple[str, Callable[[], Any]]:
    """A call, and what it is: arguments that fit, of which up to two are changed."""
    name = one_of(rng, NAMES)
    arguments, run = CALLS[name](rng)
    notes = []
    for _ in range(one_of(rng, (0, 1, 1, 1, 2, 2))):
        key = one_of(rng, arguments)
        how, arguments[key] = mutated(rng, arguments[key])
        notes.append(f"{key} {how}")
    return f"{name}: {', '.join(notes) or 'as it should be'}", lambda: run(arguments)


def _rms_norm(rng: np.random.Generator) -> Made:
    rows, hidden = sizes(rng, 40, 40)
    x = floats(rng, rows, hidden, dtype=some_dtype(rng))
    arguments = {"x": x, "weight": floats(rng, hidden), "eps": 1e-5}
    return arguments, lambda a: ll.rms_norm(a["x"], a["weight"], eps=a["eps"])


def _linear(rng: np.random.Generator) -> Made:
    rows, outputs, inputs = sizes(rng, 40, 40, 70)
    x = floats(rng, rows, inputs, dtype=one_of(rng, ("float32", "bfloat16", some_dtype(rng))))
    weight = floats(rng, outputs, inputs, dtype=one_of(rng, ("float16", "bfloat16", "float32")))
    arguments = {"x": x, "weight": weight, "bias": floats(rng, outputs)}
    if rng.random() < 0.5:
        arguments["bias"] = None
    return arguments, lambda a: ll.linear(a["x"], a["weight"], a["bias"])


def _rope(rng: np.random.Generator) -> Made:
    batch, count, heads, half = sizes(rng, 3, 20, 4, 9)
    x = floats(rng, batch, count, heads, 2 * half, dtype=some_dtype(rng))
    wide = "float64" if x.dtype == np.float64 else "float32"
    shapes = [(count, half), (1, count, half), (batch, count, half)]
    shape = one_of(rng, shapes)
    other = shape if rng.random() < 0.7 else one_of(rng, shapes)
    arguments = {
        "x": x,
        "cos": floats(rng, *shape, dtype=wide),
        "sin": floats(rng, *other, dtype=wide),
        "layout": one_of(rng, ("half", "half", "interleaved")),
    }
    return arguments, lambda a: ll.apply_rope(a["x"], a["cos"], a["sin"], layout=a["layout"])


def _attention(rng: np.random.Generator) -> Made:
    batch, queries, keys, kv_heads, group, width = sizes(rng, 2, 40, 40, 3, 3, 24)
    dtype = some_dtype(rng)
    arguments: Arguments = {"q": floats(rng, batch, queries, kv_heads * group, width, dtype=dtype)}
    for name in "kv":
        arguments[name] = floats(rng, batch, keys, kv_heads, width, dtype=dtype)
    arguments |= mask(rng, batch, queries, keys) | {"scale": one_of(rng, (None, 0.3, 1))}

    def run(a: Arguments) -> Any:
        return ll.attention(a["q"], a["k"], a["v"], mask=mask_of(a), scale=a["scale"])

    return arguments, run


def _mask_rows(rng: np.random.Generator) -> Made:
    arguments = {"mask": None}
    while "mask" in arguments:
        arguments = mask(rng, *sizes(rng, 3, 9, 9))
    arguments |= {"start": 0, "stop": 3}
    return arguments, lambda a: mask_of(a).rows(a["start"], a["stop"])


def _swiglu(rng: np.random.Generator) -> Made:
    shape, dtype = sizes(rng, 3, 9, 20)[: rng.integers(4)], some_dtype(rng)
    arguments = {name: floats(rng, *shape, dtype=dtype) for name in ("gate", "up")}
    return arguments, lambda a: ll.swiglu(a["gate"], a["up"])


def _embed(rng: np.random.Generator) -> Made:
    vocabulary, hidden = sizes(rng, 9, 9)
    ids = rng.integers(max(1, vocabulary), size=sizes(rng, 3, 5))
    arguments = {"input_ids": ids, "table": floats(rng, vocabulary, hidden, dtype=some_dtype(rng))}
    return arguments, lambda a: ll.embed(a["input_ids"], a["table"])


def _rope_table(rng: np.random.Generator) -> Made:
    arguments = {
        "positions": rng.integers(50, size=sizes(rng, 2, 9)),
        "config": config(rng),
        "like": floats(rng, 1, dtype=some_dtype(rng)),
    }
    return arguments, lambda a: ll.rope_table(a["positions"], a["config"], like=a["like"])


def _sample(rng: np.random.Generator) -> Made:
    arguments = {
        "logits": floats(rng, *sizes(rng, 3, 9), dtype=some_dtype(rng)),
        "temperature": one_of(rng, (0, 0.5, 1, 3.0)),
        "top_k": one_of(rng, (None, 1, 5, np.uint8(3))),
        "top_p": one_of(rng, (None, 0.5, 1)),
        "min_p": one_of(rng, (None, 0.2)),
        "rng": one_of(rng, (0, 7)),
    }
    return arguments, lambda a: ll.sample(
        a["logits"], **{name: value for name, value in a.items() if name != "logits"}
    )


def _from_separate(rng: np.random.Generator) -> Made:
    kv_heads, group, width, hidden = sizes(rng, 2, 3, 6, 9)
    dtype, heads = some_dtype(rng), kv_heads * group
    outputs = {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width}
    arguments: Arguments = {
        n: floats(rng, rows, hidden, dtype=dtype) for n, rows in outputs.items()
    }
    arguments |= {f"bias_{n}": floats(rng, rows, dtype=dtype) for n, rows in outputs.items()}
    layout = one_of(rng, ("out_in", "in_out"))
    if layout == "in_out":
        arguments |= {name: np.ascontiguousarray(arguments[name].T) for name in "qkv"}
    arguments |= {"num_heads": heads, "num_kv_heads": kv_heads, "layout": layout}

    def run(a: Arguments) -> Any:
        w = ll.QKVWeights.from_separate(
            *(a[name] for name in "qkv"),
            biases=[a[f"bias_{name}"] for name in "qkv"],
            **{name: a[name] for name in ("num_heads", "num_kv_heads", "layout")},
        )
        return w.fused, w.bias, w.num_heads, w.num_kv_heads, w.q, w.k, w.v

    return arguments, run


CALLS: dict[str, Callable[[np.random.Generator], Made]] = SESSIONS | {
    "rms_norm": _rms_norm,
    "linear": _linear,
    "apply_rope": _rope,
    "attention": _attention,
    "Mask.rows": _mask_rows,
    "swiglu": _swiglu,
    "embed": _embed,
    "rope_table": _rope_table,
    "sample": _sample,
    "QKVWeights.from_separate": _from_separate,
}
# The one that most can go wrong in, several times.
NAMES = [*CALLS, *["forward"] * 6, *["decoder_layer", "attention", "apply_rope", "linear"] * 2]
