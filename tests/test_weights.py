"""Weights: fused storage, its views, and what is refused."""

from __future__ import annotations

from copy import copy
from dataclasses import FrozenInstanceError, fields

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import AttentionWeights, MLPWeights, QKVWeights
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import assert_same_bits, configs, qkv_weights
from tests.support.random_models import GQA, model_of, random_weights


def numbered(*shape, start=0):
    """Different numbers everywhere, so that a wrong place shows."""
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


@given(w=st.data(), config=configs())
def test_views_are_the_rows_of_the_heads(backend, w, config):
    w = w.draw(qkv_weights(config, xp=backend.xp, device=backend.device))
    heads, kv_heads, dim = w.num_heads, w.num_kv_heads, config.head_dim
    assert (w.head_dim, w.hidden_size) == (dim, config.hidden_size)
    fused = to_numpy(w.fused)
    rows = heads * dim, (heads + kv_heads) * dim, (heads + 2 * kv_heads) * dim
    assert_same_bits(w.q, fused[: rows[0]])
    assert_same_bits(w.k, fused[rows[0] : rows[1]])
    assert_same_bits(w.v, fused[rows[1] : rows[2]])


def test_views_share_memory():
    w = QKVWeights(numbered(16, 6), num_heads=2, num_kv_heads=1)
    for view in (w.q, w.k, w.v):
        assert np.shares_memory(view, w.fused)
        assert view.flags.c_contiguous


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_from_separate(backend, num_heads, num_kv_heads):
    q = numbered(num_heads * 2, 6)
    k = numbered(num_kv_heads * 2, 6, start=1000)
    v = numbered(num_kv_heads * 2, 6, start=2000)
    biases = [numbered(len(matrix), start=3000 + i) for i, matrix in enumerate((q, k, v))]
    options = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    for layout, matrices in (("out_in", (q, k, v)), ("in_out", (q.T, k.T, v.T))):
        w = QKVWeights.from_separate(
            *map(backend.array, matrices),
            biases=list(map(backend.array, biases)),
            layout=layout,
            **options,
        )
        for part, expected in ((w.q, q), (w.k, k), (w.v, v)):
            assert_same_bits(part, expected)
        assert_same_bits(w.bias, np.concatenate(biases))
        assert backend.holds(w.fused)
    assert QKVWeights.from_separate(*map(backend.array, (q, k, v)), **options).bias is None


def test_from_separate_copies():
    q = numbered(4, 4)
    w = QKVWeights.from_separate(q, q, q, num_heads=2)
    q[...] = 0
    assert_same_bits(w.q, numbered(4, 4))
    assert w.num_kv_heads == 2


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_keeps_the_dtype(dtype):
    q = np.ones((4, 4), dtype)
    assert QKVWeights.from_separate(q, q, q, num_heads=2).fused.dtype == q.dtype


def test_frozen():
    w = QKVWeights(numbered(16, 6), 2, 1)
    with pytest.raises(AttributeError):
        w.fused = w.fused


F = np.zeros((16, 6), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((F[0], 2, 1), ValueError, r"fused: expected shape \[out, in\], got \[6\]"),
        ((F[:15], 2, 1), ValueError, r"fused: .* multiple of .* = 4, got 15"),
        ((F[:0], 2, 1), ValueError, r"fused: .* multiple of .* = 4, got 0"),
        ((F, 3, 2), ValueError, "num_kv_heads: expected a divisor of num_heads = 3, got 2"),
        ((F, 0, 1), ValueError, "num_heads: expected a positive integer, got 0"),
        ((F, 2, 0), ValueError, "num_kv_heads: expected a positive integer, got 0"),
        ((F, 2.0, 1), ValueError, r"num_heads: expected a positive integer, got 2\.0"),
        ((F, True, True), ValueError, "num_heads: expected a positive integer, got True"),
        ((F, 2, 1, F), ValueError, r"bias: expected shape \[16\], got \[16, 6\]"),
        ((F, 2, 1, F[0]), ValueError, r"bias: expected shape \[16\], got \[6\]"),
        ((F.astype(int), 2, 1), TypeError, "fused: expected one of the dtypes .*, got int64"),
        ((F, 2, 1, np.zeros(16, int)), TypeError, "bias: expected one of .*, got int64"),
        ((F.tolist(), 2, 1), TypeError, "fused: expected an array of NumPy, .*, got list"),
        (
            (F, 2, 1, array_api_strict.zeros(16)),
            TypeError,
            "bias: expected an array of the same library as fused, numpy, got .*strict",
        ),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        QKVWeights(*arguments)


Q, K = np.zeros((8, 6), np.float32), np.zeros((4, 6), np.float32)
B, C = np.zeros(8, np.float32), np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("matrices", "options", "error", "message"),
    [
        ((Q, K, K), {"num_heads": 3, "num_kv_heads": 1}, ValueError, "q: .* 3, got 8 .*out_in"),
        ((Q, K, K), {}, ValueError, r"k: expected shape \[8, 6\] .*num_kv_heads = 4.*\[4, 6\]"),
        ((Q, K, Q), {"num_kv_heads": 2}, ValueError, r"v: expected shape \[4, 6\] .*\[8, 6\]"),
        (
            (Q.T, K, K.T),
            {"num_kv_heads": 2, "layout": "in_out"},
            ValueError,
            r"k: expected shape \[6, 4\] .*'in_out'.* got \[4, 6\]",
        ),
        ((Q, K[0], K), {"num_kv_heads": 2}, ValueError, r"k: expected a matrix, .* \[6\]"),
        ((Q, K, K), {"num_kv_heads": 3}, ValueError, "num_kv_heads: expected a divisor .*, got 3"),
        ((Q, Q, Q), {"layout": "oi"}, ValueError, "layout: expected 'out_in' or .*, got 'oi'"),
        ((Q, Q, Q.astype(float)), {}, TypeError, "v: .* dtype of q, float32, got float64"),
        ((Q, Q.astype("f2"), Q), {}, TypeError, "k: .* dtype of q, float32, got float16"),
        ((Q.astype(int),) * 3, {}, TypeError, "q: expected one of the dtypes .*, got int64"),
        ((Q, Q, None), {}, TypeError, "v: expected an array, got NoneType"),
        ((Q, Q, Q), {"biases": [B, B]}, ValueError, "biases: expected three arrays, .*, got 2"),
        ((Q, Q, Q), {"biases": [B, C, B]}, ValueError, r"biases\[1\]: .* \[8\], got \[4\]"),
        (
            (Q, Q, Q),
            {"biases": [B, B, B.astype(float)]},
            TypeError,
            r"biases\[2\]: .* dtype of biases\[0\], float32, got float64",
        ),
        ((Q, Q, Q), {"biases": [B, None, B]}, TypeError, r"biases\[1\]: expected an array"),
    ],
)
def test_from_separate_refuses(matrices, options, error, message):
    with pytest.raises(error, match=message):
        QKVWeights.from_separate(*matrices, **({"num_heads": 4} | options))


def test_refuses_devices_that_differ():
    fused, bias = (
        array_api_strict.zeros(shape, device=array_api_strict.Device(name))
        for shape, name in (((16, 6), "device1"), (16, "device2"))
    )
    with pytest.raises(ValueError, match="bias: expected to be on the device of fused"):
        QKVWeights(fused, 2, 1, bias)


QKV = QKVWeights(F, 2, 1)  # heads of 4 on 6 channels
OUT, STRICT = np.zeros((6, 8), np.float32), array_api_strict.zeros(6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((F, OUT), TypeError, "qkv: expected QKVWeights, got ndarray"),
        ((QKV, OUT.T), ValueError, r"o_proj: expected shape \[6, 8\], got \[8, 6\]"),
        ((QKV, OUT[:, :4]), ValueError, r"o_proj: expected shape \[6, 8\], got \[6, 4\]"),
        ((QKV, OUT[0]), ValueError, r"o_proj: expected shape \[6, 8\], got \[8\]"),
        ((QKV, None), TypeError, "o_proj: expected an array, got NoneType"),
        ((QKV, OUT.astype(int)), TypeError, "o_proj: expected one of the dtypes .*, got int64"),
        ((QKV, OUT, OUT[0]), ValueError, r"o_bias: expected shape \[6\], got \[8\]"),
        ((QKV, OUT, STRICT), TypeError, "o_bias: expected an array of the same library as qkv"),
    ],
)
def test_attention_weights_refuse(arguments, error, message):
    AttentionWeights(QKV, OUT, OUT[:, 0])
    with pytest.raises(error, match=message):
        AttentionWeights(*arguments)


G = np.zeros((9, 6), np.float32)
MLP = {"gate_proj": G, "up_proj": G, "down_proj": G.T, "gate_bias": G[:, 0], "down_bias": G[0]}


@pytest.mark.parametrize(
    ("field", "array", "error", "message"),
    [
        ("gate_proj", G[0], ValueError, r"\[intermediate_size, hidden_size\], got \[6\]"),
        ("gate_proj", G.tolist(), TypeError, "expected an array of NumPy, .*, got list"),
        ("gate_proj", G.astype(int), TypeError, "expected one of the dtypes .*, got int64"),
        ("up_proj", G[1:], ValueError, r"expected shape \[9, 6\], got \[8, 6\]"),
        ("up_proj", None, TypeError, "expected an array, got NoneType"),
        ("down_proj", G, ValueError, r"expected shape \[6, 9\], got \[9, 6\]"),
        ("gate_bias", G[0], ValueError, r"expected shape \[9\], got \[6\]"),
        ("up_bias", G, ValueError, r"expected shape \[9\], got \[9, 6\]"),
        ("up_bias", G[:, 0].astype(int), TypeError, "expected one of the dtypes .*, got int64"),
        ("down_bias", G[:, 0], ValueError, r"expected shape \[6\], got \[9\]"),
        ("down_bias", STRICT, TypeError, "expected an array of the same library as gate_proj"),
    ],
)
def test_mlp_weights_refuse(field, array, error, message):
    MLPWeights(**MLP)
    with pytest.raises(error, match=f"{field}: .*{message}"):
        MLPWeights(**MLP | {field: array})


def test_bytes_in_the_other_order_are_the_same_numbers():
    q, k, v = numbered(8, 6), numbered(4, 6, start=100).astype(">f4"), numbered(4, 6, start=200)
    w = QKVWeights.from_separate(q, k, v, num_heads=4, num_kv_heads=2)
    assert_same_bits(w.fused, np.concatenate([q, k.astype("<f4"), v]))


def test_head_counts_of_a_few_bits():
    """Their sums would overflow: 2 x 100 is no int8."""
    w = QKVWeights(np.zeros((300, 2), np.float32), np.int8(100), np.int8(100))
    assert (w.head_dim, w.q.shape, w.v.shape) == (1, (100, 2), (100, 2))
    assert type(w.num_heads) is type(w.num_kv_heads) is int
    q = np.zeros((200, 2), np.float32)
    w = QKVWeights.from_separate(q, q, q, num_heads=np.int8(100))
    assert (w.head_dim, w.fused.shape) == (2, (600, 2))


def test_weights_are_constants_told_apart_by_identity():
    """An assignment would go unchecked, and arrays have no single truth value to be equal by."""
    weights = model_of(GQA, random_weights(GQA, dtype=np.float32)).weights
    layer = weights.layers[0]
    for part in (weights, layer, layer.self_attn, layer.self_attn.qkv, layer.mlp):
        for field in fields(part):
            with pytest.raises(FrozenInstanceError):
                setattr(part, field.name, None)
        assert {part: 1}[part] == 1
        assert part != copy(part)
