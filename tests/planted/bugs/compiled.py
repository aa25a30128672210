"""Bugs of the bodies that numba compiles, as far as Python calls them."""

from __future__ import annotations

from dataclasses import replace

from llama_layers import Mask
from tests.planted.planting import wrong

NUMBA = "llama_layers.backends.numba"
PRODUCT = "test_compiled.py::test_a_product_is_within_the_bound_of_naive_loops"
BOUND = "test_fast_attention.py::test_within_the_bound"
SHARED = "test_fast_pointwise.py::test_threads_share_all_of_it"


@wrong(f"{NUMBA}.linear:linear_2d", PRODUCT)
def bias_forgotten_by_a_kernel(right, xp, x, weight, bias):
    return right(xp, x, weight, None)


@wrong(f"{NUMBA}.linear:linear_2d", PRODUCT)
def the_last_row_of_a_weight_left_out_by_a_kernel(right, xp, x, weight, bias):
    y = right(xp, x, weight, bias)
    y[:, -1] = 0
    return y


@wrong(f"{NUMBA}.attention:attend", BOUND)
def a_window_wider_by_one_in_a_kernel(right, xp, q, k, v, mask, scale):
    if isinstance(mask, Mask) and mask.window is not None:
        mask = replace(mask, window=mask.window + 1)
    return right(xp, q, k, v, mask, scale)


@wrong(f"{NUMBA}.attention:attend", BOUND)
def padding_seen_by_a_kernel(right, xp, q, k, v, mask, scale):
    mask = replace(mask, keep=None) if isinstance(mask, Mask) else mask
    return right(xp, q, k, v, mask, scale)


@wrong(f"{NUMBA}.attention:attend", "test_fast_attention.py::test_scale")
def the_scale_of_the_scores_left_out_by_a_kernel(right, xp, q, k, v, mask, scale):
    return right(xp, q, k, v, mask, 1.0)


@wrong(f"{NUMBA}.pointwise:normalise", SHARED)
def a_norm_without_eps_by_a_kernel(right, xp, x, weight, eps):
    return right(xp, x, weight, 0.0)


@wrong(f"{NUMBA}.pointwise:rotate", SHARED)
def angles_of_the_first_sequence_for_all_in_a_kernel(right, xp, x, cos, sin, layout):
    return right(xp, x, cos[:1], sin[:1], layout)


@wrong(f"{NUMBA}.pointwise:rotate", SHARED)
def rotated_the_other_way_by_a_kernel(right, xp, x, cos, sin, layout):
    return right(xp, x, cos, -sin, layout)


@wrong(
    f"{NUMBA}.decode:layer_fits",
    "test_compiled_layers.py::test_layers_of_other_sizes_than_the_first",
)
def every_layer_taken_to_be_as_large_as_the_first(right, layer, config):
    return True


@wrong(
    f"{NUMBA}.decode:Plan.is_for",
    "test_compiled_layers.py::test_weights_changed_in_place_count_and_so_do_exchanged_layers",
)
def an_exchanged_layer_not_noticed(right, plan, layers, config):
    return True
