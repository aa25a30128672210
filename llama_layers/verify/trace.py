"""The activations of one forward pass, in a file that any engine can write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # safetensors needs it to know bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llama_layers.backends.dtypes import FLOATS, dtype_name
from llama_layers.backends.transfer import to_numpy
from llama_layers.checkpoint.atomic import written_atomically
from llama_layers.errors import TraceError

# Tensors of a trace that are no activations.
TOKENS = ("input_ids", "positions", "attention_mask")


@dataclass(frozen=True, eq=False)
class Trace:
    """Recorded activations.

    A run through a cache, in chunks or token by token, is recorded as the whole run would be: its
    arrays are joined along the sequence.

    Attributes
    ----------
    arrays : mapping of str to Array
        For each recorded site its array, in the dtype that the engine computed it in.
    input_ids : ndarray of int64, shape [B, S], or None
        The tokens.
    positions : ndarray of int64, shape [S] or [B, S], or None
        The position of each token for RoPE; counted from 0, or from the first token that is no
        padding, if not given.
    attention_mask : ndarray of bool, shape [B, S], or None
        Which tokens are no padding; all if not given.
    metadata : mapping of str to str
        Where it comes from: see `llama_layers.verify.record`.
    """

    arrays: Mapping[str, Any]
    input_ids: Any | None = None
    positions: Any | None = None
    attention_mask: Any | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
