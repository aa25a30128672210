"""Bugs in what GGUF files say of layers, windows and RoPE, and in llama.cpp's roundings."""

from __future__ import annotations

from tests.planted.planting import wrong

FAMILIES = "checkpoint/test_gguf_families.py::"


@wrong(
    "llama_layers.checkpoint.gguf.of_layers:_types",
    f"{FAMILIES}test_weights_and_config[gemma3]",
)
def first_layer_without_a_window(right, own, layers, every):
    types = right(own, layers, every)
    return types[-1:] + types[:-1]


@wrong(
    "llama_layers.checkpoint.gguf.of_layers:_thetas",
    f"{FAMILIES}test_weights_and_config[granite_swa]",
)
def rope_in_all_layers(right, model_type, own, types, theta):
    return (theta,) * len(types)


@wrong(
    "llama_layers.checkpoint.gguf.config:gemma_fields",
    f"{FAMILIES}test_weights_and_config[gemma]",
)
def one_added_twice(right, architecture, own, layers):
    return right(architecture, own, layers) | {"norm_weight_offset": 1.0}


@wrong(
    "llama_layers.verify.pointwise:divided",
    "verify/test_llama_cpp_roundings.py::test_logits_times_a_reciprocal_are_within_the_bound",
)
def reciprocal_not_allowed(right, y, number):
    return y / number
