"""Rotary position embedding, with every published scaling of its frequencies."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.checks import check_choice, check_count
from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import accumulate_format, check_integers, dtype_of, float_format
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.tracing import is_traced
from llama_layers.arrays.transfer import from_numpy, to_numpy
from llama_layers.arrays.types import Array, ArrayT, Namespace
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.frequencies import frequencies


def inv_freq(config: LlamaConfig, /, *, length: int | None = None) -> NDArray[np.float64]:
    r"""Compute the angle by which each pair of channels rotates from one position to the next.

    .. math:: \omega_i = \theta^{-2i/R}, \quad 0 \le i < R/2

    and what ``config.rope_scaling`` makes of it. R is the number of channels that are rotated,
    ``config.rotary_dim``: those of a head, or a part of them.

    Parameters
    ----------
    config : LlamaConfig
        Its ``rope_theta``, ``rotary_dim`` and ``rope_scaling`` are read. Where RoPE differs from
        layer to layer: that of a layer, ``config.rope_of(layer)``.
    length : int, optional
        How many positions are in use, on which "dynamic" and "longrope" scaling depend; the trained
        context if not given.

    Returns
    -------
    ndarray of float64, shape [R / 2]
        Radians a position.

    Raises
    ------
    TypeError
        If the config is not a `LlamaConfig`.
    ValueError
        If the length is not a positive integer.

    Notes
    -----
    With "dynamic" or "longrope" scaling, and beyond the trained context, a sequence fed in chunks
    differs from the same sequence fed at once: each chunk is rotated by the frequencies of the
    length so far, and keys that are in a cache already are not rotated again. transformers does the
    same.

    References
    ----------
    J. Su et al., "RoFormer", section 3.4.2. `arXiv:2104.09864 <https://arxiv.org/abs/2104.09864>`_.
    Linear scaling: S. Chen et al., `arXiv:2306.15595 <https://arxiv.org/abs/2306.15595>`_. YaRN and
    dynamic NTK: B. Peng et al., `arXiv:2309.00071 <https://arxiv.org/abs/2309.00071>`_. The band
    of "llama3": the model code that Meta published with Llama 3.1. LongRoPE: Y. Ding et al.,
    `arXiv:2402.13753 <https://arxiv.org/abs/2402.13753>`_.

    Examples
    --------
    >>> from llama_layers import LlamaConfig, inv_freq
    >>> inv_freq(LlamaConfig.llama2_7b())[:2].round(6).tolist()
    [1.0, 0.865964]
    """
    _checked(config)
    if length is not None:
        check_count("length", length)
    return frequencies(config, length)


def _checked(config: LlamaConfig) -> LlamaConfig:
    if not isinstance(config, LlamaConfig):
        raise TypeError(f"config: expected a LlamaConfig, got {type(config).__name__}")
    return config


def attention_factor(config: LlamaConfig, /) -> float:
    """Compute the factor of the RoPE table: 1, except for "yarn" and "longrope".

    Parameters
    ----------
    config : LlamaConfig
        Its ``rope_scaling`` is read.

    Returns
    -------
    float
        The ``attention_factor`` of the config. Else for "yarn", with m(s) = 0.1 s ln(factor) + 1,
        the quotient m(mscale) / m(mscale_all_dim) where both are given, or m(1); for "longrope" the
        root of 1 + ln(factor) / ln(original_max_position_embeddings).

    References
    ----------
    B. Peng et al., "YaRN", equation 22. `arXiv:2309.00071 <https://arxiv.org/abs/2309.00071>`_
    Y. Ding et al., "LongRoPE". `arXiv:2402.13753 <https://arxiv.org/abs/2402.13753>`_

    Examples
    --------
    >>> from llama_layers import LlamaConfig
    >>> from llama_layers.layers.rope import attention_factor
    >>> attention_factor(LlamaConfig.llama2_7b())
    1.0
    """
    scaling = _checked(config).rope_scaling
    if scaling is None or scaling.rope_type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.rope_type == "longrope":
        assert scaling.original_max_position_embeddings is not None  # RopeScaling demands it
        more = math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings)
        return math.sqrt(1 + max(0.0, more))

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def rope_table(positions: Array, config: LlamaConfig, /, *, like: Array) -> tuple[Array, Array]:
    r"""Compute cosines and sines of the angles at some positions.

    The phases are computed in float64 by NumPy and cast: in float32 they would be off by
    about 1e-4 at position 8191, and by more beyond.

    Parameters
    ----------
    positions : Array, shape [S] or [B, S], an integer dtype
        Token positions, zero or more; of any library.
    config : LlamaConfig
        Its ``rope_theta``, ``rotary_dim`` and ``rope_scaling`` are read. Where RoPE differs from
        layer to layer: that of a layer, ``config.rope_of(layer)``.
    like : Array
        The table is for arrays of this library, device and dtype.

    Returns
    -------
    cos, sin : Array, shape [S, rotary_dim / 2] or [B, S, rotary_dim / 2]
        In float32, or float64 if `like` is. For "yarn" and "longrope" multiplied by their attention
        factor.

    Raises
    ------
    TypeError
        If the positions are not integers, `config` is of another type, or `like` is not an array of
        floats.
    ValueError
        If their shape is another, or one is negative. Positions that `jax.jit` or `torch.compile`
        traces are not known: negative ones give NaN, and "dynamic" and "longrope" scaling raise.
        So do positions from 2**20 on where jax has no float64.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import LlamaConfig, rope_table
    >>> x = np.zeros((1, 2, 32, 128), np.float32)
    >>> cos, sin = rope_table(np.arange(2), LlamaConfig.llama2_7b(), like=x)
    >>> cos.shape, float(cos[0, 0]), float(sin[0, 0])
    ((2, 64), 1.0, 0.0)
    """
    xp = namespace(positions=positions)
    check_integers("positions", positions)
    _checked(config)
    if positions.ndim not in (1, 2):
        raise ValueError(f"positions: expected shape [S] or [B, S], got {list(positions.shape)}")
    return angle_table(xp, positions, config, like)


@portable
def angle_table(
    xp: Namespace, positions: Array, config: LlamaConfig, like: Array
) -> tuple[Array, Array]:
    """The definition of `rope_table`, for arguments already checked but for their numbers."""
    if is_traced(positions):
        return traced_table(xp, positions, config, like)
    place = to_numpy(positions)
    if place.size and place.min() < 0:
        raise ValueError(f"positions: expected zero or more, got {place.min()}")
    length = int(place.max()) + 1 if place.size else None
    phases = place[..., None].astype(np.float64) * inv_freq(config, length=length)
    factor = attention_factor(config)
    dtype = accumulate_format(float_format("like", like)).name
    cos, sin = (
        from_numpy((table * factor).astype(dtype), namespace(like=like), device(like))
        for table in (np.cos(phases), np.sin(phases))
    )
    return cos, sin


def traced_table(
    xp: Namespace, positions: Array, config: LlamaConfig, like: Array
) -> tuple[Array, Array]:
    """The same in the terms of the library of positions whose numbers are not known yet.

    Nobody can refuse negative ones, so they give NaN.
    """
    check_known_length(config)
    double = xp.asarray(inv_freq(config), device=device(positions))
    places = xp.expand_dims(xp.astype(positions, double.dtype), axis=-1)
    phases = xp.where(places >= 0, places, xp.nan) * double
    factor = attention_factor(config)
    dtype = dtype_of(xp, accumulate_format(float_format("like", like)).name)
    return (
        xp.astype(xp.cos(phases) * factor, dtype),
        xp.astype(xp.sin(phases) * factor, dtype),
    )


def check_known_length(config: LlamaConfig) -> None:
    """Raise ValueError if the frequencies depend on positions that are not known yet."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.depends_on_length:
        raise ValueError(
            f"positions: expected known numbers for rope_type {scaling.rope_type!r}, whose "
            "frequencies depend on the largest, got traced ones"
        )


def apply_rope(
    x: ArrayT,
    cos: Array,
    sin: Array,
    /,
    *,
    layout: Literal["half", "interleaved"] = "half",
    rotary_dim: int | None = None,
) -> ArrayT:
    r"""Rotate each pair of channels by its angle.

    .. math:: (a_i, b_i) \mapsto
        (a_i \cos\phi_i - b_i \sin\phi_i,\; b_i \cos\phi_i + a_i \sin\phi_i)

    Parameters
    ----------
    x : Array, shape [B, S, heads, D], a float dtype
        Queries or keys. Values are never rotated.
    cos, sin : Array, shape [S, R / 2], [1, S, R / 2] or [B, S, R / 2]
        From `rope_table`.
    layout : {"half", "interleaved"}
        Which channels are a pair: i and i + R / 2 ("half", Hugging Face checkpoints), or 2i and
        2i + 1 ("interleaved", Meta's and the paper's). The weights decide which is right, and
        config.json does not say.
    rotary_dim : int, optional
        R, how many channels of a head are rotated: the first ones. The others stay as they are. All
        D if not given.

    Returns
    -------
    Array, shape and dtype of x
        Computed in the dtype of the table, rounded once.

    Raises
    ------
    TypeError
        If an argument is not an array of floats, or the libraries differ.
    ValueError
        If a shape does not fit or the layout is unknown.

    References
    ----------
    J. Su et al., "RoFormer", equation 15. `arXiv:2104.09864 <https://arxiv.org/abs/2104.09864>`_

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import apply_rope
    >>> quarter_turn = np.zeros((1, 1)), np.ones((1, 1))
    >>> apply_rope(np.array([[[[1.0, 0.0]]]]), *quarter_turn)
    array([[[[0., 1.]]]])
    """
    xp = namespace(x=x, cos=cos, sin=sin)
    table = accumulate_format(float_format("x", x))
    if x.ndim != 4 or (rotary_dim is None and x.shape[3] % 2):
        raise ValueError(f"x: expected shape [B, S, heads, D] with an even D, got {list(x.shape)}")
    width = _rotated_width(x, rotary_dim)
    expected = (x.shape[1], width // 2)
    for name, array in (("cos", cos), ("sin", sin)):
        if (found := float_format(name, array)) is not table:
            raise TypeError(f"{name}: expected {table.name} for x, got {found.name}")
        if tuple(array.shape) not in (expected, (1, *expected), (x.shape[0], *expected)):
            raise ValueError(
                f"{name}: expected shape {list(expected)} or {[x.shape[0], *expected]} for x "
                f"{list(x.shape)}, got {list(array.shape)}"
            )
    check_choice("layout", layout, "half", "interleaved")
    if width == x.shape[3]:
        return rotate(xp, x, cos, sin, layout)
    return xp.concat([rotate(xp, x[..., :width], cos, sin, layout), x[..., width:]], axis=-1)


def _rotated_width(x: Array, rotary_dim: int | None) -> int:
    if rotary_dim is None:
        return int(x.shape[3])
    check_count("rotary_dim", rotary_dim)
    if rotary_dim % 2 or rotary_dim > x.shape[3]:
        raise ValueError(
            f"rotary_dim: expected an even number up to {x.shape[3]}, the channels of a head, got "
            f"{rotary_dim}"
        )
    return rotary_dim


@portable
def rotate(xp: Namespace, x: ArrayT, cos: Array, sin: Array, layout: str) -> ArrayT:
    """The definition of `apply_rope`, for arguments already checked."""
    wide = xp.astype(x, cos.dtype, copy=False)
    cos, sin = (xp.expand_dims(angle, axis=-2) for angle in (cos, sin))  # the same for each head
    if layout == "half":
        half = x.shape[3] // 2
        a, b = wide[..., :half], wide[..., half:]
        y = xp.concat([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = wide[..., 0::2], wide[..., 1::2]
        y = xp.reshape(xp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1), x.shape)
    return xp.astype(y, x.dtype, copy=False)
