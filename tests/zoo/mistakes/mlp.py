"""The MLP."""

from __future__ import annotations

import math

import numpy as np

from tests.zoo.numbers import float16
from tests.zoo.registry import step

erf = np.vectorize(math.erf, otypes=[np.float32])


@step("activate", "0.act")
def gelu(port, right, x):
    return x * (1 + erf(x / np.float32(2**0.5))) / 2


@step("activate", "0.act")
def relu(port, right, x):
    return np.maximum(x, 0)


@step("activate", "0.act")
def sigmoid_only(port, right, x):
    return 1 / (1 + np.exp(-x))


@step("activate", "0.act")
def quick_gelu(port, right, x):
    return x / (1 + np.exp(-port.work(1.702) * x))


@step("gate", "0.act")
def silu_of_up(port, right, gate, up, site):
    return right(up, gate, site)


@step("gate", "0.act")
def gate_plus_up(port, right, gate, up, site):
    return port.round(port.activate(gate) + up)


@step("gate", "0.act")
def up_plus_one(port, right, gate, up, site):
    return right(gate, up + 1, site)


@step("gate", "0.act")
def silu_of_product(port, right, gate, up, site):
    return port.round(port.activate(gate * up))


@step("activate", "0.act")
def hard_swish(port, right, x):
    return x * np.clip(x + 3, 0, 6) / 6


@step("activate", "0.act")
def activation_clamped(port, right, x):
    return right(np.minimum(x, 2))


@step("activate", "0.act")
def activation_table(port, right, x):
    return float16(right(float16(x)))


@step("activate", "0.act")
def activation_table_coarse(port, right, x):
    return right(np.rint(np.clip(x, -8, 8) * 16) / 16)


@step("activate", "0.act")
def activation_missing(port, right, x):
    return x


@step("activate", "0.act")
def activation_tail_missing(port, right, x):
    found = right(x)
    found[..., 160:] = x[..., 160:]
    return found


@step("mlp", "0.gate_proj")
def mlp_without_norm(port, right, h, name):
    return right(port.recorded[name.replace("mlp", "attention_residual")][-1], name)


@step("mlp", "0.gate_proj")
def mlp_beside_attention(port, right, h, name):
    return right(port.recorded[name.replace("mlp", "input_layernorm")][-1], name)


@step("linear", "0.up_proj")
def up_reads_stale(port, right, x, site):
    if site.endswith("up_proj"):
        x = port.recorded[site.replace("mlp.up_proj", "input_layernorm")][-1]
    return right(x, site)


@step("linear", "0.down_proj")
def down_reads_late(port, right, x, site):
    if site.endswith("down_proj"):
        x = np.concatenate([x[:, :1], x[:, :-1]], 1)
    return right(x, site)
