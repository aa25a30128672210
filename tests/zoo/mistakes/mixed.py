"""Mistakes in one place only, and several at once."""

from __future__ import annotations

import numpy as np

from tests.zoo.mistakes import weights
from tests.zoo.numbers import by_rows
from tests.zoo.registry import MISTAKES, edit, step


@step("scores", "1.attention")
def one_layer_scale(port, right, q, k, layer):
    return right(q, k, layer) * (4 if layer == 1 else 1)


@step("weigh", "0.attention")
def one_head_zero(port, right, p, v, layer):
    found = right(p, v, layer)
    found[:, :, 2] = 0
    return found


@step("softmax", "0.attention")
def one_head_mask(port, right, scores, seen):
    seen = np.broadcast_to(seen, scores.shape).copy()
    seen[:, 1] = True
    return right(scores, seen)


@step("norm", "1.post_attention_layernorm")
def one_layer_eps(port, right, x, site):
    port.eps = 1e-2 if site == "model.layers.1.post_attention_layernorm" else 1e-5
    return right(x, site)


@step("rotate", "0.q_rope")
def one_sequence_theta(port, right, x, at, site):
    found, theta = right(x, at, site), port.theta
    port.theta = 10000.0
    found[1] = right(x, at, site)[1]
    port.theta = theta
    return found


@step("gate", "0.act")
def one_token_gate(port, right, gate, up, site):
    found = right(gate, up, site)
    found[0, 13] = port.round(gate[0, 13] * up[0, 13])
    return found


@step("multiply", "0.up_proj")
def one_channel_up(port, right, x, w, site):
    found = right(x, w, site)
    if site.endswith("up_proj"):
        found[..., 100] *= -1
    return found


@edit("1.down_proj")
def one_layer_int8(port):
    name = "model.layers.1.mlp.down_proj.weight"
    port.w[name] = port.round(by_rows(port.w[name], 127))


def _both(port, *names):
    for name in names:
        MISTAKES[name].plant(port)


@edit("0.input_layernorm")
def eps_and_theta(port):
    _both(port, "eps_default", "theta_default")


@edit("0.q_rope")
def theta_and_gelu(port):
    _both(port, "theta_default", "gelu")


@edit("0.o_proj")
def transposed_and_scaled(port):
    _both(port, "output_weight_transposed", "logits_scaled")


@edit("0.attention")
def mask_and_residual(port):
    _both(port, "mask_without_diagonal", "residual_stale")


@edit("0.up_proj")
def shards_and_norm(port):
    weights.every(port, "up_proj.weight", lambda w: np.roll(w, len(w) // 2, 0))
    port.w["model.norm.weight"] = np.ones(64, np.float32)


@step("multiply", "0.q_proj")
def tile_and_head(port, right, x, w, site):
    found = right(x, w, site)
    if site.endswith("q_proj"):
        found[..., 32:48] = found[..., 16:32]
    if site == "lm_head":
        found[..., 33] = 0
    return found


@edit("0.attention")
def heads_and_activation(port):
    _both(port, "key_heads_tiled", "silu_of_up")
