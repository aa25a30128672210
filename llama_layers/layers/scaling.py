"""Factors of the residual stream and of the logits; Llama has none."""

from __future__ import annotations

from llama_layers.arrays.dtypes import accumulate_format, dtype_of, float_format
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import Array, ArrayT
from llama_layers.config.llama_config import LlamaConfig

# A narrow array times a Python number would round the number to its dtype first, so all arithmetic
# is in the format of sums, and rounded once.


def multiplied(x: ArrayT, factor: float) -> ArrayT:
    """Numbers times a factor."""
    if factor == 1:
        return x
    xp = namespace(x=x)
    return xp.astype(_wide(x) * factor, x.dtype, copy=False)


def added(x: ArrayT, y: Array, multiplier: float) -> ArrayT:
    """The residual stream, and a multiple of what a block computes."""
    if multiplier == 1:
        return x + y
    xp = namespace(x=x, y=y)
    return xp.astype(_wide(x) + _wide(y) * multiplier, x.dtype, copy=False)


def scaled_logits(y: ArrayT, config: LlamaConfig) -> ArrayT:
    """The logits of what the head gives."""
    xp, wide = namespace(y=y), _wide(y)
    if config.logits_scaling != 1:
        scaling = config.logits_scaling
        wide = wide * scaling if config.multiplies_logits else wide / scaling
    if config.final_logit_softcapping is not None:
        wide = soft_capped(wide, config.final_logit_softcapping)
    return xp.astype(wide, y.dtype, copy=False)


def soft_capped(y: ArrayT, cap: float) -> ArrayT:
    """Numbers y as ``cap * tanh(y / cap)``."""
    return namespace(y=y).tanh(y / cap) * cap


def _wide(x: Array) -> Array:
    xp = namespace(x=x)
    return xp.astype(x, dtype_of(xp, accumulate_format(float_format("x", x)).name), copy=False)
