"""The temperature of queries, by which some models with a long context multiply them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import accumulate_format, check_integers, dtype_of, float_format
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.tracing import is_traced
from llama_layers.arrays.transfer import from_numpy, to_numpy
from llama_layers.arrays.types import Array, ArrayT
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.rope import apply_rope


def query_temperature(positions: Array, config: LlamaConfig, /, *, like: Array) -> Array:
    r"""Compute the factors of queries at some positions, which grow beyond the trained context.

    .. math:: t_p = 1 + \beta \ln(1 + \lfloor p / C \rfloor)

    Parameters
    ----------
    positions : Array, shape [S] or [B, S], an integer dtype
        Token positions, zero or more; of any library.
    config : LlamaConfig
        Its ``llama_4_scaling_beta`` is :math:`\beta`; C is the trained context, of
        ``rope_scaling``, or ``llama_4_scaling_context``, or ``max_position_embeddings``.
    like : Array
        The factors are for arrays of this library, device and dtype.

    Returns
    -------
    Array, the shape of positions
        In float32, or float64 if `like` is.

    Raises
    ------
    TypeError
        If the positions are not integers, or `config` or `like` is of another type.

    References
    ----------
    The model code of Llama 4 and of Ministral 3 in transformers.

    Examples
    --------
    >>> import numpy as np
    >>> from dataclasses import replace
    >>> from llama_layers import LlamaConfig, query_temperature
    >>> config = replace(LlamaConfig.llama2_7b(), llama_4_scaling_beta=0.1)
    >>> query_temperature(np.array([0, 4095, 4096]), config, like=np.ones(1)).round(4).tolist()
    [1.0, 1.0, 1.0693]
    """
    if not isinstance(config, LlamaConfig):
        raise TypeError(f"config: expected a LlamaConfig, got {type(config).__name__}")
    xp = namespace(positions=positions)
    check_integers("positions", positions)
    dtype = accumulate_format(float_format("like", like)).name
    if is_traced(positions):
        contexts = xp.astype(1 + positions // trained_context(config), dtype_of(xp, dtype))
        return 1 + config.llama_4_scaling_beta * xp.log(contexts)
    factors = temperatures(to_numpy(positions), config)
    return from_numpy(factors.astype(dtype), namespace(like=like), device(like))


def temperatures(positions: NDArray[np.integer], config: LlamaConfig) -> NDArray[np.float64]:
    """The factors of queries at positions whose numbers are known."""
    contexts = np.asarray(positions // trained_context(config), np.float64)
    return 1 + config.llama_4_scaling_beta * np.log1p(contexts)


def trained_context(config: LlamaConfig) -> int:
    """The context of training, beyond which queries grow."""
    scaling = config.rope_scaling
    said = None if scaling is None else scaling.original_max_position_embeddings
    return said or config.llama_4_scaling_context or config.max_position_embeddings


def rotated_query(q: ArrayT, rope: tuple[Array, ...], rotary_dim: int | None) -> ArrayT:
    """Queries [B, S, heads, D] after RoPE, and times their temperature where `rope` has it."""
    cos, sin, *more = rope
    if not more:
        return apply_rope(q, cos, sin, rotary_dim=rotary_dim)
    xp, (temperature,) = namespace(q=q), more
    wide = xp.astype(q, cos.dtype, copy=False)
    wide = apply_rope(wide, cos, sin, rotary_dim=rotary_dim)
    factors = xp.reshape(temperature, (*temperature.shape, 1, 1))
    return xp.astype(wide * factors, q.dtype, copy=False)
