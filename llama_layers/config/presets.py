"""The published Llama sizes."""

from __future__ import annotations

from typing import Any, Self


class PublishedSizes:
    """Class methods that give the configs of published models.

    Sources: for Llama 1 table 2 of arXiv:2302.13971, for Llama 2 arXiv:2307.09288, for Llama 3 and
    3.1 table 3 of arXiv:2407.21783; intermediate sizes, eps and the rest from the config.json of
    the checkpoints.
    """

    @classmethod
    def _published(cls, sizes: str, *families: dict[str, Any], **keys: Any) -> Self:
        names = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
        merged: dict[str, Any] = dict(zip(names, map(int, sizes.split()), strict=True))
        for family in families:
            merged |= family
        return cls(**merged | keys)

    @classmethod
    def llama_7b(cls) -> Self:
        """Llama 1, 7B."""
        return cls._published("4096 11008 32 32 32", _LLAMA_1)

    @classmethod
    def llama_13b(cls) -> Self:
        """Llama 1, 13B."""
        return cls._published("5120 13824 40 40 40", _LLAMA_1)

    @classmethod
    def llama_30b(cls) -> Self:
        """Llama 1, 33B, whose checkpoint is called 30B."""
        return cls._published("6656 17920 60 52 52", _LLAMA_1)

    @classmethod
    def llama_65b(cls) -> Self:
        """Llama 1, 65B."""
        return cls._published("8192 22016 80 64 64", _LLAMA_1)

    @classmethod
    def llama2_7b(cls) -> Self:
        """Llama 2, 7B."""
        return cls._published("4096 11008 32 32 32", _LLAMA_2)

    @classmethod
    def llama2_13b(cls) -> Self:
        """Llama 2, 13B."""
        return cls._published("5120 13824 40 40 40", _LLAMA_2)

    @classmethod
    def llama2_70b(cls) -> Self:
        """Llama 2, 70B."""
        return cls._published("8192 28672 80 64 8", _LLAMA_2)

    @classmethod
    def llama3_8b(cls) -> Self:
        """Llama 3, 8B."""
        return cls._published("4096 14336 32 32 8", _LLAMA_3)

    @classmethod
    def llama3_70b(cls) -> Self:
        """Llama 3, 70B."""
        return cls._published("8192 28672 80 64 8", _LLAMA_3)

    @classmethod
    def llama3_1_8b(cls) -> Self:
        """Llama 3.1, 8B."""
        return cls._published("4096 14336 32 32 8", _LLAMA_3, _long_context(8.0))

    @classmethod
    def llama3_1_70b(cls) -> Self:
        """Llama 3.1 and 3.3, 70B."""
        return cls._published("8192 28672 80 64 8", _LLAMA_3, _long_context(8.0))

    @classmethod
    def llama3_1_405b(cls) -> Self:
        """Llama 3.1, 405B."""
        return cls._published("16384 53248 126 128 8", _LLAMA_3, _long_context(8.0))

    @classmethod
    def llama3_2_1b(cls) -> Self:
        """Llama 3.2, 1B."""
        return cls._published(
            "2048 8192 16 32 8", _LLAMA_3, _long_context(32.0), tie_word_embeddings=True
        )

    @classmethod
    def llama3_2_3b(cls) -> Self:
        """Llama 3.2, 3B."""
        return cls._published(
            "3072 8192 28 24 8", _LLAMA_3, _long_context(32.0), tie_word_embeddings=True
        )

    @classmethod
    def smollm2_135m(cls) -> Self:
        """SmolLM2 135M, instruction-tuned (arXiv:2502.02737): a Llama with tied embeddings."""
        return cls._published(
            "576 1536 30 9 3",
            vocab_size=49152,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )


_LLAMA_1 = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_2 = _LLAMA_1 | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA_3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def _long_context(factor: float) -> dict[str, Any]:
    return {
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
