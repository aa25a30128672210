"""The tensors of a file as this package has them: fused ones split, and rows in order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from llama_layers.checkpoint.checkpoint import TensorInfo
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import CheckpointError
from llama_layers.model.fused_tensors import unfused
from llama_layers.model.rope_rows import permuted_heads


def in_our_order(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    config: LlamaConfig,
    fused: Collection[str],
    *,
    permuted: bool,
) -> dict[str, TensorInfo]:
    """The tensors by Hugging Face name, with those of the modules `fused` in their parts.

    `permuted` says whether the file permutes the rows of queries and keys.
    """
    try:
        found = unfused(tensors, config, fused, TensorInfo.rows)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not permuted:
        return found
    for name, info in found.items():
        if (heads := permuted_heads(name, config)) is not None:
            found[name] = replace(info, permuted_heads=heads, permuted_rows=config.rotary_dim)
    return found
