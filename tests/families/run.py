"""What `check` says of a port of a family in which one mistake is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llama_layers import Llama, LlamaConfig
from llama_layers.verify import Report, Trace, check
from tests.families.configs import CONFIGS, INTERLEAVED
from tests.families.port import Arrays, Run
from tests.support.decoder_oracle import called
from tests.support.mistakes import MISTAKES as EVERY
from tests.support.mistakes import Mistake, formulas
from tests.support.mistakes.mistake import NORM
from tests.support.ported import COUNT, LAYER, Port
from tests.support.random_models import model_of, random_weights

# The configs in which the tests of mistakes have them, and what makes such a layer of a family.
_NEEDS = {
    "base": lambda c, layer: _rotates(c, layer),
    "biases": lambda c, layer: c.qkv_bias,
    "biases of the MLP": lambda c, layer: c.mlp_bias,
    "window": lambda c, layer: c.window_of(layer) is not None,
    "some windows": lambda c, layer: c.sliding_window and c.window_of(layer) is None,
    "linear": lambda c, layer: _scaled(c, layer, "linear"),
    "yarn": lambda c, layer: _scaled(c, layer, "yarn"),
    "llama3": lambda c, layer: _scaled(c, layer, "llama3"),
    "longrope": lambda c, layer: _scaled(c, layer, "longrope"),
    "temperature": lambda c, layer: c.llama_4_scaling_beta,
    "interleaved": lambda c, layer: c.model_type in INTERLEAVED,
    "theta by layer": lambda c, layer: (
        _rotates(c, layer) and c.rope_kinds[0] not in (None, c.rope_kinds[layer])
    ),
    "layer without RoPE": lambda c, layer: not _rotates(c, layer),
    "partial RoPE": lambda c, layer: (
        c.partial_rotary_factor < 1 and not _scaled(c, layer, "longrope")
    ),
    "norms on both sides": lambda c, layer: c.norm_placement == "both",
    "norms after": lambda c, layer: c.norm_placement == "after",
    "norms of projections": lambda c, layer: c.qk_norm == "full",
    "norms of heads": lambda c, layer: c.qk_norm == "head" and not c.qk_norm_after_rope,
    "norms after RoPE": lambda c, layer: c.qk_norm_after_rope,
    "sinks": lambda c, layer: c.attention_sinks,
    "gemma": lambda c, layer: c.norm_weight_offset,
    "multipliers": lambda c, layer: c.residual_multiplier != 1,
    "gelu": lambda c, layer: c.hidden_act != "silu",
    "cap of scores": lambda c, layer: c.attn_logit_softcapping,
    "cap of logits": lambda c, layer: c.final_logit_softcapping,
    "logits": lambda c, layer: c.changes_logits,
}
# What a mistake with silu is called where gelu is right.
_GELU = {
    "gelu for silu": "gelu with erf for gelu",
    "gelu (sigmoid) for silu": "gelu with sigmoid for gelu",
}
# Those whose code has the switches of a config; the others are of Llama alone.
MISTAKES = [mistake for mistake in EVERY if mistake not in formulas.MISTAKES]
# How much of the largest number at a site a mistake must change to be more than rounding.
_BEYOND = 2e-5


@dataclass(frozen=True)
class Found:
    """What was found of a mistake in a family."""

    mistake: str
    number: int
    """Of the mistake in the list."""
    family: str
    expected: str
    """The site where it was made."""
    failing: tuple[str, ...]
    """The sites that fail."""
    names: tuple[str, ...]
    right: tuple[str, ...]
    """The names that are right."""

    @property
    def located(self) -> bool:
        """Whether the site, and no other, fails."""
        return self.failing == (self.expected,)

    @property
    def grade(self) -> str:
        """ "right", "near" where another name comes first, "none" or "wrong"."""
        if not self.names:
            return "none"
        if self.names[0] in self.right:
            return "right"
        return "near" if set(self.names) & set(self.right) else "wrong"


def _rotates(config: LlamaConfig, layer: int) -> bool:
    return config.layer_rope_theta is None or config.layer_rope_theta[layer] != 0


def _scaled(config: LlamaConfig, layer: int, kind: str) -> bool:
    rope = config.rope_of(layer)
    return (
        rope is not None and rope.rope_scaling is not None and (rope.rope_scaling.rope_type == kind)
    )


@lru_cache
def made(family: str) -> tuple[LlamaConfig, Arrays, Llama, str]:
    """A config, weights as its files have them, the model of them, and RoPE's layout."""
    config = CONFIGS[family]
    weights = random_weights(config, dtype=np.float32)
    model = model_of(config, weights)
    if family not in INTERLEAVED:
        return config, weights, model, "half"
    width = int(config.head_dim * config.partial_rotary_factor)
    order = np.arange(config.head_dim)
    order[:width] = np.arange(width).reshape(2, -1).T.ravel()
    stored = dict(weights)
    for name, array in weights.items():
        if "self_attn.q_proj" in name or "self_attn.k_proj" in name:
            heads = array.reshape(-1, config.head_dim, *array.shape[1:])
            stored[name] = heads[:, order].reshape(array.shape)
    return config, stored, model, "interleaved"


def ran(family: str, mistake: Mistake | None = None) -> tuple[Trace, str]:
    """The trace of a port, with a mistake, and the site where that is more than rounding.

    The site is empty if there is none: the family has no such step, or the mistake does nothing.
    """
    config, weights, _, layout = made(family)
    ids = np.random.default_rng(5).integers(0, config.vocab_size, (2, COUNT))
    arrays: Arrays = {}
    site, role, layer = "", "", LAYER
    if mistake is not None and (layer := _layer(config, mistake)) is not None:
        role = mistake.role
        if role == NORM and config.norm_placement == "after":
            role = "post_self_attn_layernorm"
        site = _site(config, role, layer)
    found = ""

    def tap(at: str, array: np.ndarray) -> np.ndarray:
        nonlocal found
        array = np.asarray(array, np.float32)
        if at == site:
            port = Port(config, weights, arrays, array, ids, np.arange(COUNT), role, layer, layout)
            wrong = mistake.wrong(port).astype(np.float32).reshape(array.shape)
            if not np.abs(wrong - array).max() <= _BEYOND * np.abs(array).max():
                found, array = at, wrong
        arrays[at] = array
        return array

    with np.errstate(all="ignore"):
        Run(config, weights, layout, tap).logits(ids)
    metadata = {"rope_layout": layout} if layout != "half" else {}
    return Trace(arrays, ids, metadata=metadata), found


def _layer(config: LlamaConfig, mistake: Mistake) -> int | None:
    """The layer in which the mistake is made: the second, if it can be made there."""
    if mistake.padded or mistake.first or mistake.config not in _NEEDS:
        return None
    order = sorted(range(config.num_hidden_layers), key=lambda layer: layer != LAYER)
    return next((layer for layer in order if _NEEDS[mistake.config](config, layer)), None)


def _site(config: LlamaConfig, role: str, layer: int) -> str:
    if role.startswith(("model.", "lm_head", "logits")):
        return role
    return f"model.layers.{layer}.{called(config, role)}".removesuffix(".")


def report_of(family: str) -> Report:
    """What is said of a port without a mistake."""
    return check(ran(family)[0], made(family)[2])


def found(family: str, number: int) -> Found | None:
    """What `check` says of a mistake in a family; None if it cannot be made there."""
    mistake = MISTAKES[number]
    try:
        trace, site = ran(family, mistake)
    except KeyError:  # an array or a weight that the family does not have
        return None
    if not site:
        return None
    report = check(trace, made(family)[2])
    failing = tuple(result.site.name for result in report.failures)
    names = tuple(e.name for e in report.first.explanations) if failing else ()
    name = mistake.name
    if name.endswith("for silu") and made(family)[0].hidden_act != "silu":
        name = _GELU.get(name, name.replace("silu", "gelu"))
    right = (name, *mistake.also)
    return Found(mistake.name, number, family, site, failing, names, right)


def share(part: int, of: int) -> Iterator[tuple[str, int]]:
    """A part of the families and mistakes: each mistake in some families, each in another one."""
    for place, family in enumerate(CONFIGS):
        for number in range((part - place) % of, len(MISTAKES), of):
            yield family, number
