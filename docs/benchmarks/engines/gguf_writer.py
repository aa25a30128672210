"""A plain Llama as a GGUF file, which is what llama.cpp reads."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.checkpoint.names import GGUF_NAMES, renamed
from llama_layers.model.llama import Llama
from llama_layers.model.rope_rows import permute_rope_rows, permuted_heads


def to_gguf(name: str) -> str:
    """GGUF's name for a Hugging Face name."""
    if (found := renamed(name, GGUF_NAMES)) is None:
        raise ValueError(f"name: expected that of a model's tensor, got {name!r}")
    return found


def write_gguf(file: Path, model: Llama) -> None:
    """Write the weights of a model in their dtype, and norms in float32, as llama.cpp wants them.

    There is no tokenizer in the file: token ids go in.
    """
    c = model.config
    if c.model_type != "llama" or c.rope_scaling is not None or c.sliding_window is not None:
        raise ValueError(
            "--against llama.cpp: expected a Llama without RoPE scaling or sliding window, got "
            f"{c.model_type}"
        )
    gguf = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("tokenizer.ggml.model", "none")
    for key, value in {
        "context_length": c.max_position_embeddings,
        "block_count": c.num_hidden_layers,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.head_dim,
        "vocab_size": c.vocab_size,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", c.rope_theta)
    types = gguf.GGMLQuantizationType
    for name, array in model.weights.named().items():
        heads = permuted_heads(name, c)
        rows = array if heads is None else permute_rope_rows(array, heads, c.head_dim)
        if rows.ndim == 1:
            rows = rows.astype(np.float32)
        if rows.dtype.name == "bfloat16":
            writer.add_tensor(to_gguf(name), _bytes(rows), raw_dtype=types.BF16)
        else:
            writer.add_tensor(to_gguf(name), np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8)
