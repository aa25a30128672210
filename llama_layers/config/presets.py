"""The published sizes.

Sources: for Llama 1 table 2 of arXiv:2302.13971, for Llama 2 arXiv:2307.09288, for Llama 3 and
3.1 table 3 of arXiv:2407.21783, for Qwen3 table 1 of arXiv:2505.09388, for OLMo 2
arXiv:2501.00656 and OLMo-core's ``TransformerConfig.olmo2_32B``; intermediate sizes, eps and the
rest from the config.json of the checkpoints. Phi-4's has the tokens that it was corrected to:
https://huggingface.co/microsoft/phi-4/commit/6fbb3d3bbe726c99b4188087b4deeec1bceac5ae
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from llama_layers.config.family import last_of_several_full

Config = TypeVar("Config")

LLAMA_1: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_2 = LLAMA_1 | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
LLAMA_3_1 = LLAMA_3 | {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LLAMA_3_2 = LLAMA_3_1 | {
    "rope_scaling": LLAMA_3_1["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
}
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "head_dim": 128,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SMOLLM3: dict[str, Any] = {
    "model_type": "smollm3",
    "vocab_size": 128256,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "layer_rope_theta": [5e6, 5e6, 5e6, 0.0] * 9,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128012,
    "pad_token_id": 128004,
}
PHI_4: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000.0,
    "bos_token_id": 100257,
    "eos_token_id": 100265,
    "pad_token_id": 100349,
}
PHI_4_MINI: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 200064,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {
        "rope_type": "longrope",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 48,
        "long_factor": [
            *(1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897),
            *(1.956131817, 2.187582649, 2.446418898, 2.735880826, 3.059592084, 3.421605075),
            *(3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555),
            *(7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651),
            *(14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418),
            *(28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71),
            *(32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77),
        ],
    },
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "bos_token_id": 199999,
    "eos_token_id": 199999,
    "pad_token_id": 199999,
}
QWEN3_TIED = QWEN3 | {"tie_word_embeddings": True}
OLMO_2: dict[str, Any] = {
    "model_type": "olmo2",
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "eos_token_id": 100257,
    "pad_token_id": 100277,
}
GRANITE_3: dict[str, Any] = {
    "model_type": "granite",
    "vocab_size": 49159,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e7,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GRANITE_3_2B = GRANITE_3 | {"attention_multiplier": 1 / 64, "logits_scaling": 8.0}
GRANITE_3_8B = GRANITE_3 | {"attention_multiplier": 1 / 128, "logits_scaling": 16.0}


def gemma_3(
    layers: int, *, window: int = 1024, context: int = 131072, **more: Any
) -> dict[str, Any]:
    """The keys that the sizes of Gemma 3 share, with those that follow from them."""
    types = last_of_several_full(layers, every=6)
    scaling = None if context == 32768 else {"rope_type": "linear", "factor": 8.0}
    shared = {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "layer_rope_theta": [1e6 if kind == "full_attention" else 1e4 for kind in types],
        "rope_scaling": scaling,
        "sliding_rope_scaling": scaling is None,
        "layer_types": types,
        "sliding_window": window,
        "attention_multiplier": 256**-0.5,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": (1, 106),
        "pad_token_id": 0,
    }
    return shared | more


_SIZES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
""".split()


class Preset:
    """A class method that gives the config of a published model: its sizes, and shared keys."""

    def __init__(self, description: str, shared: dict[str, Any], /, *sizes: int) -> None:
        self._description = description
        self._arguments = shared | dict(zip(_SIZES, sizes, strict=True))

    def __set_name__(self, _: type[object], name: str) -> None:
        self._name = name

    def __get__(self, _: Config | None, kind: type[Config]) -> Callable[[], Config]:
        preset: Any = partial(kind, **self._arguments)  # which can be pickled
        preset.__name__, preset.__doc__ = self._name, self._description
        return preset


class PublishedSizes:
    """The configs of published models, as class methods of the class of configs."""

    # Columns: hidden size, intermediate size, layers, query heads, key/value heads.
    llama_7b = Preset("Llama 1, 7B.", LLAMA_1, 4096, 11008, 32, 32, 32)
    llama_13b = Preset("Llama 1, 13B.", LLAMA_1, 5120, 13824, 40, 40, 40)
    llama_30b = Preset(
        "Llama 1, 33B, whose checkpoint is called 30B.", LLAMA_1, 6656, 17920, 60, 52, 52
    )
    llama_65b = Preset("Llama 1, 65B.", LLAMA_1, 8192, 22016, 80, 64, 64)
    llama2_7b = Preset("Llama 2, 7B.", LLAMA_2, 4096, 11008, 32, 32, 32)
    llama2_13b = Preset("Llama 2, 13B.", LLAMA_2, 5120, 13824, 40, 40, 40)
    llama2_70b = Preset("Llama 2, 70B.", LLAMA_2, 8192, 28672, 80, 64, 8)
    llama3_8b = Preset("Llama 3, 8B.", LLAMA_3, 4096, 14336, 32, 32, 8)
    llama3_70b = Preset("Llama 3, 70B.", LLAMA_3, 8192, 28672, 80, 64, 8)
    llama3_1_8b = Preset("Llama 3.1, 8B.", LLAMA_3_1, 4096, 14336, 32, 32, 8)
    llama3_1_70b = Preset("Llama 3.1 and 3.3, 70B.", LLAMA_3_1, 8192, 28672, 80, 64, 8)
    llama3_1_405b = Preset("Llama 3.1, 405B.", LLAMA_3_1, 16384, 53248, 126, 128, 8)
    llama3_2_1b = Preset("Llama 3.2, 1B.", LLAMA_3_2, 2048, 8192, 16, 32, 8)
    llama3_2_3b = Preset("Llama 3.2, 3B.", LLAMA_3_2, 3072, 8192, 28, 24, 8)
    smollm2_135m = Preset(
        "SmolLM2 135M, instruction-tuned (arXiv:2502.02737).", SMOLLM2, 576, 1536, 30, 9, 3
    )

    smollm3_3b = Preset("SmolLM3 3B, instruction-tuned.", SMOLLM3, 2048, 11008, 36, 16, 4)

    phi4_14b = Preset("Phi-4, 14B (arXiv:2412.08905).", PHI_4, 5120, 17920, 40, 40, 10)
    phi4_mini = Preset("Phi-4-mini, 3.8B (arXiv:2503.01743).", PHI_4_MINI, 3072, 8192, 32, 24, 8)

    qwen3_0_6b = Preset("Qwen3, 0.6B.", QWEN3_TIED, 1024, 3072, 28, 16, 8)
    qwen3_1_7b = Preset("Qwen3, 1.7B.", QWEN3_TIED, 2048, 6144, 28, 16, 8)
    qwen3_4b = Preset("Qwen3, 4B.", QWEN3_TIED, 2560, 9728, 36, 32, 8)
    qwen3_8b = Preset("Qwen3, 8B.", QWEN3, 4096, 12288, 36, 32, 8)
    qwen3_14b = Preset("Qwen3, 14B.", QWEN3, 5120, 17408, 40, 40, 8)
    qwen3_32b = Preset("Qwen3, 32B.", QWEN3, 5120, 25600, 64, 64, 8)

    gemma3_1b = Preset(
        "Gemma 3, 1B, instruction-tuned (arXiv:2503.19786).",
        gemma_3(26, window=512, context=32768, vocab_size=262144),
        *(1152, 6912, 26, 4, 1),
    )
    gemma3_4b = Preset("The text model of Gemma 3, 4B.", gemma_3(34), 2560, 10240, 34, 8, 4)
    gemma3_12b = Preset("The text model of Gemma 3, 12B.", gemma_3(48), 3840, 15360, 48, 16, 8)
    gemma3_27b = Preset(
        "The text model of Gemma 3, 27B.",
        gemma_3(62, head_dim=128, attention_multiplier=168**-0.5),
        *(5376, 21504, 62, 32, 16),
    )

    granite3_3_2b = Preset("Granite 3.3, 2B.", GRANITE_3_2B, 2048, 8192, 40, 32, 8)
    granite3_3_8b = Preset("Granite 3.3, 8B.", GRANITE_3_8B, 4096, 12800, 40, 32, 8)

    olmo2_1b = Preset("OLMo 2, 1B.", OLMO_2, 2048, 8192, 16, 16, 16)
    olmo2_7b = Preset("OLMo 2, 7B.", OLMO_2, 4096, 11008, 32, 32, 32)
    olmo2_13b = Preset("OLMo 2, 13B.", OLMO_2, 5120, 13824, 40, 40, 40)
    olmo2_32b = Preset("OLMo 2, 32B.", OLMO_2, 5120, 27648, 64, 40, 8)
