"""A port of Llama in naive float32, with mistakes to make in it, for tests of what is diagnosed."""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import numpy as np

from llama_layers import LlamaConfig, forward
from llama_layers.verify import Trace
from tests.support.decoder_oracle import called, frequencies
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
COUNT = 14
# Queries of one layer made small or large: numbers that float16 underflows in, scores that
# exponentials overflow at, and scores below -1e4.
for name, factor in (("small", 2e-5), ("large", 100.0), ("huge", 2e4)):
    CONFIGS[name] = BASE
    role = f"model.layers.{LAYER}.self_attn.q_proj.weight"
    WEIGHTS[name] = WEIGHTS["base"] | {role: WEIGHTS["base"][role] * np.float32(factor)}


# What norms read, which is also there instead of them where a config has none.
_READ = {
    "input_layernorm": "x",
    "post_attention_layernorm": "attention_residual",
    "post_self_attn_layernorm": "self_attn.o_proj",
    "post_mlp_layernorm": "mlp.down_proj",
}


_AFTER = ("post_self_attn_layernorm", "post_mlp_layernorm")


class Port:
    """What a mistake can see: the arrays so far, the weights, and the right array in its place.

    Its formulas have the switches of the config; they are those of the naive decoder.
    """

    def __init__(
        self, config, weights, arrays, right, ids, positions, role="", layer=LAYER, layout="half"
    ):
        self.config, self.weights, self.arrays = config, weights, arrays
        self.right, self.ids, self.positions = right, ids, positions
        self.role, self.layer, self.layout = role, layer, layout

    def __getitem__(self, role):
        """An array in the same layer; "x" is what comes into it."""
        if role == "x":
            return self.arrays[
                f"model.layers.{self.layer - 1}" if self.layer else "model.embed_tokens"
            ]
        if role in _READ and not self._has(role):
            return self[_READ[role]]
        return self.arrays[f"model.layers.{self.layer}.{called(self.config, role)}"]

    def _has(self, norm):
        """Whether the config has a norm of the residual stream, or of what is added to it."""
        without = "before" if norm in _AFTER else "after"
        return self.config.norm_placement != without

    def at(self, layer):
        """The same in another layer."""
        arguments = (self.config, self.weights, self.arrays, self.right, self.ids, self.positions)
        return Port(*arguments, self.role, layer, self.layout)

    def weight(self, role, layer=None):
        layer = self.layer if layer is None else layer
        if role in _READ and not self._has(role):
            raise KeyError(role)
        return self.weights[f"model.layers.{layer}.{called(self.config, role)}.weight"]

    def bias(self, role, layer=None):
        """The bias of a projection, or zero."""
        layer = self.layer if layer is None else layer
        return self.weights.get(f"model.layers.{layer}.{role}.bias", np.float32(0))

    @property
    def own_bias(self):
        """The bias of the site itself, or zero."""
        return self.bias(self.role)

    def gain(self, role=None, layer=None):
        """What a norm multiplies by: that of the site itself, if no other is named."""
        offset = self.config.norm_weight_offset
        if role == "model.norm":
            return self.weights["model.norm.weight"] + offset
        return self.weight(self.role if role is None else role, layer) + offset

    @property
    def another_norm(self):
        """A norm of the layer that is not the site's own."""
        before = self.config.norm_placement != "after"
        return "post_attention_layernorm" if before else "post_mlp_layernorm"

    @property
    def read(self):
        """What the site reads, if it is a norm or RoPE."""
        if self.role in _READ:
            return self[_READ[self.role]]
        part = "q" if "q_" in self.role else "k"
        normed = self.config.qk_norm != "none"
        before = normed and not self.config.qk_norm_after_rope
        if self.role.endswith("_rope"):
            return self[f"self_attn.{part}_norm" if before else f"self_attn.{part}_proj"]
        return self[f"self_attn.{part}_proj" if before else f"self_attn.{part}_rope"]

    def split(self, array):
        """An array as heads."""
        return array.reshape(*array.shape[:2], -1, self.config.head_dim)

    def heads(self, role):
        return self.split(self[role])

    @property
    def unturned(self):
        """The heads that RoPE reads."""
        return self.split(self.read)

    # RoPE.

    @property
    def theta(self):
        """The base of this layer's frequencies."""
        thetas = self.config.layer_rope_theta
        return self.config.rope_theta if thetas is None else thetas[self.layer]

    def omega(self, **others):
        """Frequencies with the scaling of this layer, of a config with other fields."""
        return np.array(self._frequencies(**others)[0])

    def _frequencies(self, **others):
        config = replace(self.config, layer_rope_theta=None, rope_theta=self.theta or 1.0)
        return frequencies(replace(config, **others), COUNT, self.layer)

    def plain(self, width=None):
        """Frequencies without scaling, for so many channels."""
        width = width or int(self.config.head_dim * self.config.partial_rotary_factor)
        return np.array([self.theta ** (-2 * i / width) for i in range(width // 2)])

    @property
    def factor(self):
        """What cosines and sines are multiplied by."""
        return self._frequencies()[1]

    @property
    def warmth(self):
        """The temperature of each query."""
        scaling = self.config.rope_scaling
        trained = scaling.original_max_position_embeddings
        return 1 + self.config.llama_4_scaling_beta * np.log(1 + np.arange(COUNT) // trained)

    def turned(
        self, x, omega=None, *, places=None, phases=None, layout=None, factor=None, warm=True, **how
    ):
        """x [B, S, heads, D], turned as this layer turns it but for what is given."""
        if self.theta == 0 and omega is None and phases is None:
            return x
        if phases is None:
            places = np.arange(COUNT) if places is None else places
            phases = np.outer(places, self.omega() if omega is None else omega)
        factor = self.factor if factor is None else factor
        y = turned(x, phases, layout or self.layout, factor, **how)
        warm = warm and self.config.llama_4_scaling_beta and self.role == "self_attn.q_rope"
        return y * self.warmth[:, None, None] if warm else y

    # Attention.

    @property
    def qkv(self):
        """The heads that attention reads."""
        last = "norm" if self.config.qk_norm_after_rope else "rope"
        return [self.heads(f"self_attn.{part}") for part in (f"q_{last}", f"k_{last}", "v_proj")]

    @property
    def scale(self):
        return self.config.attention_multiplier or 1 / math.sqrt(self.config.head_dim)

    @property
    def allowed(self):
        """Which keys each query sees."""
        kinds = self.config.layer_types
        full = kinds is not None and kinds[self.layer] == "full_attention"
        return causal(COUNT, None if full else self.config.sliding_window)

    @property
    def sinks(self):
        return self.weights.get(f"model.layers.{self.layer}.self_attn.sinks")

    def attended(self, q, k, v, allowed=None, scale=None, **how):
        """Attention as this layer computes it, but for what is given."""
        how = {"cap": self.config.attn_logit_softcapping, "sinks": self.sinks, **how}
        allowed = self.allowed if allowed is None else allowed
        return attended(q, k, v, allowed, self.scale if scale is None else scale, **how)

    # The rest.

    @property
    def times(self):
        """What is multiplied with a block before it is added."""
        return np.float32(self.config.residual_multiplier)

    @property
    def block(self):
        """What a block computes, for a site that adds it to the residual stream."""
        attention = self.role == "attention_residual"
        return self["post_self_attn_layernorm" if attention else "post_mlp_layernorm"]

    @property
    def added(self):
        return self.times * self.block

    def act(self, x):
        return {"silu": silu, "gelu_pytorch_tanh": gelu}[self.config.hidden_act](x)

    def rows(self, ids, table=None):
        """Rows of the embedding, as they enter the first layer."""
        table = self.weights["model.embed_tokens.weight"] if table is None else table
        return table[ids] * np.float32(self.config.embedding_multiplier)

    @property
    def head(self):
        tied = self.config.tie_word_embeddings
        return self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]


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


def omega(config, theta=None):
    """Plain frequencies."""
    half = config.head_dim // 2
    theta = config.rope_theta if theta is None else theta
    return np.array([theta ** (-2 * i / config.head_dim) for i in range(half)])


def turned(
    x,
    phases,
    layout="half",
    factor=1.0,
    sign=1,
    rounding=lambda numbers: numbers,
    table=(np.cos, np.sin),
):
    """x [B, S, heads, D] turned by phases [S, n], pair by pair of its first 2 n channels."""
    x = x.astype(np.float64)
    y = x.copy()
    half = phases.shape[1]
    for i in range(half):
        a, b = (i, i + half) if layout == "half" else (2 * i, 2 * i + 1)
        cos, sin = (rounding(factor * f(phases[:, i])[None, :, None]) for f in table)
        sin = sign * sin
        y[..., a] = x[..., a] * cos - x[..., b] * sin
        y[..., b] = x[..., a] * sin + x[..., b] * cos
    return y


def causal(count, window=None):
    query, key = np.mgrid[:count, :count]
    return (key <= query) & (key > query - (window or count))


def attended(
    q, k, v, allowed, scale=None, hidden=-np.inf, kv_of=None, weights=None, cap=None, sinks=None
):
    """Attention one head at a time; `weights` may make other weights of the scores.

    `sinks` join the scores of their heads as those of one more key, of which the value is zero.
    """
    heads, groups = q.shape[2], k.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    allowed = np.broadcast_to(allowed, (len(q), q.shape[1], k.shape[1]))
    y = np.zeros(q.shape)
    for h in range(heads):
        kv = h * groups // heads if kv_of is None else kv_of(h)
        scores = np.einsum("bsd,btd->bst", q[:, :, h], k[:, :, kv]).astype(np.float64) * scale
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        scores = np.where(allowed, scores, hidden)
        if sinks is not None:
            scores = np.pad(scores, ((0, 0), (0, 0), (0, 1)), constant_values=sinks[h])
        p = (softmax if weights is None else weights)(scores)[..., : k.shape[1]]
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


def gelu(x):
    x = x.astype(np.float64)
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def narrow(array, dtype=ml_dtypes.bfloat16):
    return array.astype(dtype).astype(np.float32)
