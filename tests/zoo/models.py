"""The tiny models and prompts that the zoo runs on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from llama_layers import Llama, LlamaConfig
from tests.zoo.port import DTYPES, Port

_LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama3": {"rope_scaling": _LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": _YARN},
    "bias": {"attention_bias": True},
    "window": {"sliding_window": 8, "layer_types": (
        "sliding_attention", "full_attention", "sliding_attention")},
    "tied": {"tie_word_embeddings": True},
    "wide_heads": {"head_dim": 32},
    "deep": {"num_hidden_layers": 12},
    "outlier": {},
}  # fmt: skip
DECODED = (16, *(1,) * 8)


@dataclass(frozen=True)
class Setting:
    """What a port runs on: a model, a prompt, and how it is fed."""

    model: str = "plain"
    count: int = 24
    padding: int = 0  # of the second sequence, on the left
    start: int = 0  # the first position
    chunks: tuple[int, ...] = ()

    def port(self, dtype: str) -> Port:
        """A port without a mistake."""
        config, weights = made(self.model)
        rng = np.random.default_rng(7)
        ids = rng.integers(2, config.vocab_size, (2, self.count))
        ids[:, 0] = 1
        if self.count == 24:
            ids[0, 5], ids[1, 9], ids[1, -2] = 0, 96, 93
        keep = None
        if self.padding:
            keep = np.ones(ids.shape, bool)
            keep[1, : self.padding] = False
        return Port(config, weights, ids, dtype, keep, self.start, self.chunks)


@lru_cache
def made(model: str) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    """The config of a model and its weights in float32."""
    numbers: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 168, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    config = LlamaConfig(**numbers | _CONFIGS[model])
    rng = np.random.default_rng(11)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, 2))
    weights = {"model.embed_tokens.weight": normal(config.vocab_size, hidden, scale=0.05)}
    if model == "outlier":
        weights["model.embed_tokens.weight"][:, 5] = 300
    shapes = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    for layer in range(config.num_hidden_layers):
        for name, (out, fed) in shapes.items():
            small = 0.3 if name.endswith(("o_proj", "down_proj")) else 1.2
            full = f"model.layers.{layer}.{name}"
            weights[f"{full}.weight"] = normal(out, fed, scale=small / fed**0.5)
            if config.attention_bias and name.startswith("self_attn"):
                weights[f"{full}.bias"] = normal(out, scale=0.3)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = 1 + normal(hidden, scale=0.25)
    weights["model.norm.weight"] = 1.5 + normal(hidden, scale=0.25)
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = normal(config.vocab_size, hidden, scale=0.12)
    return config, weights


@lru_cache
def checked(model: str, dtype: str) -> Llama:
    """The model that a port in some dtype is held against."""
    config, weights = made(model)
    kind = DTYPES["float32" if dtype == "float64" else dtype]
    return Llama.from_state_dict({name: w.astype(kind) for name, w in weights.items()}, config)
