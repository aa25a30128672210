"""Root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from llama_layers.arrays.checks import check_finite
from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import accumulate_format, check_sums_hold, dtype_of, float_format
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.types import Array, ArrayT, Namespace, Number
from llama_layers.layers.group import Group


def rms_norm(x: ArrayT, weight: Array | None, /, *, eps: Number, offset: Number = 0.0) -> ArrayT:
    r"""Divide each row by its root mean square and scale it by a weight.

    .. math:: y_i = (w_i + o) \, \frac{x_i}{\sqrt{\frac{1}{H} \sum_j x_j^2 + \varepsilon}}

    Parameters
    ----------
    x : Array, shape [..., H], a float dtype
        Hidden states.
    weight : Array, shape [H], a float dtype, or None
        Scale of each channel, from the same library and device as `x`; 1 if None.
    eps : float
        Added to the mean square, under the root: ``rms_norm_eps`` of config.json. There is no
        default, because a checkpoint that runs with another value gives wrong numbers.
    offset : float, optional
        The o above, which is added to the weight, in the format of the sums: 1 for Gemma, 0
        elsewhere. Without a weight there is none.

    Returns
    -------
    Array, shape [..., H], the dtype of x
        The normalised rows. All arithmetic is in float32 (float64 for float64 `x`) and rounded
        to the dtype of `x` once, at the end.

    Raises
    ------
    TypeError
        If `x` or `weight` is not an array of floats, they come from different libraries, the weight
        has a dtype that float32 (float64 for float64 `x`) does not hold exactly, or `eps` is not
        a number.
    ValueError
        If the shapes do not fit, the devices differ or `eps` is negative or not finite.

    Notes
    -----
    The squares of numbers beyond 1.8e19 overflow float32. Such a row becomes zeros, as in every
    published implementation that normalises in float32.

    References
    ----------
    B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019,
    equation 4. `arXiv:1910.07467 <https://arxiv.org/abs/1910.07467>`_

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import rms_norm
    >>> rms_norm(np.array([3.0, 4.0]), np.array([1.0, 10.0]), eps=0.0) * np.sqrt(12.5)
    array([ 3., 40.])
    """
    xp, weight = _with_offset(x, weight, offset)
    return normalise(xp, x, weight, check_finite("eps", eps, negative=False))


def _with_offset(x: Array, weight: Array | None, offset: Number) -> tuple[Namespace, Array]:
    """The library of x [..., H], and what its channels are multiplied by."""
    xp = namespace(x=x, weight=weight)
    float_format("x", x)
    if x.ndim < 1:
        raise ValueError("x: expected shape [..., H], got a scalar")
    if weight is None:
        return xp, xp.ones((x.shape[-1],), dtype=x.dtype, device=device(x))
    check_sums_hold(x, weight=weight)
    if tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(
            f"weight: expected shape [{x.shape[-1]}], the last axis of x, got {list(weight.shape)}"
        )
    if offset:
        weight = _wide(xp, weight, x) + check_finite("offset", offset)
    return xp, weight


def rms_norms_over_ranks(
    arrays: Sequence[Array],
    weights: Sequence[Array | None],
    group: Group,
    *,
    eps: float,
    offset: float,
) -> list[Array]:
    """`rms_norm` of rows of which each rank has an equal share, each array with its own weight.

    The mean squares of all arrays are summed over the ranks at once.
    """
    prepared = [_with_offset(x, w, offset) for x, w in zip(arrays, weights, strict=True)]
    xp = prepared[0][0]
    shares = xp.concat([_mean_square(xp, x) for x in arrays], axis=-1)
    means = group.all_reduce(shares) / group.size
    return [
        _divided(xp, x, means[..., i : i + 1] + eps, weight)
        for i, (x, (_, weight)) in enumerate(zip(arrays, prepared, strict=True))
    ]


@portable
def normalise(xp: Namespace, x: ArrayT, weight: Array, eps: float) -> ArrayT:
    """The definition of `rms_norm`, for arguments already checked."""
    return _divided(xp, x, _mean_square(xp, x) + eps, weight)


def _mean_square(xp: Namespace, x: Array) -> Array:
    """That of each row of x [..., H], as [..., 1]."""
    wide = _wide(xp, x, x)
    return xp.mean(wide * wide, axis=-1, keepdims=True)


def _divided(xp: Namespace, x: ArrayT, squared: Array, weight: Array) -> ArrayT:
    """Rows by the root of a number each, times a weight."""
    y = _wide(xp, x, x) / xp.sqrt(squared) * _wide(xp, weight, x)
    return xp.astype(y, x.dtype, copy=False)


def _wide(xp: Namespace, array: Array, x: Array) -> Array:
    """An array in the format of the sums of x."""
    wide = dtype_of(xp, accumulate_format(float_format("x", x)).name)
    return xp.astype(array, wide, copy=False)
