"""Our functions on torch and jax arrays, and theirs beside ours."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_layers import QKVWeights, embed, linear, qkv_projection, rms_norm
from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.transfer import from_numpy, to_numpy
from llama_layers.testing import (
    arrays,
    assert_same_bits,
    assert_within_bound,
    configs,
    hidden_states,
    qkv_weights,
)
from llama_layers.verify import Bound, linear_bound, rms_norm_bound
from tests.support import oracle

torch = pytest.importorskip("torch", reason="torch is not installed")
jnp = pytest.importorskip("jax.numpy", reason="jax is not installed")
modeling_llama = pytest.importorskip(
    "transformers.models.llama.modeling_llama", reason="transformers is not installed"
)

pytestmark = pytest.mark.peer

EPS = 1e-5
# XLA takes subnormal numbers for zero on CPUs.
FLUSHES = {"torch": False, "jax": True}
DTYPES = ["float32", "bfloat16", "float16"]
FEW = settings(max_examples=15, deadline=None)
WIDTHS = st.sampled_from([1, 2, 7, 40])  # jax compiles for each


@pytest.fixture(scope="session", params=["torch", "jax"])
def peer(request):
    return request.param


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def place(array, peer):
    return None if array is None else from_numpy(array, {"torch": torch, "jax": jnp}[peer])


def placed(w, peer):
    return QKVWeights(place(w.fused, peer), w.num_heads, w.num_kv_heads, place(w.bias, peer))


def against_oracle(bound, exact):
    """The limits of a bound around an oracle's numbers, once these are seen to agree."""
    np.testing.assert_allclose(bound.exact, exact, rtol=1e-9, atol=1e-9 * abs(exact).max(initial=0))
    return Bound(exact, bound.limit, bound.usual)


@pytest.mark.parametrize("dtype", DTYPES)
@FEW
@given(data=st.data())
def test_linear_within_bound_of_naive_loops(peer, dtype, data):
    x = data.draw(arrays((3, data.draw(WIDTHS)), dtype=dtype, max_magnitude=16.0))
    weight = data.draw(arrays((5, x.shape[1]), dtype=dtype, max_magnitude=16.0))
    bias = data.draw(st.none() | arrays((5,), dtype=dtype, max_magnitude=16.0))
    y = linear(place(x, peer), place(weight, peer), place(bias, peer))
    assert dtype_name(y.dtype) == dtype
    bound = linear_bound(x, weight, bias, flushes=FLUSHES[peer])
    assert_within_bound(y, against_oracle(bound, oracle.linear(x, weight, bias)))


@pytest.mark.parametrize("dtype", DTYPES)
@FEW
@given(data=st.data())
def test_qkv_projection_within_bound(peer, dtype, data):
    config = data.draw(configs(max_heads=4, max_head_dim=4))
    options = {"dtype": dtype, "max_magnitude": 16.0}
    x = data.draw(hidden_states(config, **options))
    w = data.draw(qkv_weights(config, **options))
    bound = linear_bound(x, w.fused, w.bias, flushes=FLUSHES[peer])
    qkv = qkv_projection(place(x, peer), placed(w, peer))
    assert {dtype_name(array.dtype) for array in qkv} == {dtype}
    flat = [to_numpy(array).reshape(*x.shape[:2], -1) for array in qkv]
    assert_within_bound(np.concatenate(flat, axis=-1), bound)


@pytest.mark.parametrize("dtype", DTYPES)
@FEW
@given(data=st.data())
def test_rms_norm_within_bound_of_naive_loops(peer, dtype, data):
    x = data.draw(arrays((3, data.draw(WIDTHS)), dtype=dtype))
    weight = data.draw(arrays((x.shape[1],), dtype=dtype, max_magnitude=16.0))
    y = rms_norm(place(x, peer), place(weight, peer), eps=EPS)
    assert dtype_name(y.dtype) == dtype
    bound = rms_norm_bound(x, weight, eps=EPS, flushes=FLUSHES[peer])
    assert_within_bound(y, against_oracle(bound, oracle.rms_norm(x, weight, EPS)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_flushed_inputs_stay_within_bound(peer, dtype):
    """Rows and weights below the smallest normal number of float32, which jax takes for zero."""
    small = np.full((1, 8), 1e-39 if dtype != "float16" else 1e-7, np.float32)
    (x, ones), stored = (small, np.ones((1, 8))), numpy_dtype(dtype)
    for row, weight in ((x, ones), (ones, x)):
        row, weight = row.astype(stored), weight.astype(stored)
        y = rms_norm(place(row, peer), place(weight[0], peer), eps=EPS)
        assert_within_bound(y, rms_norm_bound(row, weight[0], eps=EPS, flushes=FLUSHES[peer]))
        y = linear(place(row, peer), place(weight, peer))
        assert_within_bound(y, linear_bound(row, weight, flushes=FLUSHES[peer]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_gives_rows_bit_for_bit(peer, dtype, rng):
    table = rng.standard_normal((7, 4)).astype(numpy_dtype(dtype))
    ids = np.array([[6, 0, 3]])
    assert_same_bits(embed(place(ids, peer), place(table, peer)), table[ids])


def test_embed_refuses_ids_out_of_range(peer):
    """jax alone would give NaN here."""
    table = place(np.ones((4, 2), np.float32), peer)
    with pytest.raises(ValueError, match="input_ids: expected ids from 0 to 3, got 1 to 4"):
        embed(place(np.array([[1, 4]]), peer), table)


def test_refuses_libraries_that_differ(peer):
    x, weight = np.ones((1, 3), np.float32), np.ones((2, 3), np.float32)
    with pytest.raises(TypeError, match=f"weight: expected .* library as x, {peer}, got .* numpy"):
        linear(place(x, peer), weight)
    with pytest.raises(TypeError, match=r"weight: .* torch, got one of jax"):
        linear(place(x, "torch"), place(weight, "jax"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_against_transformers(dtype, rng):
    """Theirs rounds to the dtype before the weight is applied: with ones for a weight, once."""
    x = rng.standard_normal((2, 5, 576)).astype(numpy_dtype(dtype))
    weight = rng.uniform(0.5, 2, 576) if dtype == "float32" else np.ones(576)
    weight = weight.astype(numpy_dtype(dtype))
    norm = modeling_llama.LlamaRMSNorm(576, eps=EPS)
    norm.weight.data = place(weight, "torch")
    bound = rms_norm_bound(x, weight, eps=EPS)
    with torch.no_grad():
        theirs = norm(place(x, "torch"))
    assert_within_bound(theirs, bound)
    for ours in (rms_norm(x, weight, eps=EPS), rms_norm(place(x, "torch"), norm.weight, eps=EPS)):
        assert_within_bound(ours, bound)
        oracle.assert_apart_at_most(ours, theirs, 2 * bound.limit)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_kv_heads", [9, 3, 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_qkv_against_torch_linear(dtype, num_kv_heads, with_bias, rng):
    """torch.nn.Linear stores [out, in] too, and a model reshapes to heads."""
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    torch.manual_seed(7)
    x = rng.standard_normal((2, 5, 64)).astype(numpy_dtype(dtype))
    layers = [
        torch.nn.Linear(64, heads * 8, bias=with_bias, dtype=kind)
        for heads in (9, num_kv_heads, num_kv_heads)
    ]
    with torch.no_grad():
        theirs = [layer(place(x, "torch")).reshape(2, 5, -1, 8) for layer in layers]
    weights = [to_numpy(layer.weight) for layer in layers]
    biases = [to_numpy(layer.bias) for layer in layers] if with_bias else None
    w = QKVWeights.from_separate(*weights, num_heads=9, num_kv_heads=num_kv_heads, biases=biases)
    ours = zip(
        qkv_projection(x, w), qkv_projection(place(x, "torch"), placed(w, "torch")), strict=True
    )
    for i, (on_numpy, on_torch) in enumerate(ours):
        bound = linear_bound(x, weights[i], biases[i] if with_bias else None)
        assert_within_bound(to_numpy(theirs[i]).reshape(2, 5, -1), bound)
        limit = 2 * bound.limit.reshape(on_numpy.shape)
        oracle.assert_apart_at_most(on_numpy, theirs[i], limit)
        oracle.assert_apart_at_most(on_torch, theirs[i], limit)
