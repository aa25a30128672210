"""NumPy's results in memory that is used again: no two arrays that are alive share any."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers.backends.numba import array_pool


@pytest.fixture(autouse=True)
def nothing_spare():
    for blocks in array_pool._spare.values():
        blocks.clear()


KIB = 1 << 10
SIZES = st.sampled_from([1, 127, 128, 129, 200, 256, 1000, 4095, 4096, 4097])


@given(
    steps=st.lists(st.tuples(SIZES, st.booleans(), st.integers(0, 5)), max_size=20),
)
def test_arrays_that_are_alive_keep_their_numbers(steps):
    """Some are dropped in between, and of some only a view is kept."""
    alive = []
    for number, (size, whole, drop) in enumerate(steps):
        array = array_pool.empty((size, KIB), np.uint8)
        array[:] = number
        alive.append((number, array if whole else array[size // 2 :].T))
        if drop < len(alive):
            del alive[drop]
        for expected, kept in alive:
            assert (kept == expected).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.uint16])
def test_shape_dtype_and_place(dtype):
    array = array_pool.empty((3, 5, 20_000), dtype)
    assert array.shape == (3, 5, 20_000)
    assert array.dtype == dtype
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert array.ctypes.data % 64 == 0


def test_memory_is_used_again_when_the_last_view_is_gone():
    array = array_pool.empty((300, KIB), np.uint8)
    place, view = array.ctypes.data, array[5:7]
    del array
    assert array_pool.empty((300, KIB), np.uint8).ctypes.data != place
    del view
    others = [np.empty(300 * KIB, np.uint8) for _ in range(8)]  # of what the C library has free
    places = {array_pool.empty((n, KIB), np.uint8).ctypes.data for n in (300, 400)}
    assert place in places
    del others


def test_only_so_much_is_kept():
    arrays = [array_pool.empty((1 << 20,), np.uint8) for _ in range(3 * array_pool.SPARE)]
    del arrays
    assert len(array_pool._spare[1 << 20]) == array_pool.SPARE


@pytest.mark.parametrize("nbytes", [0, 1, (1 << 17) - 1, (1 << 22) + 1])
def test_other_sizes_are_numpys(nbytes):
    assert array_pool.empty((nbytes,), np.uint8).flags.owndata
