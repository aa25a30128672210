"""The frequencies of RoPE, and what each kind of scaling makes of them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.config.rope_scaling import RopeScaling


def frequencies(config: LlamaConfig, length: int | None) -> NDArray[np.float64]:
    """The definition of `llama_layers.layers.rope.inv_freq`, for arguments already checked."""
    scaling = config.rope_scaling
    plain = _plain(config.rope_theta, config.rotary_dim)
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    if scaling.rope_type == "dynamic":
        return _dynamic(config, scaling, length)
    if scaling.rope_type == "yarn":
        return _yarn(config, scaling)
    if scaling.rope_type == "longrope":
        return plain / _divisors(scaling, length)
    return _llama3(config, scaling)


def _plain(theta: float, width: int) -> NDArray[np.float64]:
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def _dynamic(config: LlamaConfig, scaling: RopeScaling, length: int | None) -> NDArray[np.float64]:
    """Raise the base with the length, so that the slowest frequency is interpolated."""
    if config.rotary_dim == 2:  # one pair, which rotates by 1 whatever the base
        return _plain(config.rope_theta, config.rotary_dim)
    trained = config.max_position_embeddings
    stretch = scaling.factor * max(length or 0, trained) / trained - (scaling.factor - 1)
    exponent = config.rotary_dim / (config.rotary_dim - 2)
    return _plain(config.rope_theta * stretch**exponent, config.rotary_dim)


def _yarn(config: LlamaConfig, scaling: RopeScaling) -> NDArray[np.float64]:
    """Interpolate slow frequencies, keep fast ones, and ramp between them."""
    trained = scaling.original_max_position_embeddings or config.max_position_embeddings
    dim = config.rotary_dim

    def pair_of(turns: float) -> float:
        """The (fractional) pair of channels with this many turns over the trained context."""
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = pair_of(scaling.beta_fast or 32.0)
    high = pair_of(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # a ramp of zero width would divide by zero
    interpolated = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)
    plain = _plain(config.rope_theta, dim)
    return plain / scaling.factor * interpolated + plain * (1 - interpolated)


def _llama3(config: LlamaConfig, scaling: RopeScaling) -> NDArray[np.float64]:
    """Divide the slow frequencies by the factor, and blend in a band of wavelengths."""
    assert scaling.original_max_position_embeddings is not None  # RopeScaling demands all three
    assert scaling.low_freq_factor is not None
    assert scaling.high_freq_factor is not None
    plain = _plain(config.rope_theta, config.rotary_dim)
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return plain * (kept + (1 - kept) / scaling.factor)


def _divisors(scaling: RopeScaling, length: int | None) -> NDArray[np.float64]:
    """What "longrope" divides each frequency by, within the trained context or beyond it."""
    assert scaling.original_max_position_embeddings is not None  # RopeScaling demands all three
    beyond = length is not None and length > scaling.original_max_position_embeddings
    divisors = scaling.long_factor if beyond else scaling.short_factor
    return np.asarray(divisors, np.float64)
