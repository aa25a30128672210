"""The order of the rows of Q and K in files of Meta and GGUF."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama_layers.model.rope_rows import permute_rope_rows, unpermute_rope_rows
from tests.support import tiny


@given(
    groups=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    pairs=st.integers(1, 4),
    columns=st.sampled_from([None, 1, 3]),
)
def test_rows_come_back_for_all_head_ratios(groups, kv_heads, pairs, columns):
    for heads in (groups * kv_heads, kv_heads):
        shape = (heads * 2 * pairs,) if columns is None else (heads * 2 * pairs, columns)
        rows = np.arange(np.prod(shape)).reshape(shape)
        permuted = tiny.permuted(rows, heads)
        assert np.array_equal(unpermute_rope_rows(permuted, heads, 2 * pairs), rows)
        assert np.array_equal(permute_rope_rows(rows, heads, 2 * pairs), permuted)


def test_rows_that_are_not_rotated_stay():
    rows = np.arange(12)
    permuted = np.array([0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11])
    assert np.array_equal(unpermute_rope_rows(permuted, 2, 4), rows)
    assert np.array_equal(permute_rope_rows(rows, 2, 4), permuted)
