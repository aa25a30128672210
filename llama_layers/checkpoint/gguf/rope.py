"""RoPE in a GGUF file: its keys, and tensors that divide its frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isclose, log
from typing import Any

import numpy as np

from llama_layers.checkpoint.gguf.metadata import Section
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.config.rope_scaling import RopeScaling
from llama_layers.errors import ConfigError
from llama_layers.layers.rope import inv_freq

# Tensors that divide frequencies, and the architectures in which llama.cpp reads them.
LLAMA3, LONG, SHORT = (f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short"))
DIVISORS = {
    LLAMA3: {"llama", "mistral3", "granite", "granite_swa", "exaone", "exaone4"},
    LONG: {"phi3"},
    SHORT: {"phi3"},
}
# Architectures that rotate a part of each head.
PARTIAL = frozenset({"chatglm", "glm4", "phi3"})
# The layers of SmolLM3 that have no RoPE are in llama.cpp's code: each fourth.
_STEP = 4


def rope_fields(
    architecture: str,
    own: Section,
    divisors: Mapping[str, np.ndarray],
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of RoPE, without what `with_llama3_scaling` adds, given others of the config."""
    theta = decimal(own.number("rope.freq_base", 10000.0))
    if architecture == "hunyuan-dense" and (alpha := decimal(own.number("rope.scaling.alpha"))) > 0:
        theta *= alpha ** _ntk_exponent(own, fields)
    found: dict[str, Any] = {"rope_theta": theta}
    if architecture == "smollm3":
        layers = fields["num_hidden_layers"]
        found["layer_rope_theta"] = [theta if i % _STEP else 0.0 for i in range(1, layers + 1)]
    if architecture == "mistral3":
        beta = decimal(own.number("attention.temperature_scale", 0.0))
        found["llama_4_scaling_beta"] = beta
    if architecture in PARTIAL:
        found |= _part(own, fields)
    if LONG in divisors or SHORT in divisors:
        found["rope_scaling"] = _longrope(own, divisors, fields["max_position_embeddings"])
    else:
        found["rope_scaling"] = _scaling(own, architecture)
    scaling = found["rope_scaling"]
    if architecture == "mistral3" and (scaling is None or scaling.rope_type == "linear"):
        context = own.integer("rope.scaling.original_context_length")
        found["llama_4_scaling_context"] = context or None
    return found


def _head_dim(fields: Mapping[str, Any]) -> int:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    return int(fields.get("head_dim") or max(1, hidden // heads))


def _ntk_exponent(own: Section, fields: Mapping[str, Any]) -> float:
    """The power of HunYuan's alpha by which theta is multiplied."""
    if (dim := _head_dim(fields)) <= 2:
        raise own.error(
            "rope.scaling.alpha", f"expected a head_dim of more than 2 with it, got {dim}"
        )
    return dim / (dim - 2)


def _part(own: Section, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a head that is rotated."""
    head_dim = _head_dim(fields)
    width = own.integer("rope.dimension_count", head_dim)
    if not 0 < width <= head_dim:
        raise own.error("rope.dimension_count", f"expected 1 to {head_dim}, got {width}")
    return {"partial_rotary_factor": width / head_dim}


def _longrope(own: Section, divisors: Mapping[str, np.ndarray], context: int) -> RopeScaling:
    """The scaling that two tensors stand for. llama.cpp takes one by the size of its context."""
    if missing := [name for name in (LONG, SHORT) if name not in divisors]:
        raise ConfigError(f"{missing[0]}: missing, and the other is there")
    key = "rope.scaling.original_context_length"
    trained = own.integer(key, context)
    if trained < 1:
        raise own.error(key, f"expected a positive integer, got {trained}")
    return RopeScaling(
        "longrope",
        factor=context / trained,
        original_max_position_embeddings=trained,
        short_factor=tuple(map(decimal, divisors[SHORT].tolist())),
        long_factor=tuple(map(decimal, divisors[LONG].tolist())),
        attention_factor=decimal(own.number("rope.scaling.attn_factor", 1.0)),
    )


def decimal(value: float) -> float:
    """The shortest decimal that rounds to a float32, which is how GGUF stores numbers.

    config.json says 1e-05, and the nearest float32 is 9.99999975e-06 as a float64. Any
    decimal of up to 6 digits comes back from float32 as it was (FLT_DIG of the C standard), and
    the numbers of a config have fewer.
    """
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value


def _scaling(own: Section, architecture: str) -> RopeScaling | None:
    """The scaling of RoPE, without what a tensor of divisors may add."""
    kind = own.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(f"rope.scaling.type: expected none, linear or yarn, got {kind!r}")
    factor = decimal(own.number("rope.scaling.factor", own.number("rope.scale_linear"))) or 1.0
    attention_factor = decimal(own.number("rope.scaling.attn_factor", 1.0))
    if kind == "yarn" and factor != 1.0:
        return _yarn(own, factor, attention_factor, architecture)
    if attention_factor != 1.0:
        raise ConfigError(
            f"rope.scaling.attn_factor: expected 1.0 without yarn, got {attention_factor!r}"
        )
    return None if kind == "none" or factor == 1.0 else RopeScaling("linear", factor=factor)


def _yarn(own: Section, factor: float, attention_factor: float, architecture: str) -> RopeScaling:
    """The scaling of type yarn, in which llama.cpp's attention factor multiplies the usual one."""
    if (value := own.number("rope.scaling.yarn_ext_factor", 1.0)) not in (1.0, -1.0):
        raise ConfigError(f"rope.scaling.yarn_ext_factor: expected 1.0, got {value!r}")
    betas: dict[str, Any] = {
        name: decimal(own.number(f"rope.scaling.yarn_{name}"))
        for name in ("beta_fast", "beta_slow")
        if f"rope.scaling.yarn_{name}" in own
    }
    usual = 0.1 * log(factor) + 1 if factor > 1 else 1.0
    if architecture == "mistral3" and (share := own.number("rope.scaling.yarn_log_multiplier")):
        betas |= {"mscale": 1.0, "mscale_all_dim": decimal(share)}
        usual = usual / (0.1 * share * log(factor) + 1) if factor > 1 else 1.0
    # config.json's attention_factor, by which OLMo 3 says the usual one; llama.cpp ignores it.
    stated = decimal(own.number("rope.scaling.yarn_attn_factor", usual))
    whole = attention_factor * (usual if isclose(stated, usual, rel_tol=1e-6) else stated)
    return RopeScaling(
        "yarn",
        factor=factor,
        original_max_position_embeddings=own.integer("rope.scaling.original_context_length")
        or None,
        attention_factor=None if whole == usual else whole,
        **betas,
    )


def with_llama3_scaling(config: LlamaConfig, factors: np.ndarray) -> LlamaConfig:
    """The config with the "llama3" scaling that a file's table of divisors stands for.

    llama.cpp keeps the divisors of the frequencies and drops the four numbers they came from. The
    largest divisor is the factor; the other three are the same in every published model (1, 4 and
    8192), and the table is recomputed from them, so a table of anything else is refused.
    """
    if config.rope_scaling is not None:
        raise ConfigError("rope.scaling: expected none beside rope_freqs.weight")
    if factors.shape != (config.head_dim // 2,) or not np.all(np.isfinite(factors) & (factors > 0)):
        raise ConfigError(
            f"rope_freqs.weight: expected {config.head_dim // 2} positive numbers, one for each "
            f"pair of channels"
        )
    scaling = RopeScaling(
        "llama3",
        factor=max(1.0, decimal(float(factors[-1]))),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    scaled = replace(config, rope_scaling=scaling)
    # The table was computed in float32, with a cancellation that costs it two digits or so.
    if not np.allclose(factors, inv_freq(config) / inv_freq(scaled), rtol=1e-4, atol=0):
        raise ConfigError(
            "rope_freqs.weight: expected the factors of llama3 scaling with low_freq_factor 1, "
            "high_freq_factor 4 and original_max_position_embeddings 8192, got others"
        )
    return scaled
