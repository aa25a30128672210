"""What a mistake of a port can see, and the steps of the port without it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tests.support.decoder_oracle import called, frequencies
from tests.support.naive_steps import attended, causal, gelu, silu, turned

LAYER = 1  # in which a port has its mistake
COUNT = 14
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
        """The frequencies of a number of channels, without scaling."""
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
