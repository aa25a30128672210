"""NumPy's attention a tile at a time, against rows one by one and the bound on the error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import Mask, attention
from llama_layers.backends.numpy import attention as numpy_attention
from llama_layers.testing import assert_within_bound
from llama_layers.verify import attention_bound


def drawn(seed, batch, queries, keys, heads, kv_heads):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, queries, heads, 4))
    return q, *rng.standard_normal((2, batch, keys, kv_heads, 4))


@st.composite
def tiled(draw, dtype="float64"):
    """Queries, keys, values in some memory order, a mask, the same as booleans, a tile's size."""
    queries, past = draw(st.sampled_from([1, 2, 63, 64, 65, 129])), draw(st.integers(0, 70))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 3)]))
    keys, batch = past + queries, draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**32 - 1))
    arrays = drawn(seed, batch, queries, keys, kv_heads * group, kv_heads)
    order = draw(st.sampled_from("CF"))
    arrays = [np.asarray(array.astype(dtype), order=order) for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    keep = np.ones((batch, keys), bool)
    if batch > 1 or draw(st.booleans()):
        keep = np.random.default_rng(seed).random(keep.shape) < 0.7
        keep[0, : draw(st.integers(0, keys))] = False  # as before a shorter prompt
    window = draw(st.sampled_from([None, 1, 5, 64, 100]))
    distance = past + np.arange(queries)[:, None] - np.arange(keys)
    boolean = (distance >= 0) & (distance < (window or keys)) & keep[:, None]
    mask = Mask(past + np.arange(queries), np.arange(keys), window, keep)
    tile = draw(st.sampled_from([1, 500, 1 << 13, 1 << 15, 1 << 18]))
    return arrays, draw(st.sampled_from([mask, boolean, None])), boolean, tile


@given(case=tiled())
def test_tiles_like_one_row_at_a_time(case):
    (q, k, v), mask, boolean, tile = case
    if mask is None:
        boolean = np.ones_like(boolean)
    expected = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, s, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(boolean[b, s])
        if seen.size:
            scores = k[b, seen, h // group] @ q[b, s, h] / 2
            p = np.exp(scores - scores.max())
            expected[b, s, h] = p @ v[b, seen, h // group] / p.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_attention, "TILE", tile)
        y = attention(q, k, v, mask=mask)
    # Scores of size 10 are off by some 2**-50 before they become exponents.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@given(data=st.data())
def test_tiles_are_within_the_bound(dtype, data):
    (q, k, v), mask, boolean, tile = data.draw(tiled(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_attention, "TILE", tile)
        y = attention(q, k, v, mask=mask)
    assert_within_bound(y, attention_bound(q, k, v, mask=None if mask is None else boolean))


def test_tiles_of_the_real_size():
    """Some 300 000 scores are more than a tile; queries and keys of all blocks are seen."""
    q, k, v = (array.astype(np.float32) for array in drawn(9, 1, 257, 300, 4, 2))
    for mask in (
        None,
        Mask(43 + np.arange(257), np.arange(300)),
        Mask(43 + np.arange(257), np.arange(300), 70),
    ):
        rows = None if mask is None else mask.rows(0, 257)
        bound = attention_bound(q, k, v, mask=rows)
        assert_within_bound(attention(q, k, v, mask=mask), bound)
