"""The order of the rows of Q and K, which files of some kinds have another way for RoPE.

RoPE rotates pairs of channels. In the order of Hugging Face's Llama the two rows of a pair lie half
a head apart; in files of Meta and GGUF, and of families whose class rotates neighbours, they are
adjacent. Arrays of this package are in the order of Hugging Face's Llama.
"""

from __future__ import annotations

import re

from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import ArrayT
from llama_layers.config.llama_config import LlamaConfig


def permuted_heads(name: str, config: LlamaConfig) -> int | None:
    """The number of heads whose rows may be permuted; None for tensors without RoPE."""
    if re.search(r"\.self_attn\.q_proj\.", name):
        return config.num_attention_heads
    if re.search(r"\.self_attn\.k_proj\.", name):
        return config.num_key_value_heads
    return None


def unpermute_rope_rows(array: ArrayT, heads: int) -> ArrayT:
    """Put the rows of Q or K, weight or bias, from adjacent pairs into halves.

    Row 2i + j of a head becomes its row i + j * head_dim / 2.
    """
    return _swapped(array, (heads, -1, 2))


def permute_rope_rows(array: ArrayT, heads: int) -> ArrayT:
    """Put the rows of Q or K, weight or bias, from halves into adjacent pairs."""
    return _swapped(array, (heads, 2, -1))


def _swapped(array: ArrayT, split: tuple[int, int, int]) -> ArrayT:
    """An array whose rows, split along three axes, have the last two of these exchanged."""
    xp, columns = namespace(array=array), tuple(array.shape[1:])
    pairs = xp.reshape(array, (*split, *columns))
    axes = (0, 2, 1, *range(3, 3 + len(columns)))
    return xp.reshape(xp.permute_dims(pairs, axes), array.shape)
