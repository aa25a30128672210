"""The order of the rows of Q and K in files of Meta and GGUF."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama_layers.model.rope_rows import unpermute_rope_rows
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
        assert np.array_equal(unpermute_rope_rows(permuted, heads), rows)
