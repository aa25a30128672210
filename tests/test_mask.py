"""`Mask` against the boolean mask that it stands for, written in loops."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import Mask, attention
from llama_layers.backends.transfer import to_numpy


def allowed(query, key, window, keep):
    """Whether a query may attend to a key, by their slots."""
    if key == -1 or key > query or not keep:
        return False
    return window is None or query - key < window


@given(data=st.data(), queries=st.integers(0, 6), keys=st.integers(0, 6), batch=st.integers(1, 3))
def test_like_loops(backend, data, queries, keys, batch):
    window = data.draw(st.none() | st.integers(1, 7))
    first = data.draw(st.integers(0, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    query_slots = first + np.arange(queries)
    key_slots = rng.integers(-1, 10, size=keys)
    keep = rng.random((batch, keys)) < 0.7 if data.draw(st.booleans()) else None
    mask = Mask(
        backend.array(query_slots),
        backend.array(key_slots),
        window,
        None if keep is None else backend.array(keep),
    )
    start = data.draw(st.integers(0, queries))
    stop = data.draw(st.integers(start, queries))
    rows = mask.rows(start, stop)
    assert backend.holds(rows)
    rows = to_numpy(rows)
    assert rows.dtype == np.bool_
    assert rows.shape == (1 if keep is None else batch, stop - start, keys)
    for b, s, t in np.ndindex(rows.shape):
        kept = keep is None or keep[b, t]
        assert rows[b, s, t] == allowed(query_slots[start + s], key_slots[t], window, kept)


Q = np.zeros((2, 3, 1, 4))
K = np.zeros((2, 5, 1, 4))
S, T = np.arange(3), np.arange(5)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (Mask(T, T), ValueError, r"mask.queries: expected shape \[3\], got \[5\]"),
        (Mask(S, S), ValueError, r"mask.keys: expected shape \[5\], got \[3\]"),
        (
            Mask(S, T, None, np.ones((3, 5), bool)),
            ValueError,
            r"mask.keep: expected shape \[2, 5\], got \[3, 5\]",
        ),
        (Mask(S, T, None, np.ones(5, bool)), ValueError, r"mask.keep: .* got \[5\]"),
        (Mask(S, T, None, np.ones((2, 5))), TypeError, "mask.keep: expected bool, got float64"),
        (Mask(1.0 * S, T), TypeError, "mask.queries: expected an integer dtype, got float64"),
        (Mask(S, T > 0), TypeError, "mask.keys: expected an integer dtype, got bool"),
        (Mask([0, 1, 2], T), TypeError, "mask.queries: expected an array"),
        (
            Mask(S, array_api_strict.arange(5)),
            TypeError,
            "mask.keys: expected an array of the same library as q",
        ),
    ],
)
def test_refuses(mask, error, message):
    with pytest.raises(error, match=message):
        attention(Q, K, K, mask=mask)
