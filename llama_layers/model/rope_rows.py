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
    """The number of heads whose rows may be permuted; None for tensors without RoPE.

    Weights of their norms are in the order of the rows, of one head or of all.
    """
    found = re.search(r"\.self_attn\.([qk])_(proj|norm)\.", name)
    if found is None:
        return None
    if found[2] == "norm" and config.qk_norm == "head":
        return 1
    return config.num_attention_heads if found[1] == "q" else config.num_key_value_heads


def unpermute_rope_rows(array: ArrayT, heads: int, rotated: int) -> ArrayT:
    """Put the rows of Q or K, weight, bias or norm, from adjacent pairs into halves.

    Row 2i + j of a head becomes its row i + j * rotated / 2; rows from `rotated` on stay.
    """
    return _swapped(array, heads, rotated, (-1, 2))


def permute_rope_rows(array: ArrayT, heads: int, rotated: int) -> ArrayT:
    """Put the rows of Q or K, weight, bias or norm, from halves into adjacent pairs."""
    return _swapped(array, heads, rotated, (2, -1))


def _swapped(array: ArrayT, heads: int, rotated: int, split: tuple[int, int]) -> ArrayT:
    """An array whose rotated rows, split along two axes for each head, have these exchanged."""
    xp, columns = namespace(array=array), tuple(array.shape[1:])
    whole = xp.reshape(array, (heads, -1, *columns))
    pairs = xp.reshape(whole[:, :rotated, ...], (heads, *split, *columns))
    axes = (0, 2, 1, *range(3, 3 + len(columns)))
    turned = xp.reshape(xp.permute_dims(pairs, axes), (heads, rotated, *columns))
    if rotated < whole.shape[1]:
        turned = xp.concat([turned, whole[:, rotated:, ...]], axis=1)
    return xp.reshape(turned, array.shape)
