"""Bugs of the gate and of the MLP."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.planted.planting import wrong

GATE = "llama_layers.layers.mlp:gate_with_silu"
BY_NUMPY = "llama_layers.backends.numpy.pointwise:gate_with_silu"
MLP = "llama_layers.layers.mlp:mlp"
LOOPS = "test_feed_forward.py::test_like_loops"
EXPONENTS = "test_feed_forward.py::test_error_at_every_exponent"
MEMORY = "test_feed_forward.py::test_any_shape_and_memory_order_in_blocks"
PINS = "test_feed_forward.py::test_pins"


@wrong("llama_layers.layers.mlp:swiglu", LOOPS, "gate and up swapped in the product")
def gate_and_up_swapped(right, gate, up):
    return right(up, gate)


@wrong(GATE, EXPONENTS, "gelu (sigmoid) for silu")
def gelu_for_silu(right, xp, gate, up):
    return right(xp, 1.702 * gate, up) / 1.702


@wrong(GATE, LOOPS, "relu for silu")
def relu_for_silu(right, xp, gate, up):
    return xp.where(gate > 0, gate, 0 * gate) * up


@wrong(GATE, f"{PINS}[definition-numpy]", "sigmoid for silu")
def sigmoid_for_silu(right, xp, gate, up):
    return (0.5 + 0.5 * xp.tanh(gate / 2)) * up


@wrong(GATE, EXPONENTS)
def silu_by_tanh_which_cancels_for_negative_gates(right, xp, gate, up):
    return gate * (0.5 * (1 + xp.tanh(gate / 2))) * up


@wrong(
    "llama_layers.layers.mlp:accumulate_format",
    "test_feed_forward.py::test_narrow_formats_are_computed_in_float32_and_rounded_once",
)
def the_gate_computed_in_16_bits(right, form):
    return form


@wrong(MLP, LOOPS, "bias missing")
def bias_of_the_gate_dropped(right, x, w, **options):
    return right(x, replace(w, gate_bias=None), **options)


@wrong(MLP, "test_feed_forward.py::test_zero_matrices_give_the_bias", "bias missing")
def bias_of_the_down_projection_dropped(right, x, w, **options):
    return right(x, replace(w, down_bias=None), **options)


@wrong(BY_NUMPY, f"{PINS}[body-numpy]")
def the_last_block_of_gates_left_out(right, xp, gate, up):
    from llama_layers.backends.numpy.pointwise import BLOCK

    y = right(xp, gate, up)
    y.reshape(-1)[y.size // BLOCK * BLOCK :] = 0
    return y


@wrong(BY_NUMPY, MEMORY)
def up_read_in_its_own_memory_order(right, xp, gate, up):
    return right(xp, gate, up.ravel("K").reshape(gate.shape))


@wrong(BY_NUMPY, MEMORY)
def gated_numbers_put_back_in_another_order_of_axes(right, xp, gate, up):
    axes = sorted(range(gate.ndim), key=lambda axis: -abs(gate.strides[axis]))
    return right(xp, gate, up).transpose(axes).transpose(axes)


@wrong(BY_NUMPY, EXPONENTS)
def the_exponential_of_the_gate_that_overflows(right, xp, gate, up):
    with np.errstate(over="ignore"):
        return gate / (1 + xp.exp(-gate)) * up


@wrong(BY_NUMPY, LOOPS)
def the_sigmoid_of_a_negative_gate_as_of_a_positive_one(right, xp, gate, up):
    return gate / (1 + xp.exp(-xp.abs(gate))) * up


@wrong(BY_NUMPY, "test_feed_forward.py::test_on_every_library[body-numpy]")
def gate_changed_in_place(right, xp, gate, up):
    y = right(xp, gate, up)
    xp.abs(gate, out=gate)
    return y
