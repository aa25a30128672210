"""Products of a few rows: which the kernel takes, and that they do not depend on each other."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

from llama_layers import linear
from llama_layers.backends.cupy import launch
from llama_layers.testing import assert_same_bits, assert_within_bound
from llama_layers.verify import linear_bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("columns", [1, 6, 12, 40, 250, 256, 264, 2056, 4200])
def test_a_row_does_not_depend_on_the_others(backend, dtype, columns, rng):
    """By the kernel: on both sides of what a lane and a warp read at once, of 1 to 8 rows."""
    x, weight = (rng.standard_normal((rows, columns)).astype(dtype) for rows in (8, 11))
    bound = linear_bound(x, weight, dtype="float32")
    sums = {}  # in float32, which 16 bits would hide differences of
    for rows in range(1, 9):
        y = backend.xp.empty((rows, 11), np.float32)
        launch.gemv(backend.array(x[:rows]), backend.array(weight), y)
        sums[rows] = y.get()
    assert_within_bound(sums[8], bound)
    for rows in range(1, 8):
        assert_same_bits(sums[rows], sums[8][:rows])


def test_which_products_the_kernel_takes(backend, rng):
    x, weight = (backend.array(rng.standard_normal((n, 8)).astype(np.float32)) for n in (9, 5))
    narrow = weight.astype(np.float16)
    cases = [
        (x[:1], weight, True), (x[:8], weight, True), (x, weight, False),
        (x[:2], narrow, False), (x[:2, ::2], weight[:, ::2], False), (x[:2], weight[::2], False),
        (x[:2].astype(np.float64), weight.astype(np.float64), False),
    ]  # fmt: skip
    for rows, matrix, taken in cases:
        with mock.patch.object(launch, "gemv", side_effect=launch.gemv) as gemv:
            y = linear(rows, matrix).get()
        assert gemv.called == taken
        assert_within_bound(y, linear_bound(rows.get(), matrix.get()))
