"""Write arrays to a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  # safetensors needs it to know bfloat16
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from llama_layers.files.output import write_atomically


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None
) -> None:
    """Write a safetensors file, whole or not at all."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(contiguous, temporary, None if metadata is None else dict(metadata))
        except SafetensorError as error:  # its word for an OSError
            raise OSError(f"{path}: {error}") from None

    write_atomically(path, write)
