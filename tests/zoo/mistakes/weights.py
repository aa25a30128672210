"""Weights: their layout, their loading, and what was done to them."""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np

from tests.zoo.models import Setting
from tests.zoo.registry import edit, step

BIAS, DEEP = Setting("bias"), Setting("deep")


def every(port, ending, change):
    """Change each array whose name ends so."""
    for name in port.w:
        if name.endswith(ending):
            port.w[name] = port.round(change(port.w[name]))


def exchange(port, first, second):
    """Exchange two arrays in each layer."""
    for layer in range(port.layers):
        a, b = f"model.layers.{layer}.{first}", f"model.layers.{layer}.{second}"
        port.w[a], port.w[b] = port.w[b], port.w[a]


@edit("0.q_proj")
def query_weight_transposed(port):
    every(port, "q_proj.weight", lambda w: w.T)


@edit("0.o_proj")
def output_weight_transposed(port):
    every(port, "o_proj.weight", lambda w: w.T)


@edit("0.k_proj")
def keys_and_values_swapped(port):
    exchange(port, "self_attn.k_proj.weight", "self_attn.v_proj.weight")


@edit("0.gate_proj")
def gate_and_up_swapped(port):
    exchange(port, "mlp.gate_proj.weight", "mlp.up_proj.weight")


@edit("0.q_proj")
def qkv_split_flat(port):
    for layer in range(port.layers):
        names = [f"model.layers.{layer}.self_attn.{p}_proj.weight" for p in "qkv"]
        groups = [port.w[name].reshape(port.kv, -1, 64) for name in names]
        fused = np.concatenate(groups, 1).reshape(-1, 64)
        parts = np.split(fused, np.cumsum([len(port.w[name]) for name in names])[:2])
        port.w |= dict(zip(names, parts, strict=True))


@edit("0.gate_proj")
def gate_up_interleaved(port):
    for layer in range(port.layers):
        a, b = (f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up"))
        fused = np.stack([port.w[a], port.w[b]], 1).reshape(-1, 64)
        port.w[a], port.w[b] = np.split(fused, 2)


@edit("0.up_proj")
def offset_by_one_element(port):
    every(port, "up_proj.weight", lambda w: np.roll(w.ravel(), -1).reshape(w.shape))


@edit("0.down_proj")
def rows_swapped(port):
    order = np.arange(64)
    order[[10, 11]] = 11, 10
    every(port, "down_proj.weight", lambda w: w[order])


@edit("0.v_proj")
def one_row_zero(port):
    port.w["model.layers.0.self_attn.v_proj.weight"][7] = 0


@edit("1.up_proj")
def one_weight_bit(port):
    w = port.w["model.layers.1.mlp.up_proj.weight"]
    w[40, 3] *= 16


@edit("2.down_proj")
def file_truncated(port):
    port.w["model.layers.2.mlp.down_proj.weight"][48:] = 0


@edit("1.v_proj")
def bfloat16_read_as_float16(port):
    w = port.w["model.layers.1.self_attn.v_proj.weight"]
    bits = w.astype(ml_dtypes.bfloat16).view(np.float16)
    port.w["model.layers.1.self_attn.v_proj.weight"] = port.round(bits)


@edit("0.o_proj")
def bytes_swapped(port):
    name = "model.layers.0.self_attn.o_proj.weight"
    bits = port.w[name].astype(ml_dtypes.bfloat16).view(np.uint16).byteswap()
    swapped = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    port.w[name] = port.round(np.nan_to_num(np.clip(swapped, -1e4, 1e4)))


@edit("0.gate_proj")
def shards_in_wrong_order(port):
    every(port, "gate_proj.weight", lambda w: np.roll(w, len(w) // 2, 0))


@edit("0.o_proj")
def column_shards_in_wrong_order(port):
    every(port, "o_proj.weight", lambda w: np.roll(w, 32, 1))


@edit("1.input_layernorm")
def next_layer_prefetched(port):
    for name in [name for name in port.w if name.startswith("model.layers.1.")]:
        port.w[name] = port.w[name.replace("layers.1.", "layers.2.")]


@edit("0.q_proj")
def last_layer_everywhere(port):
    last = port.w["model.layers.2.self_attn.q_proj.weight"]
    every(port, "q_proj.weight", lambda w: last)


def _reorder(port, order):
    before = dict(port.w)
    for name in before:
        if name.startswith("model.layers."):
            _, _, layer, *rest = name.split(".")
            port.w[name] = before[".".join(["model.layers", str(order[int(layer)]), *rest])]


@edit("2.input_layernorm", DEEP)
def layers_sorted_as_text(port):
    _reorder(port, sorted(range(12), key=str))


@edit("6.input_layernorm", DEEP)
def pipeline_stage_restarts(port):
    _reorder(port, [layer % 6 for layer in range(12)])


@edit("0.q_proj", BIAS)
def bias_missing(port):
    for part in "qkv":
        every(port, f"{part}_proj.bias", np.zeros_like)


@edit("0.v_proj", BIAS)
def bias_of_keys_on_values(port):
    for layer in range(port.layers):
        name = f"model.layers.{layer}.self_attn"
        port.w[f"{name}.v_proj.bias"] = port.w[f"{name}.k_proj.bias"]


@edit("0.o_proj", BIAS)
def bias_on_each_rank(port):
    every(port, "o_proj.bias", lambda b: 2 * b)


def _low_rank(port, ending, scale):
    rng = np.random.default_rng(3)

    def merged(w):
        a, b = rng.standard_normal((w.shape[0], 4)), rng.standard_normal((4, w.shape[1]))
        return w + scale * (a @ b).astype(np.float32) / w.shape[1] ** 0.5

    every(port, ending, merged)


@edit("0.q_proj")
def lora_merged(port):
    _low_rank(port, ("q_proj.weight", "v_proj.weight"), 0.1)


@edit("0.gate_proj")
def lora_scale_squared(port):
    _low_rank(port, ("gate_proj.weight", "up_proj.weight", "down_proj.weight"), 0.4)


@edit("0.q_proj")
def pruned_two_of_four(port):
    def pruned(w):
        fours = w.reshape(len(w), -1, 4)
        ranks = np.abs(fours).argsort(-1).argsort(-1)
        return np.where(ranks >= 2, fours, 0).reshape(w.shape)

    every(port, "_proj.weight", pruned)


@step("multiply", "0.q_proj")
def spinquant_half(port, right, x, w, site):
    if site.endswith("q_proj"):
        h = np.ones((1, 1))
        while len(h) < 64:
            h = np.block([[h, h], [h, -h]])
        x = x @ (h / 8).astype(x.dtype)
    return right(x, w, site)


@edit("0.post_attention_layernorm")
def smoothquant_half(port):
    scale = np.linspace(0.8, 1.6, 64).astype(np.float32)
    every(port, "post_attention_layernorm.weight", lambda w: w / scale)
    every(port, "gate_proj.weight", lambda w: w * scale)


@edit("lm_head")
def head_tied_wrongly(port):
    port.w["lm_head.weight"] = port.w["model.embed_tokens.weight"]


@edit("lm_head", Setting("tied"))
def head_not_tied(port):
    own = port.round(np.random.default_rng(1).standard_normal((97, 64)) * 0.02)

    def matrix(right, site):
        return own if site == "lm_head" else right(site)

    port.matrix = partial(matrix, port.matrix)


@edit("1.up_proj")
def weights_scaled_by_two(port):
    port.w["model.layers.1.mlp.up_proj.weight"] *= 2
