"""What errors look like, beyond their size: evidence for hypotheses that predict no numbers.

A hypothesis that allows larger errors holds many arrays that it has nothing to do with. Roundings
in a sum err in all tokens and channels alike, to both sides, and by numbers that no linear map of
either factor gives. A changed weight, or an input that was rounded, errs by such a map.
"""

from __future__ import annotations

import numpy as np

from llama_layers.verify.roundoff import Float64Array

# Rows and columns that are compared with each other.
_ROWS, _COLUMNS = 96, 512
# The largest error of a token, or a channel, over that of the median one, and the reverse.
_UNEVEN = 8.0
# Of all squared errors, the share that the largest hundredth may have; of normal errors it has 8 %.
_HEAVY = 0.3
# The share of errors that may be linear, and the largest standard error with which that is known.
_LINEAR, _VAGUE = 0.2, 0.1
# The cosine from which on rows are taken to be the same: they are rounded the same.
_SAME = 0.99
# The least share of all singular values that count.
_FULL = 0.7
# Standard errors within which a mean is zero.
_FAR = 5.0
# Of the mean square of errors of large results, the least that those of small ones have.
_RELATIVE = 0.1
# A row of numbers that were rounded to a coarser grid has a smaller share of distinct ones.
_DISTINCT = 0.85


def is_spread(error: Float64Array, scale: Float64Array) -> bool:
    """Whether errors [T, N], relative to a scale, are alike in all tokens and all channels."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.square(np.where(scale > 0, error / scale, 0.0))
    total = float(z.sum())
    if not total:
        return False
    few = -(-z.size // 100)
    largest = np.partition(z, z.size - few, axis=None)[z.size - few :].sum()
    return bool(largest <= _HEAVY * total or few < 5) and all(
        _even(np.sqrt(z.mean(axis=axis))) for axis in (0, 1) if z.shape[axis] >= _UNEVEN
    )


def _even(sizes: Float64Array) -> bool:
    median = float(np.median(sizes))
    return bool(median > 0 and sizes.max() <= _UNEVEN * median and sizes.min() >= median / _UNEVEN)


def has_no_mean(error: Float64Array) -> bool:
    """Whether errors [T, N] add up to nothing: all of them, those of channels, those of tokens."""
    size = float(np.mean(np.square(error)))
    if not size or abs(error.mean()) > _FAR * np.sqrt(size / error.size):
        return False
    for axis in (0, 1):
        count, others = error.shape[axis], error.shape[1 - axis]
        share = count * float(np.mean(np.square(error.mean(axis=axis)))) / size
        if count > 1 and share > 2 + _FAR * np.sqrt(2 / others):
            return False
    return True


def is_linear(pairs: list[tuple[Float64Array, Float64Array]]) -> bool | None:
    r"""Whether errors are in part a linear map of rows: pairs of errors [T, N] and rows [T, K].

    If :math:`E = X D` with any D of independent numbers, the cosine between two rows of E is near
    that between the same rows of X. Over all pairs of rows, the slope of the one over the other is
    1 then, and 0 if errors have nothing to do with X. None if there are too few rows to tell.
    """
    above = below = noise = 0.0
    for error, rows in map(_without_repeats, pairs):
        some = np.linspace(0, len(error) - 1, min(len(error), _ROWS)).astype(int)
        columns = np.linspace(0, error.shape[1] - 1, min(error.shape[1], _COLUMNS)).astype(int)
        e, x = _cosines(error[np.ix_(some, columns)]), _cosines(rows[some])
        x = np.where(np.abs(x) < _SAME, x, 0.0)
        above += float(np.sum(e * x))
        below += float(np.sum(x * x))
        noise += float(np.sum(x * x)) / len(columns)
    slope_error = np.sqrt(noise) / below if below else np.inf
    if slope_error > _VAGUE:
        return None
    return bool(abs(above / below) > _LINEAR + 3 * slope_error)


def _without_repeats(pair: tuple[Float64Array, Float64Array]) -> tuple[Float64Array, Float64Array]:
    """Rows that differ: a token that comes twice is rounded the same twice."""
    error, rows = pair
    _, first = np.unique(rows, axis=0, return_index=True)
    return error[first], rows[first]


def is_of_low_rank(error: Float64Array, scale: Float64Array) -> bool:
    r"""Whether errors [T, N], relative to a scale, are made of few products of a row and a column.

    The number of singular values that count, :math:`(\sum s_i^2)^2 / \sum s_i^4`, is
    :math:`1 / (1 / T + 1 / N)` for independent errors of one size.
    """
    some = np.linspace(0, len(error) - 1, min(len(error), _ROWS)).astype(int)
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = np.where(scale > 0, error / scale, 0.0)[some]
    rows = np.unique(rows, axis=0)
    for axis in (0, 1):
        size = np.linalg.norm(rows, axis=axis, keepdims=True)
        rows = rows / np.where(size > 0, size, 1.0)
    gram = rows @ rows.T
    counted = np.trace(gram) ** 2 / max(float(np.sum(np.square(gram))), 1e-300)
    return bool(counted * (1 / rows.shape[0] + 1 / rows.shape[1]) < _FULL)


def _cosines(rows: Float64Array) -> Float64Array:
    """The cosines between rows, for each pair once."""
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(size > 0, size, 1.0)
    return np.triu(unit @ unit.T, 1)


def is_relative(error: Float64Array, exact: Float64Array) -> bool:
    """Whether errors are hardly any where the result is small, as of a result that was rounded."""
    order = np.argsort(np.abs(exact), axis=None)
    squares, third = np.square(error).ravel()[order], max(1, error.size // 3)
    return bool(squares[:third].mean() < _RELATIVE * squares[-third:].mean())


def on_a_coarser_grid(computed: Float64Array, rounded: Float64Array) -> bool:
    """Whether the rows of an array have fewer distinct numbers than what was only rounded."""
    found, expected = (sum(len(np.unique(np.abs(row))) for row in y) for y in (computed, rounded))
    return found < _DISTINCT * expected
