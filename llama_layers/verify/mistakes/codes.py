"""Numbers in few bits: the codes that they are rounded to, and what shares a scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.verify.roundoff import Float64Array, read_in

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Scaling:
    """What shares a scale: axes of an array, of which the last may be cut into blocks."""

    said: str
    axes: Axes
    blocks: int = 0
    """Numbers of the last axis in a block; 0 if it is not cut."""
    rows: int = 0
    """Rows of a matrix in a block; 0 if they are not cut."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array can be cut into these blocks, and several of them."""
        last = not self.blocks or shape[-1] > self.blocks
        return last and (not self.rows or not shape[0] % self.rows)

    def split(self, array: np.ndarray) -> np.ndarray:
        """The array with an axis for what is inside a block; the last block may be padded."""
        if self.blocks:
            if odd := array.shape[-1] % self.blocks:
                pad = [(0, 0)] * (array.ndim - 1) + [(0, self.blocks - odd)]
                array = np.pad(array, pad, mode="edge")
            array = array.reshape(*array.shape[:-1], -1, self.blocks)
        return array.reshape(-1, self.rows, *array.shape[1:]) if self.rows else array

    def joined(self, numbers: Float64Array, shape: tuple[int, ...]) -> Float64Array:
        """What `split` made of an array of a shape, as it was."""
        if not self.blocks:
            return numbers.reshape(shape)
        return numbers.reshape(*shape[:-1], -1)[..., : shape[-1]]

    def limits(self, array: np.ndarray) -> tuple[Float64Array, Float64Array]:
        """The least and the largest number of each block."""
        numbers = self.split(array)
        low, high = (f(axis=self.axes, keepdims=True) for f in (numbers.min, numbers.max))
        return low.astype(np.float64), high.astype(np.float64)

    def of_rows(
        self, limits: tuple[Float64Array, Float64Array], rows: NDArray[np.intp]
    ) -> tuple[Scaling, tuple[Float64Array, Float64Array]]:
        """The scaling and the limits of some rows of a matrix."""
        if self.rows:
            low, high = (y[rows // self.rows, 0] for y in limits)
            return replace(self, axes=(-1,), rows=0), (low, high)
        low, high = (y if len(y) == 1 else y[rows] for y in limits)
        return self, (low, high)


@dataclass(frozen=True)
class Codes:
    """Numbers of few bits times a scale."""

    name: str
    round: Callable[[Float64Array, Float64Array, Float64Array, str], Float64Array]
    """Rounds numbers whose least and largest in a block are given; the scale is in a format."""

    def of(
        self,
        array: np.ndarray,
        scaling: Scaling,
        scales: str = "float32",
        limits: tuple[Float64Array, Float64Array] | None = None,
    ) -> Float64Array:
        """The numbers of an array as they are in these codes; limits as `Scaling.limits` gives."""
        numbers = scaling.split(array.astype(np.float64))
        low, high = scaling.limits(array) if limits is None else limits
        with np.errstate(all="ignore"):
            found = self.round(numbers, low, high, scales)
        return scaling.joined(np.nan_to_num(found), array.shape)


def _scale(scale: Float64Array, scales: str) -> Float64Array:
    rounded = read_in(scale, FLOATS[scales])
    return np.where(rounded == 0, 1.0, rounded)


def _symmetric(
    x: Float64Array, low: Float64Array, high: Float64Array, scales: str, top: float, bottom: float
) -> Float64Array:
    scale = _scale(np.maximum(-low, high) / top, scales)
    return np.asarray(np.clip(np.rint(x / scale), bottom, top) * scale)


def _affine(
    x: Float64Array,
    low: Float64Array,
    high: Float64Array,
    scales: str,
    steps: float,
    off: float = 0.0,
) -> Float64Array:
    """Steps from a zero point; `off` is by how much that is too large where it is read."""
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    scale = _scale((high - low) / steps, scales)
    zero = np.rint(-low / scale)
    return np.asarray((np.clip(np.rint(x / scale) + zero, 0, steps) - zero - off) * scale)


def _least(
    x: Float64Array, low: Float64Array, high: Float64Array, scales: str, steps: float
) -> Float64Array:
    """Steps from the least number of the block, which is kept."""
    scale, least = _scale((high - low) / steps, scales), read_in(low, FLOATS[scales])
    return np.asarray(np.clip(np.rint((x - least) / scale), 0, steps) * scale + least)


def _signed(
    x: Float64Array, low: Float64Array, high: Float64Array, scales: str, half: float
) -> Float64Array:
    """Steps of the number of the largest magnitude over minus 8, as llama.cpp's Q4_0 has them."""
    scale = _scale(np.where(-low > high, low, high) / -half, scales)
    return np.asarray((np.clip(np.floor(x / scale + half + 0.5), 0, 2 * half - 1) - half) * scale)


def _largest(form: np.dtype) -> float:
    return float(ml_dtypes.finfo(form).max)  # type: ignore[no-untyped-call]


def _float8(
    x: Float64Array, low: Float64Array, high: Float64Array, scales: str, dtype: str, scaled: bool
) -> Float64Array:
    form = np.dtype(getattr(ml_dtypes, dtype))
    top = _largest(form)
    scale = _scale(np.maximum(-low, high) / top, scales) if scaled else np.ones_like(low)
    return np.clip(x / scale, -top, top).astype(np.float32).astype(form).astype(np.float64) * scale


def _microscaled(
    x: Float64Array, low: Float64Array, high: Float64Array, scales: str, dtype: str
) -> Float64Array:
    """Scales that are powers of two (OCP Microscaling Formats, 2023)."""
    form = np.dtype(getattr(ml_dtypes, dtype))
    top = _largest(form)
    scale = np.exp2(np.floor(np.log2(np.maximum(-low, high))) - np.floor(np.log2(top)))
    scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)
    return np.clip(x / scale, -top, top).astype(np.float32).astype(form).astype(np.float64) * scale


# The quantiles of a normal distribution that bitsandbytes' NF4 rounds to (T. Dettmers et al.,
# "QLoRA", arXiv:2305.14314, appendix E).
_NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def _nf4(x: Float64Array, low: Float64Array, high: Float64Array, scales: str) -> Float64Array:
    scale = _scale(np.maximum(-low, high), scales)
    middles = (_NF4[1:] + _NF4[:-1]) / 2
    return np.asarray(_NF4[np.searchsorted(middles, x / scale)] * scale)


INT8 = (
    Codes("int8", partial(_symmetric, top=127.0, bottom=-128.0)),
    Codes("int8 with a zero point", partial(_affine, steps=255.0)),
    Codes("int8 from the least number", partial(_least, steps=255.0)),
)
FLOAT8 = (
    Codes("float8 e4m3", partial(_float8, dtype="float8_e4m3fn", scaled=True)),
    Codes("float8 e5m2", partial(_float8, dtype="float8_e5m2", scaled=True)),
    Codes("float8 e4m3 (fnuz)", partial(_float8, dtype="float8_e4m3fnuz", scaled=True)),
)
CAST = (
    Codes("float8 e4m3", partial(_float8, dtype="float8_e4m3fn", scaled=False)),
    Codes("float8 e5m2", partial(_float8, dtype="float8_e5m2", scaled=False)),
)
INT4 = (
    Codes("int4", partial(_symmetric, top=7.0, bottom=-8.0)),
    Codes("int4 with a zero point", partial(_affine, steps=15.0)),
    Codes("int4 from the least number", partial(_least, steps=15.0)),
    Codes("int4 as Q4_0", partial(_signed, half=8.0)),
    Codes("nf4", _nf4),
)
ZERO_POINT_OFF = tuple(
    Codes(f"{name} whose zero point is one too {'large' if off > 0 else 'small'}", rounds)
    for name, steps in (("int4", 15.0), ("int8", 255.0), ("int2", 3.0))
    for off in (1.0, -1.0)
    for rounds in [partial(_affine, steps=steps, off=off)]
)
MICROSCALED = (
    Codes("mxfp8", partial(_microscaled, dtype="float8_e4m3fn")),
    Codes("mxfp4", partial(_microscaled, dtype="float4_e2m1fn")),
)
WITHOUT = Scaling("", ())
"""No scale: numbers are cast as they are."""


@dataclass(frozen=True)
class Choice:
    """A way to write numbers in few bits."""

    codes: Codes
    scaling: Scaling
    scales: str = "float32"
    """The format of the scales."""

    @property
    def said(self) -> str:
        """In words."""
        if self.scaling is WITHOUT:
            return f"{self.codes.name} without a scale"
        more = "" if self.scales == "float32" else f" in {self.scales}"
        return f"{self.codes.name}, a scale{more} {self.scaling.said}"

    def of(
        self, array: np.ndarray, limits: tuple[Float64Array, Float64Array] | None = None
    ) -> Float64Array:
        """The numbers of an array; limits as `Scaling.limits` gives."""
        return self.codes.of(array, self.scaling, self.scales, limits)

    def others(self) -> Iterator[Choice]:
        """The same with its scales in each format."""
        formats = (
            ("float32", "float16", "bfloat16") if self.scaling is not WITHOUT else ("float32",)
        )
        yield from (replace(self, scales=scales) for scales in formats)


def choices(
    codes: tuple[Codes, ...], scalings: tuple[Scaling, ...], shape: tuple[int, ...]
) -> Iterator[Choice]:
    """Each of the codes with each scaling that fits, and those that need no scale."""
    for scaling in scalings:
        if scaling.fits(shape):
            yield from (Choice(code, scaling) for code in codes)
    yield from (Choice(code, WITHOUT) for code in CAST)


def pruned(array: np.ndarray, keep: int, of: int, last: bool = False) -> NDArray[np.float64]:
    """The largest numbers of each few, the first or the last of like ones; zeros for the others."""
    numbers = array.astype(np.float64).reshape(*array.shape[:-1], -1, of)
    step = -1 if last else 1
    size = -np.abs(numbers[..., ::step])
    order = np.argsort(np.argsort(size, axis=-1, kind="stable"), axis=-1)[..., ::step]
    return np.where(order < keep, numbers, 0.0).reshape(array.shape)
