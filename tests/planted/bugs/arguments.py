"""Bugs that let through weights and arrays that do not fit, or choose another body."""

from __future__ import annotations

from tests.planted.planting import wrong


@wrong("llama_layers.arrays.checks:check_shape", "test_weights.py::test_mlp_weights_refuse")
def weights_that_do_not_fit_each_other_accepted(right, name, array, *expected):
    return None


@wrong("llama_layers.layers.weights:check_shape", "test_weights.py::test_attention_weights_refuse")
def an_output_projection_that_does_not_fit_its_heads_accepted(right, name, array, *expected):
    if name != "o_proj":
        right(name, array, *expected)


@wrong("llama_layers.layers.weights:check_shape", "test_weights.py::test_mlp_weights_refuse")
def biases_of_an_MLP_not_looked_at(right, name, array, *expected):
    if not name.endswith("_bias"):
        right(name, array, *expected)


@wrong(
    "llama_layers.arrays.namespaces:_check_device",
    "test_linear.py::test_refuses_devices_that_differ",
)
def devices_not_compared(right, *arguments):
    return None


@wrong(
    "llama_layers.arrays.dispatch:routes",
    "test_backends.py::test_bodies_are_asked_in_turn_and_then_the_definition",
)
def faster_bodies_never_taken(right, library):
    return {}
