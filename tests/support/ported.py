"""A port of Llama in naive float32, with mistakes to make in it, for tests of what is diagnosed."""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import numpy as np

from llama_layers import LlamaConfig, forward
from llama_layers.verify import Trace
from tests.support.random_models import LLAMA3, YARN, model_of, random_weights

LAYER = 1  # in which a port has its mistake
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
    "six heads": replace(BASE, num_attention_heads=6, num_key_value_heads=2),
}
WEIGHTS = {name: random_weights(config, dtype=np.float32) for name, config in CONFIGS.items()}
COUNT = 14
# Queries of one layer made small or large: numbers that float16 underflows in, scores that
# exponentials overflow at, and scores below -1e4.
for name, factor in (("small", 2e-5), ("large", 100.0), ("huge", 2e4)):
    CONFIGS[name] = BASE
    role = f"model.layers.{LAYER}.self_attn.q_proj.weight"
    WEIGHTS[name] = WEIGHTS["base"] | {role: WEIGHTS["base"][role] * np.float32(factor)}


class Port:
    """What a mistake can see: the arrays so far, the weights, and the right array in its place."""

    def __init__(self, config, weights, arrays, right, ids, positions):
        self.config, self.weights, self.arrays = config, weights, arrays
        self.right, self.ids, self.positions = right, ids, positions

    def __getitem__(self, role):
        """An array in the same layer; "x" is what comes into it."""
        if role == "x":
            return self.arrays[f"model.layers.{LAYER - 1}"]
        return self.arrays[f"model.layers.{LAYER}.{role}"]

    def weight(self, role, layer=LAYER):
        return self.weights[f"model.layers.{layer}.{role}.weight"]

    def bias(self, role, layer=LAYER):
        return self.weights[f"model.layers.{layer}.{role}.bias"]

    def heads(self, role):
        array = self[role]
        return array.reshape(*array.shape[:2], -1, self.config.head_dim)


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
            port = Port(config, weights, arrays, array, ids, places)
            array = mistake.wrong(port).astype(array.dtype).reshape(array.shape)
        arrays[at] = array
        return array

    with np.errstate(all="ignore"):
        forward(model, ids, attention_mask=keep, positions=positions, tap=tap)
    return Trace(arrays, input_ids=ids, positions=positions, attention_mask=keep), model


def told(report):
    """The names of what explains the first failing site."""
    return [explanation.name for explanation in report.first.explanations]


def omega(config, theta=None):
    """Plain frequencies."""
    half = config.head_dim // 2
    theta = config.rope_theta if theta is None else theta
    return np.array([theta ** (-2 * i / config.head_dim) for i in range(half)])


def turned(x, phases, layout="half", factor=1.0, sign=1):
    """x [B, S, heads, D] turned by phases [S, D / 2], pair by pair."""
    x = x.astype(np.float64)
    y = x.copy()
    half = x.shape[-1] // 2
    for i in range(half):
        a, b = (i, i + half) if layout == "half" else (2 * i, 2 * i + 1)
        cos, sin = factor * np.cos(phases[:, i]), sign * factor * np.sin(phases[:, i])
        cos, sin = cos[None, :, None], sin[None, :, None]
        y[..., a] = x[..., a] * cos - x[..., b] * sin
        y[..., b] = x[..., a] * sin + x[..., b] * cos
    return y


def causal(count, window=None):
    query, key = np.mgrid[:count, :count]
    return (key <= query) & (key > query - (window or count))


def attended(q, k, v, allowed, scale=None, hidden=-np.inf, kv_of=None, weights=None):
    """Attention one head at a time; `weights` may make other weights of the scores."""
    heads, groups = q.shape[2], k.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    allowed = np.broadcast_to(allowed, (len(q), q.shape[1], k.shape[1]))
    y = np.zeros(q.shape)
    for h in range(heads):
        kv = h * groups // heads if kv_of is None else kv_of(h)
        scores = np.einsum("bsd,btd->bst", q[:, :, h], k[:, :, kv]).astype(np.float64) * scale
        scores = np.where(allowed, scores, hidden)
        p = (softmax if weights is None else weights)(scores)
        y[:, :, h] = np.einsum("bst,btd->bsd", p, v[:, :, kv])
    return y


def softmax(scores):
    largest = scores.max(axis=-1, keepdims=True)
    e = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
    return e / np.maximum(e.sum(axis=-1, keepdims=True), 1e-300)


def normed(x, weight, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x.astype(np.float64)))


def narrow(array, dtype=ml_dtypes.bfloat16):
    return array.astype(dtype).astype(np.float32)
