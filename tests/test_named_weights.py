"""Weights by the names that Hugging Face gives them, there and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from llama_layers import CheckpointError, Llama, LlamaWeights, forward
from llama_layers.checkpoint import expected_tensors
from llama_layers.layers.weights import known_arrays
from tests.support.random_models import CONFIGS, model_of, random_weights

NAMES = ["gqa", "mha", "biases", "qwen2", "tied"]
IDS = np.array([[1, 5, 2]])


class Asked(Mapping):
    """A mapping that remembers what it was asked for."""

    def __init__(self, arrays):
        self.arrays, self.names = arrays, []

    def __getitem__(self, name):
        self.names.append(name)
        return self.arrays[name]

    def __contains__(self, name):
        return name in self.arrays

    def __iter__(self):
        return iter(self.arrays)

    def __len__(self):
        return len(self.arrays)


@pytest.mark.parametrize("name", NAMES)
def test_each_array_has_the_name_that_it_was_made_from(name):
    config = CONFIGS[name]
    arrays = random_weights(config)
    for weights in (model_of(config, arrays).weights, LlamaWeights.from_named(arrays, config)):
        found = weights.named()
        assert list(found) == list(expected_tensors(config)) == list(arrays)
        for key, array in arrays.items():
            assert np.array_equal(found[key], array), key


@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_what_one_made_by_hand_does(name):
    config = CONFIGS[name]
    arrays = random_weights(config)
    found = forward(Llama(config, LlamaWeights.from_named(arrays, config)), IDS)
    assert np.array_equal(found.logits, forward(model_of(config, arrays), IDS).logits)


def test_arrays_are_asked_for_when_they_are_used_and_kept():
    config = CONFIGS["biases"]
    arrays = Asked(random_weights(config))
    weights = LlamaWeights.from_named(arrays, config)
    assert arrays.names == []
    assert (
        weights.embed_tokens is weights.embed_tokens is arrays.arrays["model.embed_tokens.weight"]
    )
    assert arrays.names == ["model.embed_tokens.weight"]
    layer = weights.layers[-1]
    below = [name for name in arrays.arrays if name.startswith("model.layers.1.")]
    assert sorted(arrays.names[1:]) == sorted(below)
    assert weights.layers[1] is layer
    assert weights.layers[1:] == [layer]
    weights.named()
    assert sorted(arrays.names) == sorted(arrays.arrays)


def test_rows_that_lie_together_are_not_copied():
    class Rows(Asked):
        def rows(self, names):
            if "weight" not in names[0] or len(names) == 1:
                return np.concatenate([self.arrays[name] for name in names])
            return fused[names]

    config = CONFIGS["gqa"]
    fused = {
        tuple(f"model.layers.{i}.self_attn.{x}_proj.weight" for x in "qkv"): np.full((32, 10), 0.5)
        for i in range(2)
    }
    weights = LlamaWeights.from_named(Rows(random_weights(config)), config)
    for layer, array in zip(weights.layers, fused.values(), strict=True):
        assert layer.self_attn.qkv.fused is array


def test_a_missing_array_and_one_of_another_shape():
    config = CONFIGS["qwen2"]
    arrays = random_weights(config)
    name = "model.layers.1.self_attn.k_proj.bias"
    without = {key: array for key, array in arrays.items() if key != name}
    with pytest.raises(CheckpointError, match=f"^arrays: expected {name}, got no array"):
        LlamaWeights.from_named(without, config)
    wider = replace(config, intermediate_size=15)
    weights = LlamaWeights.from_named(arrays, wider)
    message = r"layers\.1\.mlp\.gate_proj\.weight: expected shape \[15, 10\], got \[14, 10\]"
    with pytest.raises(ValueError, match=message):
        weights.layers[1]


def test_a_layer_with_each_array_changed():
    config = CONFIGS["biases"]
    layer = model_of(config, random_weights(config)).weights.layers[0]
    changed = layer.mapped(lambda array: -array)
    assert changed.self_attn.qkv.num_kv_heads == config.num_key_value_heads
    for (name, array), found in zip(layer.named().items(), changed.named().values(), strict=True):
        assert np.array_equal(found, -array), name
    bare = model_of(CONFIGS["gqa"], random_weights(CONFIGS["gqa"])).weights.layers[0]
    assert bare.mapped(lambda array: array).mlp.up_bias is None


def test_a_kernel_is_told_of_arrays_that_it_does_not_know():
    biased, bare = (
        model_of(c, random_weights(c)).weights.layers[0]
        for c in (CONFIGS["biases"], CONFIGS["gqa"])
    )
    every = (
        *("norms_before", "qkv_bias", "o_bias", "mlp_bias", "qk_norm_weights", "norms_after"),
        "attention_sinks",
    )
    for found, array in zip(known_arrays(biased, every), biased.arrays().values(), strict=True):
        assert found is array
    assert known_arrays(biased, every[:3]) is None
    present = [array for array in bare.arrays().values() if array is not None]
    assert len(present) == 7
    for found, array in zip(known_arrays(bare, ("norms_before",)), present, strict=True):
        assert found is array
    assert len(known_arrays(bare, every)) == 17


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lm_head.weight", (50, 16)),
        ("model.norm.weight", (3,)),
        ("model.layers.0.self_attn.q_proj.weight", (8, 16)),
    ],
)
def test_an_array_of_another_shape_is_refused_when_it_is_used(name, shape):
    config = CONFIGS["gqa"]
    arrays = {n: np.ones(s, np.float32) for n, s in expected_tensors(config).items()}
    arrays[name] = np.ones(shape, np.float32)
    model = Llama(config, LlamaWeights.from_named(arrays, config))
    with pytest.raises(ValueError, match=f"{name}: expected shape "):
        forward(model, IDS)


@pytest.mark.parametrize("arguments", [(3, CONFIGS["gqa"]), ({}, 3)])
def test_arguments_of_another_type_are_refused(arguments):
    with pytest.raises(TypeError, match=r"(arrays|config): expected a \w+, got int"):
        LlamaWeights.from_named(*arguments)


@pytest.mark.parametrize("more", [-10, 1])  # rows that are few more are padding
def test_a_vocabulary_of_another_size_is_refused(more):
    model = model_of(CONFIGS["gqa"], random_weights(CONFIGS["gqa"]))
    rows, width = model.weights.embed_tokens.shape
    message = f"weights: embed_tokens: expected shape {[rows + more, width]}, as config says, got"
    with pytest.raises(ValueError, match=re.escape(message)):
        Llama(replace(model.config, vocab_size=rows + more), model.weights)
