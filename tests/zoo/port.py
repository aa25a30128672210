"""A Llama forward pass in plain NumPy: every step is a method that a mistake may replace.

It shares no arithmetic with the package. It computes in float32 and rounds the result of each
operation to `dtype`; products are summed in float32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import ml_dtypes
import numpy as np

from llama_layers import LlamaConfig
from llama_layers.verify import Trace

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Port:
    """A model, its inputs, and one run that records every site.

    Arrays of heads are [batch, tokens, heads, channels]; scores are [batch, heads, queries, keys].
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: dict[str, np.ndarray],
        ids: np.ndarray,
        dtype: str = "float32",
        keep: np.ndarray | None = None,
        start: int = 0,
        chunks: tuple[int, ...] = (),
    ) -> None:
        self.config, self.dtype, self.ids, self.keep, self.start = config, dtype, ids, keep, start
        self.work: Any = np.float64 if dtype == "float64" else np.float32
        self.w = {name: self.round(array) for name, array in weights.items()}
        self.batch, self.count = ids.shape
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.width, self.layers = config.head_dim, config.num_hidden_layers
        self.eps, self.theta = config.rms_norm_eps, config.rope_theta
        self.scale = 1 / math.sqrt(self.width)
        self.chunks = chunks or (self.count,)
        self.order = list(range(self.layers))
        self.recorded: dict[str, list[np.ndarray]] = defaultdict(list)
        cache = (self.layers, self.batch, self.count + 1, self.kv, self.width)
        self.keys, self.values = np.zeros(cache, self.work), np.zeros(cache, self.work)

    def round(self, x: np.ndarray) -> np.ndarray:
        """Round to the port's format."""
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(DTYPES[self.dtype]).astype(self.work)

    def record(self, site: str, x: np.ndarray) -> np.ndarray:
        """Keep what a site holds, and hand it on."""
        self.recorded[site].append(x.copy())
        return x

    # The steps.

    def look_up(self, ids: np.ndarray) -> np.ndarray:
        return self.w["model.embed_tokens.weight"][ids]

    def positions(self, first: int, count: int) -> np.ndarray:
        """The positions of tokens from a column of the batch on, [B, count]."""
        places = np.arange(first, first + count)
        padding = np.zeros(self.batch, int) if self.keep is None else (~self.keep).sum(1)
        return np.maximum(places - padding[:, None], 0) + self.start

    def norm(self, x: np.ndarray, site: str) -> np.ndarray:
        mean = (x * x).mean(-1, keepdims=True)
        return self.round(x / np.sqrt(mean + self.work(self.eps)) * self.w[f"{site}.weight"])

    def multiply(self, x: np.ndarray, w: np.ndarray, site: str) -> np.ndarray:
        return x @ w.T

    def linear(self, x: np.ndarray, site: str) -> np.ndarray:
        y = self.multiply(x, self.matrix(site), site)
        if (bias := self.w.get(f"{site}.bias")) is not None:
            y = y + bias
        return self.round(y)

    def matrix(self, site: str) -> np.ndarray:
        tied = site == "lm_head" and self.config.tie_word_embeddings
        return self.w["model.embed_tokens.weight" if tied else f"{site}.weight"]

    def frequencies(self) -> np.ndarray:
        plain = self.theta ** (-np.arange(0, self.width, 2) / self.width)
        scaling = self.config.rope_scaling
        if scaling is None:
            return plain
        if scaling.rope_type == "linear":
            return plain / scaling.factor
        if scaling.rope_type == "llama3":
            return self.llama3(plain, scaling)
        return self.yarn(plain, scaling)

    def llama3(self, plain: np.ndarray, s: Any) -> np.ndarray:
        turns = s.original_max_position_embeddings * plain / (2 * math.pi)
        kept = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return plain * kept + plain / s.factor * (1 - kept)

    def yarn(self, plain: np.ndarray, s: Any) -> np.ndarray:
        def channel(turns: float) -> float:
            context = s.original_max_position_embeddings
            spread = math.log(context / (turns * 2 * math.pi))
            return self.width * spread / (2 * math.log(self.theta))

        low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), self.width - 1)
        ramp = np.clip((np.arange(self.width // 2) - low) / max(high - low, 1e-3), 0, 1)
        return plain * (1 - ramp) + plain / s.factor * ramp

    def magnitude(self) -> float:
        s = self.config.rope_scaling
        return 0.1 * math.log(s.factor) + 1 if s is not None and s.rope_type == "yarn" else 1.0

    def table(self, positions: np.ndarray, site: str) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, [B, S, 1, D/2]."""
        angles = positions[..., None].astype(np.float64) * self.frequencies()
        cos, sin = np.cos(angles) * self.magnitude(), np.sin(angles) * self.magnitude()
        return cos[:, :, None].astype(self.work), sin[:, :, None].astype(self.work)

    def rotate(self, x: np.ndarray, positions: np.ndarray, site: str) -> np.ndarray:
        cos, sin = self.table(positions, site)
        a, b = np.split(x, 2, -1)
        return self.round(np.concatenate([a * cos - b * sin, b * cos + a * sin], -1))

    def split(self, x: np.ndarray, site: str) -> np.ndarray:
        return x.reshape(*x.shape[:2], -1, self.width)

    def store(self, k: np.ndarray, v: np.ndarray, layer: int, past: int) -> None:
        self.keys[layer, :, past : past + k.shape[1]] = k
        self.values[layer, :, past : past + k.shape[1]] = v

    def read(self, layer: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def mask(self, count: int, past: int, layer: int) -> np.ndarray:
        """Which keys each query sees, [B or 1, 1, count, past + count]."""
        q, k = np.arange(past, past + count)[:, None], np.arange(past + count)
        seen = k <= q
        if (window := self.window(layer)) is not None:
            seen &= k > q - window
        if self.keep is None:
            return seen[None, None]
        return seen & self.keep[:, None, None, : past + count]

    def window(self, layer: int) -> int | None:
        kinds = self.config.layer_types
        full = kinds is not None and kinds[layer] == "full_attention"
        return None if full else self.config.sliding_window

    def spread(self, x: np.ndarray) -> np.ndarray:
        """A key head for each query head."""
        return np.repeat(x, self.heads // self.kv, axis=2)

    def scores(self, q: np.ndarray, k: np.ndarray, layer: int) -> np.ndarray:
        scores = np.einsum("bqhd,bkhd->bhqk", q, self.spread(k), optimize=True)
        return scores * self.work(self.scale)

    def softmax(self, scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
        masked = np.where(seen, scores, -np.inf)
        top = np.maximum(masked.max(-1, keepdims=True), -1e30)  # a row that sees nothing
        powers = np.exp(masked - top)
        return powers / np.maximum(powers.sum(-1, keepdims=True), 1e-30).astype(self.work)

    def weigh(self, p: np.ndarray, v: np.ndarray, layer: int) -> np.ndarray:
        return np.einsum("bhqk,bkhd->bqhd", p, self.spread(v), optimize=True)

    def attention(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, layer: int, past: int
    ) -> np.ndarray:
        seen = self.mask(q.shape[1], past, layer)
        return self.weigh(self.softmax(self.scores(q, k, layer), seen), v, layer)

    def activate(self, x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    def gate(self, gate: np.ndarray, up: np.ndarray, site: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            return self.round(self.activate(gate) * up)

    def add(self, x: np.ndarray, added: np.ndarray, site: str) -> np.ndarray:
        return self.round(x + added)

    # The run.

    def attend(self, h: np.ndarray, layer: int, past: int, name: str) -> np.ndarray:
        heads = {}
        for part in "qkv":
            flat = self.record(f"{name}.{part}_proj", self.linear(h, f"{name}.{part}_proj"))
            heads[part] = self.split(flat, f"{name}.{part}_proj")
        at = self.positions(past, h.shape[1])
        q = self.record(f"{name}.q_rope", self.rotate(heads["q"], at, f"{name}.q_rope"))
        k = self.record(f"{name}.k_rope", self.rotate(heads["k"], at, f"{name}.k_rope"))
        self.store(k, heads["v"], layer, past)
        k, v = self.read(layer, past + h.shape[1])
        found = self.round(self.attention(q, k, v, layer, past))
        return self.record(f"{name}.attention", found)

    def block(self, x: np.ndarray, layer: int, past: int) -> np.ndarray:
        """A decoder layer."""
        name = f"model.layers.{layer}"
        site = f"{name}.input_layernorm"
        h = self.record(site, self.norm(x, site))
        heads = self.attend(h, layer, past, f"{name}.self_attn")
        site = f"{name}.self_attn.o_proj"
        o = self.record(site, self.linear(heads.reshape(*h.shape[:2], -1), site))
        site = f"{name}.attention_residual"
        x = self.record(site, self.add(x, o, site))
        site = f"{name}.post_attention_layernorm"
        h = self.record(site, self.norm(x, site))
        return self.record(name, self.add(x, self.mlp(h, f"{name}.mlp"), name))

    def mlp(self, h: np.ndarray, name: str) -> np.ndarray:
        gate = self.record(f"{name}.gate_proj", self.linear(h, f"{name}.gate_proj"))
        up = self.record(f"{name}.up_proj", self.linear(h, f"{name}.up_proj"))
        inner = self.record(f"{name}.act", self.gate(gate, up, f"{name}.act"))
        return self.record(f"{name}.down_proj", self.linear(inner, f"{name}.down_proj"))

    def stack(self, x: np.ndarray, past: int) -> np.ndarray:
        for layer in self.order:
            x = self.block(x, layer, past)
        return x

    def head(self, x: np.ndarray) -> np.ndarray:
        return self.linear(x, "lm_head")

    def run(self) -> dict[str, np.ndarray]:
        """Each site's array, in the port's format."""
        past = 0
        for count in self.chunks:
            x = self.look_up(self.ids[:, past : past + count])
            x = self.stack(self.record("model.embed_tokens", x), past)
            x = self.record("model.norm", self.norm(x, "model.norm"))
            self.record("lm_head", self.head(x))
            past += count
        return {
            site: np.concatenate(parts, 1).astype(DTYPES[self.dtype])
            for site, parts in self.recorded.items()
        }

    def trace(self, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Trace:
        """A trace of some of the arrays, with the tokens that the port was given."""
        at = None if not self.start else np.arange(self.start, self.start + self.count)
        return Trace(arrays, self.ids, at, self.keep, metadata)
