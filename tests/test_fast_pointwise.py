"""Compiled norm, RoPE and gate: threads, strides, and what is left to NumPy."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.compiled_route import compiled_first

pytest.importorskip("numba", reason="needs the extra fast")
pytest.importorskip("threadpoolctl", reason="needs the extra fast")

from llama_layers.backends.numba import pointwise
from llama_layers.layers.mlp import gate_with_silu
from llama_layers.layers.norm import normalise
from llama_layers.layers.rope import rotate


def naive_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def naive_turn(x, cos, sin):
    y = np.empty_like(x)
    half = x.shape[3] // 2
    for b, s, h, i in np.ndindex(*x.shape[:3], half):
        c, d = (a[b % len(a), s, i] for a in (cos, sin))
        y[b, s, h, i] = x[b, s, h, i] * c - x[b, s, h, half + i] * d
        y[b, s, h, half + i] = x[b, s, h, half + i] * c + x[b, s, h, i] * d
    return y


def naive_gate(gate, up):
    return gate / (1 + np.exp(-gate)) * up


@given(
    batch=st.integers(1, 3), seq=st.integers(1, 5), heads=st.integers(1, 3),
    half=st.integers(1, 9), rows=st.booleans(), team=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_threads_share_all_of_it(batch, seq, heads, half, rows, team, seed):
    rng = np.random.default_rng(seed)
    wide = rng.standard_normal((batch, seq, heads + 2, 2 * half))
    angles = rng.uniform(-4, 4, (batch if rows else 1, seq, half))
    cos, sin = np.cos(angles), np.sin(angles)
    weight = rng.standard_normal(2 * half)
    whole, other = wide[:, :, :-2].copy(), rng.standard_normal((batch, seq, heads, 2 * half))
    single = [a.astype(np.float32) for a in (wide, cos, sin, weight, whole, other)]
    with (
        mock.patch.object(pointwise, "SMALL", 0),
        mock.patch.object(pointwise, "num_threads", return_value=team),
    ):
        assert pointwise.normalise.takes(np, single[4], single[3], 1e-3)
        assert pointwise.rotate.takes(np, single[0][:, :, :-2], single[1], single[2], "half")
        assert pointwise.gate_with_silu.takes(np, single[4], single[5])
        found = [
            pointwise.normalise(np, single[4], single[3], 1e-3),
            pointwise.rotate(np, single[0][:, :, :-2], single[1], single[2], "half"),
            pointwise.gate_with_silu(np, single[4], single[5]),
        ]
    expected = [
        naive_norm(whole, weight, 1e-3), naive_turn(wide[:, :, :-2], cos, sin),
        naive_gate(whole, other),
    ]  # fmt: skip
    for y, exact in zip(found, expected, strict=True):
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, exact, rtol=2e-5, atol=2e-6)


def test_what_the_kernels_do_not_take():
    """Other memory orders, layouts and formats: the definitions' numbers all the same."""
    rng = np.random.default_rng(0)
    x, up = rng.standard_normal((2, 1, 3, 2, 4))
    angles = rng.uniform(-4, 4, (1, 3, 2))
    cos, sin = np.cos(angles), np.sin(angles)
    pairs = x.reshape(1, 3, 2, 2, 2).swapaxes(3, 4).reshape(x.shape)  # 2i, 2i + 1 as i, i + D/2
    turned = naive_turn(pairs, cos, sin).reshape(1, 3, 2, 2, 2).swapaxes(3, 4).reshape(x.shape)
    with mock.patch.object(pointwise, "SMALL", 0), compiled_first():
        for dtype, rtol in ((np.float32, 1e-5), (np.float64, 1e-12)):
            a, b, c, s = (z.astype(dtype) for z in (x, up, cos, sin))
            for y, exact in (
                (rotate(np, a, c, s, "interleaved"), turned),
                (gate_with_silu(np, a, np.asfortranarray(b)), naive_gate(x, up)),
                (normalise(np, np.asfortranarray(a), a[0, 0, 0], 0.5),
                 naive_norm(x, x[0, 0, 0], 0.5)),
            ):  # fmt: skip
                assert y.dtype == dtype
                np.testing.assert_allclose(y, exact, rtol=rtol, atol=rtol)
