"""Norm, RoPE and the gate on CuPy, by one kernel instead of some ten."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.types import Namespace
from llama_layers.backends.cupy.compile import CONSTANTS, FORMATS, launch
from llama_layers.backends.cupy.launch import norm
from llama_layers.backends.libraries import CupyArray
from llama_layers.backends.trust import takes

THREADS = CONSTANTS["pointwise"]["THREADS"]


def _taken(x: CupyArray) -> bool:
    return dtype_name(x.dtype) in FORMATS and bool(x.size)


# The kernel takes the rows of both tables from the same places.
@takes(lambda xp, x, cos, sin, layout: _taken(x) and cos.shape == sin.shape)
def rotate(xp: Namespace, x: CupyArray, cos: CupyArray, sin: CupyArray, layout: str) -> CupyArray:
    """RoPE in one pass over x [B, S, heads, D]."""
    y = xp.empty(x.shape, dtype=x.dtype)
    half = x.shape[3] // 2
    x, cos, sin = (xp.ascontiguousarray(array) for array in (x, cos, sin))
    sizes = (np.int32(n) for n in (x.shape[2], half, cos.size // half))
    arguments = (x, cos, sin, y, np.int64(x.size // 2), *sizes)
    form = FORMATS[dtype_name(x.dtype)]
    _launch("rotate", x.size // 2, arguments, FORMAT=form, INTERLEAVED=int(layout != "half"))
    return y


@takes(lambda xp, gate, up: _taken(gate))
def gate_with_silu(xp: Namespace, gate: CupyArray, up: CupyArray) -> CupyArray:
    """``gate / (1 + exp(-gate)) * up`` in one pass."""
    form = FORMATS[dtype_name(gate.dtype)]
    y = xp.empty(gate.shape, dtype=gate.dtype)
    arrays = (xp.ascontiguousarray(gate), xp.ascontiguousarray(up), y)
    _launch("gate_with_silu", y.size, (*arrays, np.int64(y.size)), FORMAT=form)
    return y


@takes(lambda xp, x, weight, eps: _taken(x) and weight.dtype == x.dtype)
def normalise(xp: Namespace, x: CupyArray, weight: CupyArray, eps: float) -> CupyArray:
    """RMSNorm in one pass over x [..., H]."""
    y = xp.empty(x.shape, dtype=x.dtype)
    rows = (-1, x.shape[-1])
    contiguous = xp.ascontiguousarray(x).reshape(rows)
    norm(contiguous, xp.ascontiguousarray(weight), y.reshape(rows), eps)
    return y


def _launch(kernel: str, count: int, arguments: tuple[Any, ...], **macros: int) -> None:
    """Launch a thread for each of `count` numbers or pairs."""
    blocks = math.ceil(count / THREADS)
    launch("pointwise", kernel, (blocks,), (THREADS,), arguments, **{"INTERLEAVED": 0} | macros)
