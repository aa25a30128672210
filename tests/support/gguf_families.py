"""Tiny GGUF files of each architecture that is read, with the switches that metadata can set."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from llama_layers import LlamaConfig
from llama_layers.config.families import SWITCHES
from tests.support import tiny


@dataclass(frozen=True)
class Case:
    """What a file says beside what all say, and the config that it stands for."""

    keys: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    others: dict[str, Any] = field(default_factory=dict)
    """Tensors that are not weights."""


QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
PLAIN = tiny.CONFIG
THETA = PLAIN.rope_theta
BIASED = {"attention_bias": True}
WIDER = {"attention.key_length": 12, "attention.value_length": 12}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
IS_LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}
IS_YARN = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
}
MULTIPLIERS = {
    "embedding_scale": 12.0,
    "attention.scale": 0.1,
    "residual_scale": 0.22,
    "logit_scale": 6.0,
}
ARE_MULTIPLIED = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}


def llama3_divisors(theta, dim, factor, low=1.0, high=4.0, context=8192):
    """What llama.cpp writes for Llama 3.1: in float32, by wavelength."""
    result = []
    for i in range(0, dim, 2):
        frequency = np.float32(1) / np.float32(theta) ** np.float32(i / dim)
        wavelength = np.float32(2 * np.pi) / frequency
        if wavelength < context / high:
            result.append(1.0)
        elif wavelength > context / low:
            result.append(factor)
        else:
            smooth = (np.float32(context) / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


def of_llama3(**changes: Any) -> Case:
    """A table of divisors."""
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return Case(
        {"rope.freq_base": 5e5, "logit_scale": 1.0},
        {"rope_theta": 5e5, "rope_scaling": scaling} | changes,
        others={"rope_freqs.weight": llama3_divisors(5e5, 8, 32.0)},
    )


def window(layers: str, *, said: bool = True, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A window of 7 tokens in the layers with an L, as a file says it, and a config."""
    keys: dict[str, Any] = {"attention.sliding_window": 7}
    if said:
        keys["attention.sliding_window_pattern"] = [layer == "L" for layer in layers]
    kinds = {"L": "sliding_attention", "G": "full_attention"}
    changes = {
        "num_hidden_layers": len(layers),
        "sliding_window": 7,
        "layer_types": tuple(kinds[layer] for layer in layers),
    }
    return keys, changes | more


def windows(layers: str, keys: dict[str, Any], /, *, said: bool = True, **more: Any) -> Case:
    """A case with a window, and other keys."""
    own, changes = window(layers, said=said, **more)
    return Case(own | keys, changes)


# llama.cpp's files of Gemma hold norms with 1 added, and it does not round the embedding's factor.
GEMMA = {
    "norm_weight_offset": 0.0,
    "embedding_multiplier_rounded": False,
    "tie_word_embeddings": True,
}
GEMMA_2 = GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
CAPS_OF_GEMMA_2 = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
GEMMA_3 = GEMMA | {"model_type": "gemma3_text", "final_logit_softcapping": None}
FULL, LOCAL = 500.0, 30.0


def local(layers: str) -> tuple[float, ...]:
    """The theta of each layer of Gemma 3."""
    return tuple(LOCAL if layer == "L" else FULL for layer in layers)


def of_phi(original: int, context: int) -> Case:
    """A Phi-4-mini whose head is rotated in part, with both tables of its longrope."""
    short, long = (1.0, 1.1, 1.2), (1.5, 3.0, 8.0)
    keys = {
        "context_length": context,
        "rope.dimension_count": 6,
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": 1.25,
    }
    scaling = {
        "rope_type": "longrope",
        "factor": context / original,
        "original_max_position_embeddings": original,
        "short_factor": short,
        "long_factor": long,
        "attention_factor": 1.25,
    }
    changes = {
        "max_position_embeddings": context,
        "partial_rotary_factor": 0.75,
        "rope_scaling": scaling,
    }
    tables = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    return Case(keys, changes, (QKV, GATE_UP), tables)


# By architecture, and what is special.
CASES = {
    "llama": Case(),
    "llama, biases": Case({}, BIASED | {"mlp_bias": True}),
    "llama, biases without the output": Case({}, BIASED | {"attention_out_bias": False}),
    "llama, other heads, tied": Case(WIDER, {"head_dim": 12, "tie_word_embeddings": True}),
    "llama, linear": Case(LINEAR, IS_LINEAR),
    "llama, yarn": Case(YARN, IS_YARN),
    "llama, yarn whose factor is multiplied": Case(
        YARN | {"rope.scaling.attn_factor": 0.5},
        {
            "rope_scaling": IS_YARN["rope_scaling"]
            | {"attention_factor": 0.5 * (0.1 * math.log(4) + 1)}
        },
    ),
    "llama, divisors": of_llama3(),
    "qwen2": Case(),
    "qwen2, yarn": Case(YARN, IS_YARN),
    "qwen3": Case(WIDER, {"head_dim": 12}),
    "qwen3, yarn": Case(YARN, IS_YARN),
    "granite": Case(MULTIPLIERS, ARE_MULTIPLIED),
    "granite, biases": Case({"logit_scale": 1.0}, BIASED | {"mlp_bias": True}),
    "granite, divisors": of_llama3(),
    "granite, no RoPE": Case(
        MULTIPLIERS | {"rope.scaling.finetuned": False},
        ARE_MULTIPLIED | {"layer_rope_theta": (0.0, 0.0)},
    ),
    "ernie4_5": Case(WIDER, {"head_dim": 12}),
    "exaone": Case(),
    "exaone, divisors": of_llama3(),
    "seed_oss": Case(WIDER, BIASED | {"head_dim": 12}),
    "smollm3": Case({}, {"num_hidden_layers": 4, "layer_rope_theta": (*(THETA,) * 3, 0.0)}),
    "smollm3, yarn": Case(
        YARN, IS_YARN | {"num_hidden_layers": 4, "layer_rope_theta": (*(THETA,) * 3, 0.0)}
    ),
    "mistral3": Case({}, {"model_type": "ministral3"}),
    "mistral3, divisors": of_llama3(model_type="ministral3"),
    "mistral3, yarn": Case(
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 16.0,
            "rope.scaling.original_context_length": 8,
            "rope.scaling.yarn_beta_fast": 4.0,
            "rope.scaling.yarn_beta_slow": 0.5,
            "rope.scaling.yarn_log_multiplier": 0.5,
            "attention.temperature_scale": 0.3,
            **WIDER,
        },
        {
            "model_type": "ministral3",
            "head_dim": 12,
            "llama_4_scaling_beta": 0.3,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
            },
        },
    ),
    "phi3": Case(fused=(QKV, GATE_UP)),
    "phi3, longrope within the trained context": of_phi(512, 1024),
    "phi3, longrope beyond the trained context": of_phi(16, 64),
    "gemma": Case(WIDER, GEMMA | {"head_dim": 12}),
    "gemma2": windows("LGLG", CAPS_OF_GEMMA_2 | WIDER, said=False, **GEMMA_2, head_dim=12),
    "gemma2, linear, theta and windows by layer": windows(
        "GLLL",
        CAPS_OF_GEMMA_2 | LINEAR | {"rope.freq_base": FULL, "rope.freq_base_swa": LOCAL},
        **GEMMA_2,
        **IS_LINEAR,
        rope_theta=FULL,
        layer_rope_theta=local("GLLL"),
    ),
    "gemma2, 27B": windows(
        "LG" * 23,
        CAPS_OF_GEMMA_2 | WIDER,
        said=False,
        **GEMMA_2,
        head_dim=12,
        attention_multiplier=8**-0.5,
    ),
    "gemma3": windows(
        "LLLLLGLL",
        LINEAR | {"rope.freq_base": FULL, "rope.freq_base_swa": LOCAL} | WIDER,
        said=False,
        **GEMMA_3,
        **IS_LINEAR,
        head_dim=12,
        rope_theta=FULL,
        layer_rope_theta=local("LLLLLGLL"),
        sliding_rope_scaling=False,
    ),
    "gemma3, windows by layer, capped": windows(
        "GLLG",
        {"rope.freq_base": FULL, "final_logit_softcapping": 4.0},
        **GEMMA_3 | {"final_logit_softcapping": 4.0},
        rope_theta=FULL,
        layer_rope_theta=(FULL, 1e4, 1e4, FULL),
    ),
    "gemma3, no window": Case({}, GEMMA_3),
    "gemma3, 27B": windows(
        "LLLLLG" * 10 + "LL",
        {"rope.freq_base_swa": THETA} | WIDER,
        said=False,
        **GEMMA_3,
        head_dim=12,
        attention_multiplier=8**-0.5,
    ),
    "olmo2": Case(),
    "olmo2, windows": windows(
        "LLLG", YARN, **IS_YARN, model_type="olmo3", sliding_rope_scaling=False
    ),
    "olmo2, windows by layer, linear": windows(
        "LGGL",
        {"rope.scaling.factor": 4.0},
        **IS_LINEAR,
        model_type="olmo3",
        sliding_rope_scaling=False,
    ),
    "exaone4": Case(),
    "exaone4, divisors": of_llama3(),
    "exaone4, windows": windows(
        "LLLG" * 16, {}, said=False, layer_rope_theta=(*(THETA,) * 3, 0.0) * 16
    ),
    "exaone4, windows by layer": windows("GL" * 32, {}, layer_rope_theta=(0.0, THETA) * 32),
    "chatglm": Case(
        {"rope.dimension_count": 4},
        BIASED | {"model_type": "glm", "partial_rotary_factor": 0.5},
        (QKV, GATE_UP),
    ),
    "glm4": Case({"rope.dimension_count": 4}, {"partial_rotary_factor": 0.5}, (GATE_UP,)),
    "glm4, biases, other heads": Case(
        {"rope.dimension_count": 6} | WIDER,
        BIASED | {"partial_rotary_factor": 0.5, "head_dim": 12},
        (QKV, GATE_UP),
    ),
    "hunyuan-dense": Case(WIDER, {"model_type": "hunyuan_v1_dense", "head_dim": 12}),
    "hunyuan-dense, alpha": Case(
        {"rope.scaling.alpha": 50.0},
        BIASED
        | {
            "attention_out_bias": False,
            "model_type": "hunyuan_v1_dense",
            "rope_theta": THETA * 50.0 ** (8 / 6),
        },
    ),
    "granite_swa": windows(
        "LGLL",
        MULTIPLIERS | {"attention.rope_pattern": [True, False, True, True]},
        **ARE_MULTIPLIED,
        model_type="granite_swa",
        layer_rope_theta=(THETA, 0.0, THETA, THETA),
    ),
    "granite_swa, biases": windows(
        "GLGL",
        {"logit_scale": 1.0},
        **BIASED | {"mlp_bias": True, "tie_word_embeddings": True},
        model_type="granite_swa",
    ),
}
# Those that llama.cpp does not load, or in which it ignores a key that transformers reads.
NOT_IN_LLAMA_CPP = {
    "ernie4_5, biases": Case({}, BIASED | {"mlp_bias": True}),
    # It has windows in models of 64 layers alone.
    "exaone4, windows in few layers": windows("LG", {}, layer_rope_theta=(THETA, 0.0)),
    # It has none here.
    "phi3, window": Case({"attention.sliding_window": 7}, {"sliding_window": 7}, (QKV, GATE_UP)),
    # It has one theta.
    "olmo2, theta by layer": windows(
        "LLG",
        {"rope.freq_base_swa": LOCAL},
        model_type="olmo3",
        layer_rope_theta=(LOCAL, LOCAL, THETA),
    ),
    # It reads these of mistral3 alone.
    "llama, yarn with another ramp": Case(
        YARN | {"rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 0.5},
        {"rope_scaling": IS_YARN["rope_scaling"] | {"beta_fast": 4.0, "beta_slow": 0.5}},
    ),
}
EVERY = CASES | NOT_IN_LLAMA_CPP


def architecture_of(case: str) -> str:
    """What a case's file says that it is."""
    return case.partition(",")[0]


def config_of(case: str) -> LlamaConfig:
    """The config of a case: that of tiny weights, with the switches of its family."""
    plain = {each.name: getattr(PLAIN, each.name) for each in fields(PLAIN)}
    given = {name: value for name, value in plain.items() if name not in SWITCHES}
    return LlamaConfig(**given | {"model_type": architecture_of(case)} | EVERY[case].changes)


def weights_of(config: LlamaConfig) -> dict[str, np.ndarray]:
    """Random weights of a size that makes attention sharp, with norms around 1."""
    deep = 4 / max(4, config.num_hidden_layers)  # or rounding errors grow from layer to layer
    return {
        name: np.float32(0.3 * array + 1) if "norm" in name else np.float32(0.3 * deep**0.5 * array)
        for name, array in tiny.arrays(config).items()
    }


def write(file: Any, case: str, metadata: Any = ()) -> Any:
    """Write the file of a case; `metadata` is more of it."""
    config, own, architecture = config_of(case), EVERY[case], architecture_of(case)
    weights = weights_of(config)
    if architecture in tiny.ROTATES_NEIGHBOURS:
        weights = tiny.with_permuted_rope_rows(weights, config)
    return tiny.write_gguf(
        file,
        tiny.fused(weights, own.fused) if own.fused else weights,
        config,
        architecture=architecture,
        keys={"rope.freq_base": THETA} | own.keys,
        others=own.others,
        metadata=metadata,
        permute=False,
    )
