"""A port of every family in NumPy's float32, with the switches of its config.

It shares no arithmetic with the package, nor with what mistakes are computed from. RoPE's
frequencies are those of the naive decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from llama_layers import LlamaConfig
from tests.support.decoder_oracle import called, frequencies

Arrays = dict[str, np.ndarray]
Tap = Callable[[str, np.ndarray], np.ndarray]


class Run:
    """One forward pass of ids [B, S] without padding, from position 0 on."""

    def __init__(self, config: LlamaConfig, weights: Arrays, layout: str, tap: Tap) -> None:
        self.config, self.w, self.layout, self.tap = config, weights, layout, tap

    def logits(self, ids: np.ndarray) -> np.ndarray:
        config, w = self.config, self.w
        x = w["model.embed_tokens.weight"][ids] * np.float32(config.embedding_multiplier)
        x = self.tap("model.embed_tokens", x)
        for layer in range(config.num_hidden_layers):
            x = self.block(x, layer)
        x = self.norm(x, "model.norm")
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        y = self.tap("lm_head", x @ w[f"{head}.weight"].T)
        scaling, cap = np.float32(config.logits_scaling), config.final_logit_softcapping
        if scaling == 1 and cap is None:
            return y
        y = y * scaling if config.model_type == "hyperclovax" else y / scaling
        return self.tap("logits", y if cap is None else capped(y, cap))

    def block(self, x: np.ndarray, layer: int) -> np.ndarray:
        name, times = f"model.layers.{layer}", np.float32(self.config.residual_multiplier)
        y = self.in_layer("before", layer, "input_layernorm", x)
        y = self.attention(y, layer)
        y = self.in_layer("after", layer, "post_self_attn_layernorm", y)
        x = self.tap(f"{name}.attention_residual", x + times * y)
        y = self.in_layer("before", layer, "post_attention_layernorm", x)
        y = self.mlp(y, f"{name}.mlp")
        y = self.in_layer("after", layer, "post_mlp_layernorm", y)
        return self.tap(name, x + times * y)

    def in_layer(self, where: str, layer: int, role: str, x: np.ndarray) -> np.ndarray:
        """A norm that the family may not have there."""
        if self.config.norm_placement not in (where, "both"):
            return x
        return self.norm(x, f"model.layers.{layer}.{called(self.config, role)}")

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        root = np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.config.rms_norm_eps))
        weight = self.w[f"{name}.weight"] + np.float32(self.config.norm_weight_offset)
        return self.tap(name, x / root * weight)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.tap(name, x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0))

    def attention(self, x: np.ndarray, layer: int) -> np.ndarray:
        name, config = f"model.layers.{layer}.self_attn", self.config
        q, k, v = (self.linear(x, f"{name}.{part}_proj") for part in "qkv")
        steps = [self.normed_heads, self.rotated]
        for step in reversed(steps) if config.qk_norm_after_rope else steps:
            q, k = step(q, layer, "q"), step(k, layer, "k")
        y = self.attend(self.split(q), self.split(k), self.split(v), layer)
        y = self.tap(f"{name}.attention", y)
        return self.linear(y.reshape(*y.shape[:2], -1), f"{name}.o_proj")

    def split(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)

    def normed_heads(self, x: np.ndarray, layer: int, part: str) -> np.ndarray:
        if self.config.qk_norm == "none":
            return x
        x = x if self.config.qk_norm == "full" else self.split(x)
        return self.norm(x, f"model.layers.{layer}.{called(self.config, f'self_attn.{part}_norm')}")

    def rotated(self, x: np.ndarray, layer: int, part: str) -> np.ndarray:
        name, x = f"model.layers.{layer}.self_attn.{part}_rope", self.split(x)
        thetas = self.config.layer_rope_theta
        if thetas is not None and thetas[layer] == 0:
            return self.tap(name, x)
        count = x.shape[1]
        omega, factor = frequencies(self.config, count, layer)
        angles = np.outer(np.arange(count), omega)[:, None]
        cos, sin = (np.float32(factor * f(angles)) for f in (np.cos, np.sin))
        turned, pairs = x.copy(), len(omega)
        if self.layout == "half":
            first, second = slice(0, pairs), slice(pairs, 2 * pairs)
        else:
            first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        turned[..., first] = x[..., first] * cos - x[..., second] * sin
        turned[..., second] = x[..., second] * cos + x[..., first] * sin
        if part == "q" and self.config.llama_4_scaling_beta:
            turned = turned * self.temperature(count)
        return self.tap(name, turned)

    def temperature(self, count: int) -> np.ndarray:
        scaling: Any = self.config.rope_scaling
        contexts = np.arange(count) // scaling.original_max_position_embeddings
        warm = 1 + self.config.llama_4_scaling_beta * np.log1p(contexts)
        return warm[:, None, None].astype(np.float32)

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, layer: int) -> np.ndarray:
        config, count = self.config, q.shape[1]
        k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        scale = config.attention_multiplier or 1 / math.sqrt(config.head_dim)
        scores = np.einsum("bshd,bthd->bhst", q, k) * np.float32(scale)
        if config.attn_logit_softcapping is not None:
            scores = capped(scores, config.attn_logit_softcapping)
        back = np.arange(count)[:, None] - np.arange(count)
        kinds = config.layer_types
        slides = kinds is None or kinds[layer] == "sliding_attention"
        window = config.sliding_window if slides else None
        scores = np.where((back >= 0) & (back < (window or count)), scores, -np.inf)
        sinks = np.full(q.shape[2], -np.inf, np.float32)
        if config.attention_sinks:
            sinks = self.w[f"model.layers.{layer}.self_attn.sinks"]
        sinks = sinks[:, None, None]
        top = np.maximum(scores.max(-1, keepdims=True), sinks)
        powers = np.exp(scores - top)
        weights = powers / (powers.sum(-1, keepdims=True) + np.exp(sinks - top))
        return np.einsum("bhst,bthd->bshd", weights, v)

    def mlp(self, x: np.ndarray, name: str) -> np.ndarray:
        gate, up = (self.linear(x, f"{name}.{part}_proj") for part in ("gate", "up"))
        if self.config.hidden_act == "silu":
            acted = gate / (1 + np.exp(-gate))
        else:
            inner = np.float32(math.sqrt(2 / math.pi)) * (gate + np.float32(0.044715) * gate**3)
            acted = gate / 2 * (1 + np.tanh(inner))
        return self.linear(self.tap(f"{name}.act", acted * up), f"{name}.down_proj")


def capped(y: np.ndarray, cap: float) -> np.ndarray:
    return np.float32(cap) * np.tanh(y / np.float32(cap))
