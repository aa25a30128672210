"""Weights whose bits were taken for numbers of another format, or in the other byte order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.near import explains_outputs, is_near, worst_of_product
from llama_layers.verify.mistakes.registry import Changed, mistake
from llama_layers.verify.operations import Embedding, Linear, Norm

_BF16, _F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
_SAYS = "Takes {0}; it should read the weights in the format that they are stored in."


def _taken_for(stored: np.dtype, read: np.dtype, weight: np.ndarray) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return wide(weight.astype(stored).view(read))


def _swapped(stored: np.dtype, weight: np.ndarray) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        bits = weight.astype(stored).view(f"u{stored.itemsize}")
    return wide(bits.byteswap().view(stored))


_MISREAD: dict[str, Callable[[np.ndarray], NDArray[np.float64]]] = {
    "bits of bfloat16 for float16": partial(_taken_for, _BF16, _F16),
    "bits of float16 for bfloat16": partial(_taken_for, _F16, _BF16),
    "bytes of bfloat16 in the other order": partial(_swapped, _BF16),
    "bytes of float16 in the other order": partial(_swapped, _F16),
    "bytes of float32 in the other order": partial(_swapped, np.dtype(np.float32)),
}


@mistake(Linear, "bits of weights misread", says=_SAYS)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    _, outputs = worst_of_product(at)
    bias = None if linear.bias is None else linear.bias[outputs]
    for said, misread in _MISREAD.items():
        few = replace(linear, weight=misread(linear.weight[outputs]), bias=bias)
        if explains_outputs(few, at, outputs):
            yield replace(linear, weight=misread(linear.weight)), said


@mistake(Norm, "bits of weights misread", says=_SAYS)
def _(norm: Norm, at: FailingSite) -> Iterator[Changed]:
    for said, misread in _MISREAD.items():
        weight = misread(norm.weight)
        # Beside an offset, what is rounded away is as no weight at all.
        if not (np.abs(weight) <= at.formats.out.unit_roundoff * norm.offset).all():
            yield replace(norm, weight=weight), said


@mistake(Embedding, "bits of weights misread", says=_SAYS)
def _(embedding: Embedding, at: FailingSite) -> Iterator[Changed]:
    # The rows of the tokens alone.
    rows = embedding.table[embedding.ids]
    ids = np.arange(rows.shape[0] * rows.shape[1]).reshape(rows.shape[:2])
    for said, misread in _MISREAD.items():
        table = misread(rows.reshape(-1, rows.shape[-1]))
        if is_near(at, table[ids]):
            yield replace(embedding, ids=ids, table=table), said
