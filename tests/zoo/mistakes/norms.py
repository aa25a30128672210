"""RMSNorm."""

from __future__ import annotations

from functools import partial

import numpy as np

from tests.zoo.models import Setting
from tests.zoo.numbers import bfloat16, float16
from tests.zoo.registry import edit, step


def _mean(x):
    return (x * x).mean(-1, keepdims=True)


@edit("0.input_layernorm")
def eps_default(port):
    port.eps = 1e-6


@step("norm", "0.input_layernorm")
def eps_outside_root(port, right, x, site):
    root = np.sqrt(_mean(x)) + port.work(port.eps)
    return port.round(x / root * port.w[f"{site}.weight"])


@edit("0.input_layernorm")
def eps_missing(port):
    port.eps = 0.0


@step("norm", "0.input_layernorm")
def mean_subtracted(port, right, x, site):
    return right(x - x.mean(-1, keepdims=True), site)


@edit("0.input_layernorm")
def weight_plus_one(port):
    for name in port.w:
        if "norm" in name:
            port.w[name] = port.w[name] + 1


@step("norm", "0.input_layernorm")
def sum_of_squares(port, right, x, site):
    root = np.sqrt((x * x).sum(-1, keepdims=True) + port.work(port.eps))
    return port.round(x / root * port.w[f"{site}.weight"])


@step("norm", "0.input_layernorm")
def mean_of_padded_width(port, right, x, site):
    root = np.sqrt((x * x).sum(-1, keepdims=True) / 128 + port.work(port.eps))
    return port.round(x / root * port.w[f"{site}.weight"])


@edit("0.input_layernorm")
def norm_weight_missing(port):
    for name in port.w:
        if "norm" in name:
            port.w[name] = np.ones_like(port.w[name])


@edit("0.input_layernorm")
def norm_weight_squared(port):
    for name in port.w:
        if "norm" in name:
            port.w[name] = port.w[name] ** 2


@edit("0.input_layernorm")
def norms_swapped(port):
    for layer in range(port.layers):
        a, b = (f"model.layers.{layer}.{n}_layernorm.weight" for n in ("input", "post_attention"))
        port.w[a], port.w[b] = port.w[b], port.w[a]


@step("norm", "0.input_layernorm")
def norm_in_bfloat16(port, right, x, site):
    total, b = np.zeros_like(x[..., :1]), bfloat16(x)
    for channel in range(x.shape[-1]):
        total = bfloat16(total + bfloat16(b[..., channel : channel + 1] ** 2))
    root = bfloat16(np.sqrt(bfloat16(bfloat16(total / x.shape[-1]) + port.eps)))
    return port.round(bfloat16(bfloat16(b / root) * port.w[f"{site}.weight"]))


@step("norm", "0.input_layernorm", Setting("outlier"))
def norm_squares_overflow(port, right, x, site):
    root = np.sqrt(float16(x * x).mean(-1, keepdims=True) + port.eps)
    return port.round(x / root * port.w[f"{site}.weight"])


@step("norm", "norm")
def final_norm_missing(port, right, x, site):
    return x if site == "model.norm" else right(x, site)


@edit("norm")
def final_norm_weight_wrong(port):
    port.w["model.norm.weight"] = port.w["model.layers.2.post_attention_layernorm.weight"]


@step("norm", "0.input_layernorm")
def norm_tail_unweighted(port, right, x, site):
    found = right(x, site)
    found[..., 56:] = port.round(x / np.sqrt(_mean(x) + port.work(port.eps)))[..., 56:]
    return found


@step("norm", "0.input_layernorm")
def norm_of_tile_leader(port, right, x, site):
    mean = _mean(x)[:, np.arange(x.shape[1]) // 4 * 4]
    return port.round(x / np.sqrt(mean + port.work(port.eps)) * port.w[f"{site}.weight"])


@edit("0.post_attention_layernorm")
def norm_of_attention_output(port):
    def norm(right, x, site):
        if site.endswith("post_attention_layernorm"):
            x = port.recorded[site.replace("post_attention_layernorm", "self_attn.o_proj")][-1]
        return right(x, site)

    port.norm = partial(norm, port.norm)


@step("rotate", "0.q_rope")
def query_norm_extra(port, right, x, at, site):
    if site.endswith("q_rope"):
        x = port.round(x / np.sqrt(_mean(x) + port.work(port.eps)))
    return right(x, at, site)


@step("norm", "0.input_layernorm")
def norm_rsqrt_estimate(port, right, x, site):
    root = 1 / np.sqrt(_mean(x) + port.work(port.eps))
    bits = root.astype(np.float32).view(np.uint32)
    root = (bits & np.uint32(0xFFFFF000)).view(np.float32)
    return port.round(x * root * port.w[f"{site}.weight"])


@step("norm", "0.input_layernorm")
def norm_l1(port, right, x, site):
    size = np.abs(x).mean(-1, keepdims=True) + port.work(port.eps)
    return port.round(x / size * port.w[f"{site}.weight"])
