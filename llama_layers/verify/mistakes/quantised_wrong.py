"""Quantised weights whose scales or zero points are read wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.codes import (
    FLOAT8,
    INT4,
    INT8,
    ZERO_POINT_OFF,
    Codes,
    Scaling,
)
from llama_layers.verify.mistakes.near import explains_outputs, worst_of_product
from llama_layers.verify.mistakes.quantised import TIE, product_of
from llama_layers.verify.mistakes.registry import Changed, Computed, Kind, mistake
from llama_layers.verify.operations import Linear
from llama_layers.verify.roundoff import Float64Array, read_in

_BY_ROW = Scaling("for each row", (-1,))
_SCALINGS = (
    *(Scaling(f"for each {n} inputs of a row", (-1,), blocks=n) for n in (16, 32, 64, 128, 256)),
    _BY_ROW,
)
_SCALED = (INT8[0], *FLOAT8[:1], INT4[0], INT4[1], INT4[3], INT4[4])
Rows = NDArray[np.intp]


def _told(
    linear: Linear, at: FailingSite, read: Callable[[np.ndarray, Rows, float], Float64Array]
) -> Iterator[Computed]:
    """The product with rows of weights as they are read, if that explains the worst outputs."""
    _, outputs = worst_of_product(at)
    bias = None if linear.bias is None else linear.bias[outputs]
    some = read(linear.weight, outputs, 0.0)
    if not explains_outputs(replace(linear, weight=some, bias=bias), at, outputs):
        return
    every = np.arange(len(linear.weight))
    found = [read(linear.weight, every, tie) for tie in (0.0, -TIE, TIE)]
    # Some kernels multiply in the format of the results.
    for form in dict.fromkeys((FLOATS["float64"], FLOATS[at.formats.dtype])):
        weight, *ends = (read_in(y, form) for y in found)
        unsure = np.maximum(*(np.abs(end - weight) for end in ends))
        yield product_of(linear, None, (weight, unsure))


@mistake(Linear, "zero points off by one", kind=Kind.ROUNDING)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Multiplies by weights in {0}, a scale {1}; it should subtract the zero point that the weights
    were stored with."""
    for scaling in _SCALINGS:
        if scaling.fits(linear.weight.shape):
            for codes in ZERO_POINT_OFF:
                for found in _told(linear, at, partial(_in_codes, codes, scaling)):
                    yield found, codes.name, scaling.said


def _in_codes(
    codes: Codes, scaling: Scaling, weight: np.ndarray, rows: Rows, tie: float
) -> Float64Array:
    """Rows of weights in a code, which are moved by so much from where two codes are as near."""
    some = wide(weight[rows])
    return codes.of(some * (1 + tie), scaling, limits=scaling.limits(some))


@mistake(Linear, "scales of another block", kind=Kind.ROUNDING)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Multiplies weights in {0}, a scale {1}, by the scale of the one {2}; it should multiply each
    by its own scale."""
    for scaling in _SCALINGS:
        if not scaling.fits(linear.weight.shape):
            continue
        for codes in _SCALED:
            for step, said in ((-1, "after it"), (1, "before it")):
                read = partial(_with_scales_of, codes, scaling, step)
                for found in _told(linear, at, read):
                    yield found, codes.name, scaling.said, said


def _with_scales_of(
    codes: Codes, scaling: Scaling, step: int, weight: np.ndarray, rows: Rows, tie: float
) -> Float64Array:
    """Rows of weights with the scales of other blocks of a row, or of other rows."""
    some = weight[rows]
    own = _scales(codes, scaling, some)
    other = (
        np.roll(own, step, axis=-2)
        if scaling.blocks
        else _scales(codes, scaling, weight[(rows - step) % len(weight)])
    )
    found = scaling.split(_in_codes(codes, scaling, weight, rows, tie))
    return scaling.joined(found * (other / own), some.shape)


def _scales(codes: Codes, scaling: Scaling, some: np.ndarray) -> Float64Array:
    """What scales are proportional to."""
    low, high = scaling.limits(some)
    found = np.maximum(high, 0) - np.minimum(low, 0) if codes is INT4[1] else np.maximum(-low, high)
    if codes is INT4[3]:
        found = np.where(-low > high, low, high)
    return np.where(found == 0, 1.0, found)
