"""What a mistake of a port is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.support.ported import COUNT, LAYER


class Mistake(NamedTuple):
    name: str
    role: str
    wrong: object
    config: str = "base"
    also: tuple[str, ...] = ()
    """Other mistakes that leave the same array, or one too much like it."""
    padded: bool = False
    first: int = 0
    """The position of the first token."""
    dtype: object = np.float32

    @property
    def site(self):
        if self.role.startswith(("model.", "lm_head", "logits")):
            return self.role
        return f"model.layers.{LAYER}.{self.role}".removesuffix(".")


PLACES = np.arange(COUNT)
Q, K, V, OUT = (f"self_attn.{name}_proj" for name in "qkvo")
Q_ROPE, K_ROPE = "self_attn.q_rope", "self_attn.k_rope"
ATTENTION = "self_attn.attention"
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
NORM, RESIDUAL, ACT = "input_layernorm", "attention_residual", "mlp.act"
EMBEDDING = "model.embed_tokens"
