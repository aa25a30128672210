"""A port of Llama in naive float32, with mistakes to make in it, for tests of what is diagnosed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llama_layers import LlamaConfig, forward
from llama_layers.verify import Trace
from tests.support.naive_steps import (
    attended,
    causal,
    narrow,
    normed,
    omega,
    silu,
    softmax,
    turned,
)
from tests.support.port import COUNT, LAYER, Port
from tests.support.random_models import LLAMA3, YARN, model_of, random_weights

__all__ = [
    "BASE",
    "CONFIGS",
    "COUNT",
    "LAYER",
    "WEIGHTS",
    "Port",
    "attended",
    "causal",
    "narrow",
    "normed",
    "omega",
    "run",
    "silu",
    "softmax",
    "told",
    "turned",
]
BASE = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-4,
    rope_theta=2000.0,
    max_position_embeddings=16,
)
CONFIGS = {
    "base": BASE,
    "mha": replace(BASE, num_key_value_heads=4),
    "biases": replace(BASE, attention_bias=True, mlp_bias=True),
    "biases of the MLP": replace(BASE, attention_bias=True, mlp_bias=True),
    "mha biases": replace(BASE, num_key_value_heads=4, attention_bias=True),
    "window": replace(BASE, sliding_window=4),
    "some windows": replace(
        BASE,
        sliding_window=4,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    ),
    "linear": replace(BASE, rope_scaling={"rope_type": "linear", "factor": 3.0}),
    "dynamic": replace(
        BASE, max_position_embeddings=8, rope_scaling={"rope_type": "dynamic", "factor": 3.0}
    ),
    "yarn": replace(BASE, rope_scaling=YARN),
    "llama3": replace(BASE, rope_scaling=LLAMA3),
    "multipliers": replace(
        BASE,
        model_type="granite",
        embedding_multiplier=12.0,
        attention_multiplier=0.2,
        residual_multiplier=0.22,
        logits_scaling=6.0,
    ),
    "theta by layer": replace(BASE, layer_rope_theta=(100.0, 2000.0, 2000.0)),
    "layer without RoPE": replace(BASE, layer_rope_theta=(2000.0, 0.0, 2000.0)),
    "two RoPEs": replace(
        BASE,
        sliding_window=8,
        layer_types=("full_attention", "sliding_attention", "full_attention"),
        layer_rope_theta=(2000.0, 100.0, 2000.0),
        rope_scaling={"rope_type": "linear", "factor": 3.0},
        sliding_rope_scaling=False,
    ),
    "longrope": replace(
        BASE,
        llama_4_scaling_beta=0.5,
        rope_scaling={
            "rope_type": "longrope",
            "factor": 2.0,
            "original_max_position_embeddings": 4,
            "short_factor": (1.0, 1.5, 1.75, 2.0),
            "long_factor": (1.25, 3.0, 6.0, 8.0),
        },
    ),
    "partial RoPE": replace(BASE, partial_rotary_factor=0.5),
    "norms on both sides": replace(BASE, norm_placement="both"),
    "norms after": replace(BASE, norm_placement="after", qk_norm="full"),
    "norms of projections": replace(BASE, qk_norm="full"),
    "norms of heads": replace(BASE, qk_norm="head"),
    "norms after RoPE": replace(BASE, qk_norm="head", qk_norm_after_rope=True),
    "sinks": replace(BASE, attention_sinks=True),
    "gemma": replace(
        BASE,
        embedding_multiplier=5.7,
        embedding_multiplier_rounded=True,
        norm_weight_offset=1.0,
        hidden_act="gelu_pytorch_tanh",
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.5,
        qk_norm="head",
    ),
    "logits": replace(BASE, final_logit_softcapping=2.5),
    "cap of scores": replace(BASE, attn_logit_softcapping=1.5),
    "cap of logits": replace(BASE, final_logit_softcapping=2.5),
    "gelu": replace(BASE, hidden_act="gelu_pytorch_tanh"),
    "six heads": replace(BASE, num_attention_heads=6, num_key_value_heads=2),
}
CONFIGS["temperature"] = CONFIGS["longrope"]
WEIGHTS = {name: random_weights(config, dtype=np.float32) for name, config in CONFIGS.items()}
# Queries of one layer made small or large: numbers that float16 underflows in, scores that
# exponentials overflow at, and scores below -1e4.
for name, factor in (("small", 2e-5), ("large", 100.0), ("huge", 2e4)):
    CONFIGS[name] = BASE
    role = f"model.layers.{LAYER}.self_attn.q_proj.weight"
    WEIGHTS[name] = WEIGHTS["base"] | {role: WEIGHTS["base"][role] * np.float32(factor)}


def run(mistake):
    """The trace of a port with a mistake at a site, and with all that follows from it."""
    name, dtype = mistake.config, mistake.dtype
    config = CONFIGS[name]
    weights = {n: w.astype(dtype) for n, w in WEIGHTS[name].items()}
    model = model_of(config, weights)
    keep, positions = None, None
    if mistake.padded:
        keep = np.ones((2, COUNT), bool)
        keep[1, :4] = False
    if mistake.first:
        positions = mistake.first + np.arange(COUNT)
    ids = np.random.default_rng(5).integers(0, config.vocab_size, (2, COUNT))
    arrays = {}

    def tap(at, array):
        if at == mistake.site:
            places = np.arange(COUNT) if positions is None else positions
            port = Port(config, weights, arrays, array, ids, places, mistake.role)
            array = mistake.wrong(port).astype(array.dtype).reshape(array.shape)
        arrays[at] = array
        return array

    with np.errstate(all="ignore"):
        forward(model, ids, attention_mask=keep, positions=positions, tap=tap)
    return Trace(arrays, input_ids=ids, positions=positions, attention_mask=keep), model


def told(report):
    """The names of what explains the first failing site."""
    return [explanation.name for explanation in report.first.explanations]
