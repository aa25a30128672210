"""The order of the rows of Q and K, which Meta and GGUF permute for RoPE.

RoPE rotates pairs of channels. In Hugging Face's order the two rows of a pair lie half a head
apart; in Meta's and GGUF's they are adjacent. Arrays of this package are in Hugging Face's order.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from llama_layers.config.llama_config import LlamaConfig


def permuted_heads(name: str, config: LlamaConfig) -> int | None:
    """The number of heads whose rows Meta permutes; None for tensors without RoPE."""
    if re.search(r"\.self_attn\.q_proj\.", name):
        return config.num_attention_heads
    if re.search(r"\.self_attn\.k_proj\.", name):
        return config.num_key_value_heads
    return None


def unpermute_rope_rows(array: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Put the rows of Q or K, weight or bias, from Meta's and GGUF's order into Hugging Face's.

    Row 2i + j of a head becomes its row i + j * head_dim / 2.
    """
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
