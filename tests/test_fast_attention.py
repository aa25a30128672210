"""Compiled attention of many queries: bounds, masks, and what its results do not depend on."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs the extra fast")
pytest.importorskip("threadpoolctl", reason="needs the extra fast")

from llama_layers import Mask
from llama_layers.backends.numba import attention as fast_attention
from llama_layers.backends.numba.kernels import gemm
from llama_layers.testing import assert_same_bits, assert_within_bound
from llama_layers.verify import attention_bound

reason = gemm.problem("float32", "float32")
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

WIDTHS = st.sampled_from([1, 4, 7, 8, 16, 33, 64])


def compiled(q, k, v, mask, scale=None, team=1, most=96):
    """By the kernel and nothing else, in blocks of so many queries at most."""
    with (
        mock.patch.object(fast_attention, "num_threads", return_value=team),
        mock.patch.object(fast_attention, "SMALL", 0),
        mock.patch.object(fast_attention, "MAX_BLOCK", most),
        np.errstate(all="ignore"),
    ):
        scale = q.shape[3] ** -0.5 if scale is None else scale
        assert fast_attention.attend.takes(np, q, k, v, mask, scale)
        return fast_attention.attend(np, q, k, v, mask, scale)


def inputs(draw):
    """Queries, keys and values, which may be views of one array as a projection leaves them."""
    queries, past = draw(st.integers(2, 40)), draw(st.integers(0, 70))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 3)]))
    batch, width, keys = draw(st.integers(1, 2)), draw(WIDTHS), past + queries
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = batch, keys, kv_heads * (group + 2), width
    fused = 2 * rng.standard_normal(shape, dtype=np.float32)
    cuts = [kv_heads * group, kv_heads * (group + 1)]
    q, k, v = (np.split(fused, cuts, axis=2)[i] for i in range(3))
    if draw(st.booleans()):
        q, k, v = (np.ascontiguousarray(a) for a in (q, k, v))
    return q[:, past:], k, v


def mask_for(draw, q, keys):
    """As forward passes make them, or of any rows, and the same as booleans of each pair."""
    batch, queries = q.shape[:2]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["none", "slots", "ring", "rows", "rows of all"]))
    if kind == "none":
        return None, np.ones((batch, queries, keys), bool)
    if kind.startswith("rows"):
        rows = rng.random((1 if kind == "rows of all" else batch, queries, keys)) < 0.4
        rows[0, draw(st.integers(0, queries - 1))] = False
        return rows, np.broadcast_to(rows, (batch, queries, keys))
    slots = np.arange(keys)
    if kind == "ring":
        slots = np.roll(slots, draw(st.integers(0, keys)))
        slots[rng.random(keys) < 0.2] = -1
    own = keys - queries + np.arange(queries)
    window = draw(st.sampled_from([None, 1, 3, 20]))
    keep = None
    if draw(st.booleans()):
        keep = rng.random((batch, keys)) < 0.8
        keep[0, : draw(st.integers(0, keys))] = False
    boolean = np.zeros((batch, queries, keys), bool)
    for b, s, t in np.ndindex(boolean.shape):
        near = window is None or own[s] - slots[t] < window
        boolean[b, s, t] = 0 <= slots[t] <= own[s] and near and (keep is None or keep[b, t])
    return Mask(own, slots, window, keep), boolean


class Problem:
    """What attention takes, with no more to print than its shapes."""

    def __init__(self, draw):
        self.arrays = inputs(draw)
        self.mask, self.boolean = mask_for(draw, self.arrays[0], self.arrays[1].shape[1])
        self.options = {
            "team": draw(st.integers(1, 4)),
            "most": draw(st.sampled_from([4, 12, 96])),
        }

    def __repr__(self):
        return f"{[a.shape for a in self.arrays]}, {type(self.mask).__name__}, {self.options}"


PROBLEMS = st.composite(Problem)()


@given(PROBLEMS)
def test_within_the_bound(problem):
    (q, k, v), boolean = problem.arrays, problem.boolean
    y = compiled(q, k, v, problem.mask, **problem.options)
    assert_within_bound(y, attention_bound(q, k, v, mask=boolean))
    assert not y[~boolean.any(axis=2)].any()


@given(PROBLEMS, st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_query_does_not_depend_on_its_neighbours_or_on_threads(problem, sequence, query):
    """Nor on the other sequences, nor on how many queries make a block."""
    (q, k, v), boolean = problem.arrays, problem.boolean
    y = compiled(q, k, v, boolean, **problem.options)
    b, s = int(sequence * q.shape[0]), int(query * q.shape[1])
    one = slice(b, b + 1)
    own, sees = (np.repeat(a[one, s : s + 1], 2, axis=1) for a in (q, boolean))  # one is NumPy's
    alone = compiled(own, k[one], v[one], sees)
    assert_same_bits(y[one, s : s + 1], alone[:, :1])


def test_blocks_of_the_real_size(rng):
    """Several panels of panels, and scores of a block that reach their limit."""
    q = rng.standard_normal((1, 300, 4, 64), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, 1500, 1, 64), dtype=np.float32)
    for window in (None, 70):
        mask = Mask(1200 + np.arange(300), np.arange(1500), window)
        bound = attention_bound(q, k, v, mask=mask.rows(0, 300))
        assert_within_bound(compiled(q, k, v, mask, team=2), bound)


@given(PROBLEMS, st.sampled_from([np.nan, np.inf, -np.inf]), st.floats(0, 0.99))
def test_nan_and_infinity_stay_with_those_who_see_them(problem, value, key):
    """Where the scores of a query overflow it is NaN; a key that it may not see changes no bit."""
    q, k, v = (a.copy() for a in problem.arrays)
    keys, queries = k.shape[1], q.shape[1]
    mask = Mask(keys - queries + np.arange(queries), np.arange(keys))
    clean = compiled(q, k, v, mask)
    place = int(key * keys)
    k[0, place, 0, 0] = value
    y = compiled(q, k, v, mask)
    group = q.shape[2] // k.shape[2]
    sees = np.zeros(y.shape[:3], bool)
    sees[0, :, :group] = (mask.queries >= place)[:, None]
    assert_same_bits(y[~sees], clean[~sees])
    score = value * q[0, :, :group, 0]  # minus infinity is a key without weight
    wrong = np.isnan(score) | (score > 0)
    assert np.isnan(y[0, :, :group][sees[0, :, :group] & wrong]).all()
    assert np.isfinite(y[0, :, :group][sees[0, :, :group] & ~wrong]).all() or keys == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.astype(np.float64),
        lambda a: a.astype(np.float16),
        lambda a: a[:, -1:],
        lambda a: np.asfortranarray(a),
    ],
)
def test_what_goes_to_numpy(change, rng, monkeypatch):
    monkeypatch.setattr(fast_attention, "SMALL", 0)
    q = change(rng.standard_normal((1, 6, 2, 4), dtype=np.float32))
    k, v = rng.standard_normal((2, 1, 6, 2, 4), dtype=np.float32)
    assert not fast_attention.attend.takes(np, q, k, v, None, 0.5)


def test_scale(rng):
    q, k, v = rng.standard_normal((3, 1, 5, 2, 8), dtype=np.float32)
    bound = attention_bound(q, k, v, scale=0.1)
    assert_within_bound(compiled(q, k, v, None, scale=0.1), bound)
