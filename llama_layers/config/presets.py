"""The published sizes.

Sources: for Llama 1 table 2 of arXiv:2302.13971, for Llama 2 arXiv:2307.09288, for Llama 3 and
3.1 table 3 of arXiv:2407.21783, for Qwen3 table 1 of arXiv:2505.09388; intermediate sizes, eps and
the rest from the config.json of the checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

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
QWEN3_TIED = QWEN3 | {"tie_word_embeddings": True}


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
