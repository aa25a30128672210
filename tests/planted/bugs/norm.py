"""Bugs of RMSNorm."""

from __future__ import annotations

from tests.planted.planting import wrong

NORMALISE = "llama_layers.layers.norm:normalise"
BY_NUMPY = "llama_layers.backends.numpy.pointwise:normalise"


def mean_square(xp, x):
    return xp.mean(x * x, axis=-1, keepdims=True)


@wrong(NORMALISE, "test_norm.py::test_eps_is_the_one_given[definition-numpy]", "another eps")
def another_eps_than_the_one_given(right, xp, x, weight, eps):
    return right(xp, x, weight, 1e-6)


@wrong(
    NORMALISE,
    "test_norm.py::test_eps_stands_under_the_root[definition-numpy]",
    "eps outside the root",
)
def eps_outside_the_root(right, xp, x, weight, eps):
    return x / (xp.sqrt(mean_square(xp, x)) + eps) * weight


@wrong(
    NORMALISE,
    "test_norm.py::test_root_mean_square_of_the_result_is_one[definition-numpy]",
    "mean subtracted",
)
def a_norm_that_subtracts_the_mean(right, xp, x, weight, eps):
    return right(xp, x - xp.mean(x, axis=-1, keepdims=True), weight, eps)


@wrong(
    NORMALISE,
    "test_norm.py::test_constant_row_becomes_signed_ones[definition-numpy-3.0]",
    "sum instead of the mean",
)
def the_sum_of_squares_instead_of_their_mean(right, xp, x, weight, eps):
    count = x.shape[-1]
    return x / xp.sqrt(count * mean_square(xp, x) + eps) * weight


@wrong(
    NORMALISE,
    "test_norm.py::test_linear_in_the_weight[definition-numpy]",
    "norm weight skipped",
)
def weight_of_the_norm_skipped(right, xp, x, weight, eps):
    return right(xp, x, xp.ones_like(weight), eps)


@wrong(NORMALISE, "test_norm.py::test_rounds_to_the_dtype_of_x_once")
def norm_rounded_before_its_weight_is_applied(right, xp, x, weight, eps):
    rounded = right(xp, x, xp.ones_like(weight), eps)
    return xp.astype(xp.astype(rounded, weight.dtype) * weight, x.dtype)


@wrong(NORMALISE, "test_norm.py::test_within_bound_in_every_format[definition-bfloat16-bfloat16]")
def norm_left_in_the_dtype_of_its_sums(right, xp, x, weight, eps):
    return xp.astype(right(xp, x, weight, eps), xp.float32)


@wrong(
    "llama_layers.layers.norm:accumulate_format",
    "test_norm.py::test_bfloat16_mean_is_kept_in_float32",
)
def sums_of_the_norm_in_16_bits(right, form):
    return form


@wrong(
    "llama_layers.backends.numpy.pointwise:accumulate_format",
    "test_norm.py::test_within_bound_in_every_format[body-float16-float16]",
)
def sums_of_the_norm_by_NumPy_in_16_bits(right, form):
    return form


@wrong(BY_NUMPY, "test_norm.py::test_eps_stands_under_the_root[body-numpy]")
def eps_outside_the_root_by_NumPy(right, xp, x, weight, eps):
    return x / (xp.sqrt(mean_square(xp, x)) + eps) * weight


@wrong(BY_NUMPY, "test_norm.py::test_within_bound_of_naive_loops[body-numpy]")
def input_of_the_norm_changed_in_place_by_NumPy(right, xp, x, weight, eps):
    y = right(xp, x, weight, eps)
    xp.square(x, out=x)
    return y
