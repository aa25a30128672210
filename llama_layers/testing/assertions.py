"""Assertions that say what is wrong with an array, and where."""

from __future__ import annotations

import warnings

import numpy as np

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.verify.bound import Bound
from llama_layers.verify.judge import judge


class UnusualErrorWarning(UserWarning):
    """An error that rounding can explain, but that correct code rarely makes."""


def assert_within_bound(computed: Array, bound: Bound, /) -> None:
    """Assert that rounding can explain every element's error.

    Parameters
    ----------
    computed : Array, the shape of ``bound.exact``
        The result, of any library and float dtype.
    bound : Bound
        What it should be, and how far from that it may lie.

    Raises
    ------
    AssertionError
        If the error of an element exceeds its limit: FAIL. The message names the worst element.
    TypeError
        If `computed` holds no floats.
    ValueError
        If the shapes differ.

    Warns
    -----
    UnusualErrorWarning
        If every error is within its limit, but one exceeds what is usual, or no element has a
        limit: WARN.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import linear
    >>> from llama_layers.testing import assert_within_bound
    >>> from llama_layers.verify import linear_bound
    >>> x, w = np.ones((1, 4), np.float32), np.eye(4, dtype=np.float32)
    >>> assert_within_bound(linear(x, w), linear_bound(x, w))
    >>> assert_within_bound(1.5 * x, linear_bound(x, w))
    Traceback (most recent call last):
    AssertionError: FAIL: error 2.1e+06 times its limit at [0, 0]: computed 1.5, exact 1.0, ...
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    judgement = judge(computed, bound)
    if judgement.verdict == "PASS":
        return
    if judgement.ratio <= 1 and judgement.usual_ratio <= 1:
        message = "WARN: nothing is judged: every element can overflow, and has no limit"
        warnings.warn(message, UnusualErrorWarning, stacklevel=2)
        return
    failed = judgement.verdict == "FAIL"
    name, limits = ("limit", bound.limit) if failed else ("usual size", bound.usual)
    ratios = bound.ratio(computed) if failed else bound.usual_ratio(computed)
    worst = np.unravel_index(int(np.argmax(ratios)), ratios.shape)
    message = (
        f"{judgement.verdict}: error {ratios[worst]:.3g} times its {name} at "
        f"{[int(i) for i in worst]}: computed {float(to_numpy(computed)[worst])!r}, exact "
        f"{float(bound.exact[worst])!r}, {name} {float(limits[worst])!r}; "
        f"{np.count_nonzero(ratios > 1)} of {ratios.size} elements beyond it. "
        "FAIL: no order of summation rounds so far. WARN: rounding can, but rarely does. "
        "PASS: as usual."
    )
    if failed:
        raise AssertionError(message)
    warnings.warn(message, UnusualErrorWarning, stacklevel=2)


def assert_same_bits(first: Array, second: Array, /) -> None:
    """Assert that two arrays are the same, signs of zeros and payloads of NaNs included.

    Parameters
    ----------
    first, second : Array
        Of any libraries; how they lie in memory does not count.

    Raises
    ------
    AssertionError
        If shape, dtype or a bit differs. The message names the first element that does.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.testing import assert_same_bits
    >>> assert_same_bits(np.array([np.nan]), np.array([np.nan]))
    >>> assert_same_bits(np.array([1.0, 0.0]), np.array([1.0, -0.0]))
    Traceback (most recent call last):
    AssertionError: 1 of 2 elements differ, the first at [1]: 0.0 (0x0000000000000000) and ...
    """
    __tracebackhide__ = True
    a, b = to_numpy(first), to_numpy(second)
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {list(a.shape)} and {list(b.shape)}")
    if dtype_name(a.dtype) != dtype_name(b.dtype):
        raise AssertionError(f"dtypes differ: {dtype_name(a.dtype)} and {dtype_name(b.dtype)}")
    word = np.dtype(f"u{a.dtype.itemsize}")
    bits_a, bits_b = (np.ascontiguousarray(array).view(word).reshape(a.shape) for array in (a, b))
    differ = np.argwhere(bits_a != bits_b)
    if not len(differ):
        return
    place = tuple(int(i) for i in differ[0])
    digits = 2 + 2 * a.dtype.itemsize
    raise AssertionError(
        f"{len(differ)} of {a.size} elements differ, the first at {list(place)}: "
        f"{a[place]} ({int(bits_a[place]):#0{digits}x}) and "
        f"{b[place]} ({int(bits_b[place]):#0{digits}x})"
    )
