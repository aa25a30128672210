"""Bugs of the linear map, the projection to Q, K and V, and their weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.planted.planting import wrong

LINEAR = "llama_layers.layers.linear:linear_2d"
BY_NUMPY = "llama_layers.backends.numpy.linear:linear_2d"
BY_CUPY = "llama_layers.backends.cupy.linear:by_cupy"
FLAT = "llama_layers.layers.linear:flat_qkv"
QKV = "llama_layers.layers.linear:qkv_projection"
FUSED = "llama_layers.layers.qkv_weights:QKVWeights.from_separate"
OF_QKV = "test_projection.py::test_within_bound_of_naive_loops[numpy]"
LAYOUTS = "test_projection.py::test_both_layouts_agree[numpy]"
VIEWS = "test_weights.py::test_views_are_the_rows_of_the_heads[numpy]"


def within_bound(backend):
    return f"test_linear.py::test_within_bound_of_naive_loops[{backend}]"


@wrong(LINEAR, within_bound("strict-device1"), "bias missing")
def bias_dropped(right, xp, x, weight, bias):
    return right(xp, x, weight, None)


@wrong(LINEAR, "test_linear.py::test_one_row[numpy]")
def square_weights_transposed(right, xp, x, weight, bias):
    square = weight.shape[0] == weight.shape[1]
    return right(xp, x, weight.T if square else weight, bias)


@wrong(BY_NUMPY, within_bound("numpy"), "bias missing")
def bias_dropped_by_NumPy(right, xp, x, weight, bias):
    return right(xp, x, weight, None)


@wrong(BY_NUMPY, "test_checkpoint_02_qkv.py::test_qkv_complete_validation[numpy]", "zeros")
def a_column_of_zeros(right, xp, x, weight, bias):
    y = right(xp, x, weight, bias)
    y[:, -1:] = 0
    return y


@wrong(BY_NUMPY, "test_linear.py::test_bfloat16_sums_are_kept_in_float32")
def sums_kept_in_16_bits(right, xp, x, weight, bias):
    if bias is not None:
        return right(xp, x, weight, bias)
    return (x[:, None, :] * weight.astype(x.dtype)).astype(x.dtype).sum(axis=-1)


@wrong(BY_NUMPY, within_bound("numpy"), "inputs rounded to float16")
def activations_rounded_to_float16(right, xp, x, weight, bias):
    return right(xp, x.astype(np.float16).astype(x.dtype), weight, bias)


@wrong(BY_CUPY, "test_cupy_route.py::test_linear_2d[True-bfloat16]")
def bias_dropped_by_CuPy(right, xp, x, weight, bias):
    return right(xp, x, weight, None)


@wrong(BY_CUPY, "test_cupy_route.py::test_linear_2d[False-float32]")
def a_weight_copied_at_each_call_on_CuPy(right, xp, x, weight, bias):
    return right(xp, x, weight.copy(), bias)


@wrong("llama_layers.layers.linear:linear", "test_cupy_route.py::test_linear[shape2-float32]")
def a_product_of_three_dimensions_on_CuPy(right, x, weight, bias=None):
    from llama_layers.arrays.namespaces import namespace
    from llama_layers.layers.linear import linear_2d

    return linear_2d(namespace(x=x), x, weight, bias)


@wrong(FLAT, OF_QKV, "keys and values swapped")
def keys_and_values_swapped(right, x, w):
    q, k, v = right(x, w)
    return q, v, k


@wrong(FLAT, OF_QKV, "bias missing")
def bias_of_the_projection_to_Q_K_and_V_dropped(right, x, w):
    return right(x, replace(w, bias=None))


@wrong(FLAT, "test_projection.py::test_heads_follow_their_rows[numpy]", "channels before heads")
def heads_in_the_order_of_channels(right, x, w):
    q, k, v = right(x, w)
    channels = q.reshape(*q.shape[:2], w.head_dim, w.num_heads)
    return channels.swapaxes(2, 3).reshape(q.shape), k, v


@wrong(QKV, "test_projection.py::test_shapes[numpy]")
def keys_repeated_for_every_query_head(right, x, w):
    y = right(x, w)
    return y._replace(k=y.k.repeat(w.num_heads // w.num_kv_heads, axis=2))


@wrong(FUSED, "test_weights.py::test_from_separate[numpy-4-2]", "keys and values swapped")
def keys_and_values_swapped_where_they_are_fused(right, cls, q, k, v, **options):
    return right(cls, q, v, k, **options)


@wrong(FUSED, "test_weights.py::test_from_separate[numpy-4-4]", "another projection's bias")
def biases_in_another_order_than_their_rows(right, cls, q, k, v, **options):
    w = right(cls, q, k, v, **options)
    biases = options.get("biases")
    return w if biases is None else replace(w, bias=np.concatenate(biases[::-1]))


@wrong(FUSED, LAYOUTS)
def layout_of_square_weights_taken_for_the_other(right, cls, *matrices, layout="out_in", **options):
    if layout == "in_out":
        matrices = [m.T if m.shape[0] == m.shape[1] else m for m in matrices]
    return right(cls, *matrices, layout=layout, **options)


@wrong(FUSED, LAYOUTS, "weights rounded to float16")
def storage_in_float16_that_says_float32(right, cls, *matrices, **options):
    narrow = [matrix.astype(np.float16).astype(matrix.dtype) for matrix in matrices]
    return right(cls, *narrow, **options)


@wrong("llama_layers.layers.qkv_weights:QKVWeights.k", VIEWS)
def grouped_heads_forgotten_in_the_view_of_the_keys(right, w):
    rows = w.num_heads * w.head_dim
    return w.fused[rows : 2 * rows]


@wrong("llama_layers.layers.qkv_weights:QKVWeights.v", VIEWS)
def grouped_heads_forgotten_in_the_view_of_the_values(right, w):
    return w.fused[2 * w.num_kv_heads * w.head_dim :]
