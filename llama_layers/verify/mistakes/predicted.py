"""A rounding that is predicted number by number, not only allowed for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llama_layers.arrays.dtypes import FloatFormat
from llama_layers.verify.roundoff import Float64Array, read_in
from llama_layers.verify.tracked import Tracked


def rounded(numbers: Tracked, form: FloatFormat) -> Tracked:
    """Numbers rounded to a format, and not said to be off but where the rounding is not sure."""
    exact = read_in(numbers.exact, form)

    def error(e: Float64Array) -> Float64Array:
        low, high = (read_in(numbers.exact + sign * e, form) for sign in (-1, 1))
        return np.maximum(np.abs(high - exact), np.abs(exact - low))

    return replace(numbers.with_errors(numbers.errors(error), exact), form=form)
