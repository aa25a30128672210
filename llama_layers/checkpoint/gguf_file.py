"""GGUF files, as llama.cpp writes them, through the gguf package."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llama_layers.checkpoint.extras import require
from llama_layers.checkpoint.gguf_config import ARCHITECTURES, read_config
from llama_layers.checkpoint.gguf_tokenizer import open_tokenizer, tokenizer_files
from llama_layers.checkpoint.names import permuted_heads, to_hugging_face
from llama_layers.checkpoint.opened import Checkpoint, TensorInfo, map_file
from llama_layers.config import LlamaConfig
from llama_layers.errors import CheckpointError, ConfigError

# GGUF's names for numbers that are stored as they are; all else are block formats.
_PLAIN = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_ROPE_FACTORS = "rope_freqs.weight"


def open_gguf(file: Path) -> Checkpoint:
    """Open a GGUF file of one of the `ARCHITECTURES`."""
    metadata, stored = _read(file)
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file}: expected one of the architectures {', '.join(ARCHITECTURES)}, "
            f"got {architecture!r}"
        )
    if metadata.get("split.count", 1) != 1:
        raise CheckpointError(
            f"{file}: is one of {metadata['split.count']} parts; merge them with llama.cpp's "
            f"llama-gguf-split --merge"
        )
    factors = stored.pop(_ROPE_FACTORS, None)
    try:
        config = read_config(metadata, stored, None if factors is None else factors.data)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return Checkpoint(
        path=file,
        format="GGUF file",
        config=config,
        tensors=_tensor_infos(file, stored, config, permuted=architecture == "llama"),
        chat_template=metadata.get("tokenizer.chat_template"),
        _open_tokenizer=partial(open_tokenizer, file, metadata),
        _companions=partial(tokenizer_files, file, metadata),
        _maps={file: map_file(file)},
    )


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's metadata by key and its tensors by name."""
    gguf = require("gguf", f"reading {file}")

    class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        """One that notices the end of the file, where gguf's gives fewer bytes than asked for."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
            array = super()._get(offset, dtype, count, *args, **kwargs)
            if array.size != count:
                raise ValueError(f"it ends within what it announces at byte {offset}")
            return array

    try:
        reader = Reader(file)
        metadata = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        for kind in {tensor.tensor_type for tensor in reader.tensors}:
            size = gguf.GGML_QUANT_SIZES[kind][1]
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)  # raises if it does not know how
    except NotImplementedError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        raise CheckpointError(f"{file}: expected a GGUF file: {error}") from None
    return metadata, tensors


def _tensor_infos(
    file: Path, stored: dict[str, Any], config: LlamaConfig, *, permuted: bool
) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    end, before = 0, ""
    for tensor in sorted(stored.values(), key=lambda tensor: int(tensor.data_offset)):
        if tensor.data_offset < end:
            raise CheckpointError(f"{file}: {tensor.name} overlaps {before}")
        end, before = tensor.data_offset + int(tensor.n_bytes), tensor.name
        name = to_hugging_face(tensor.name, "gguf")
        kind = tensor.tensor_type.name
        infos[name] = TensorInfo(
            name=name,
            stored_name=tensor.name,
            shape=tuple(int(n) for n in reversed(tensor.shape)),
            dtype=_PLAIN.get(kind, kind),
            file=file,
            offset=tensor.data_offset,
            nbytes=int(tensor.n_bytes),
            permuted_heads=permuted_heads(name, config) if permuted else None,
        )
    return infos
