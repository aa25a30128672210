"""Weights that do not fit each other, or their config, in every public way to make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from llama_layers import LayerWeights, Llama, LlamaWeights, MLPWeights
from tests.support.random_models import CONFIGS, GQA, layer_weights, model_of, random_weights

WEIGHTS = random_weights(GQA, dtype=np.float32)
MODEL = model_of(GQA, WEIGHTS)
LAYER = layer_weights(WEIGHTS, GQA, 0)


@pytest.mark.parametrize(
    "path",
    [
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.qkv.fused",
        "self_attn.qkv.bias",
        "self_attn.o_proj",
        "self_attn.o_bias",
        *(f"mlp.{name}_{kind}" for name in ("gate", "up", "down") for kind in ("proj", "bias")),
    ],
)
def test_an_array_of_another_size_in_a_layer(path):
    """By every public way to make a layer: none gives one."""
    config = CONFIGS["biases"]
    whole = layer_weights(random_weights(config, dtype=np.float32), config, 1)
    *parts, name = path.split(".")
    array = whole.arrays()[path]
    assert array is not None
    for other in (np.concatenate([array, array]), array[:1], array[None], array[..., :1]):
        with pytest.raises(ValueError, match=f"{name}|o_proj|up_proj|layernorm|bias|gate"):
            _with(whole, [*parts, name], other)


def _with(part, names, array):
    """The same weights with another array."""
    first, *others = names
    return replace(part, **{first: _with(getattr(part, first), others, array) if others else array})


def test_every_array_of_a_layer_has_a_name():
    config = CONFIGS["biases"]
    whole = layer_weights(random_weights(config, dtype=np.float32), config, 0)
    named = {path: array for path, array in whole.arrays().items() if array is not None}
    arrays = {id(array) for array in _arrays(whole)}
    assert {id(array) for array in named.values()} == arrays
    assert len(named) == len(arrays) == 12
    assert layer_weights(WEIGHTS, GQA, 0).arrays()["mlp.up_bias"] is None


def _arrays(part):
    for value in vars(part).values():
        if isinstance(value, np.ndarray):
            yield value
        elif value is not None and not isinstance(value, int):
            yield from _arrays(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 14}, r"weights: embed_tokens: expected shape \[14, 10\], .* \[13, 10\]"),
        ({"hidden_size": 8}, r"weights: embed_tokens: expected shape \[13, 8\]"),
        ({"intermediate_size": 7}, r"weights: layers\[0\]\.mlp\.gate_proj: .*\[7, 10\]"),
        ({"head_dim": 2}, r"weights: layers\[0\]\.self_attn\.qkv\.fused: .*\[16, 10\]"),
        ({"num_key_value_heads": 4}, r"layers\[0\]\.self_attn\.qkv: expected num_kv_heads = 4"),
        (
            {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
            r"layers\[0\]\.self_attn\.qkv: expected num_heads = 2, as config says, got 4",
        ),
        ({"num_hidden_layers": 3}, "weights: expected 3 layers, as config says, got 2"),
        ({"mlp_bias": True}, r"layers\[0\]\.mlp\.gate_bias: expected shape \[14\], .* got None"),
        ({"qk_norm": "head"}, r"\.self_attn\.q_norm: expected shape \[4\], .* got None"),
    ],
)
def test_weights_of_another_config(changes, message):
    with pytest.raises(ValueError, match=message):
        Llama(replace(GQA, **changes), MODEL.weights)


@pytest.mark.parametrize(("kind", "name"), [("biases", "qkv.bias"), ("qwen3", "q_norm")])
def test_weights_that_a_config_does_not_have(kind, name):
    model = model_of(CONFIGS[kind], random_weights(CONFIGS[kind]))
    message = rf"layers\[0\]\.self_attn\.{name}: expected None, as config says, got shape "
    with pytest.raises(ValueError, match=message):
        Llama(GQA, model.weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": np.ones(9, np.float32)}, r"norm: expected shape \[10\], got \[9\]"),
        ({"lm_head": np.ones((13, 9))}, r"lm_head: expected shape \[vocab_size, 10\], got \[13, 9"),
        ({"embed_tokens": np.ones(10)}, r"embed_tokens: expected shape \[vocab_size, hidden"),
        (
            {"layers": [layer_weights(random_weights(replace(GQA, hidden_size=6)), GQA, 0)]},
            r"layers\[0\]\.input_layernorm: expected shape \[10\], got \[6\]",
        ),
    ],
)
def test_weights_that_do_not_fit_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(MODEL.weights, **changes)


def test_an_mlp_of_another_width_than_its_layer():
    narrow = MLPWeights(np.ones((9, 6)), np.ones((9, 6)), np.ones((6, 9)))
    message = r"mlp\.gate_proj: expected shape \[intermediate_size, 10\], got \[9, 6\]"
    with pytest.raises(ValueError, match=message):
        LayerWeights(LAYER.input_layernorm, LAYER.self_attn, LAYER.input_layernorm, narrow)


def test_layers_that_are_made_when_asked_for_are_left_alone():
    class Later(Sequence):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise AssertionError("looked at")

    weights = replace(MODEL.weights, layers=Later())
    assert len(Llama(GQA, weights).weights.layers) == 2
    assert isinstance(LlamaWeights(*vars(weights).values()).layers, Later)
