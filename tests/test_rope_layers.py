"""RoPE of each layer: what a config and its file say of it, and what a layer makes of that."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from llama_layers import (
    ConfigError,
    LlamaConfig,
    Mask,
    apply_rope,
    decoder_layer,
    inv_freq,
    query_temperature,
    rope_table,
)
from llama_layers.layers.rope import attention_factor
from tests.support import decoder_oracle
from tests.support.random_models import CONFIGS, GQA, layer_weights, random_weights

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
SMOLLM3 = SIZES | {"model_type": "smollm3", "rope_theta": 100.0}
OLMO3 = SIZES | {"model_type": "olmo3", "rope_theta": 500000.0, "sliding_window": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TABLES = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
PHI3 = SIZES | {"model_type": "phi3", "original_max_position_embeddings": 16}


def thetas(config):
    return [0.0 if kind is None else kind.theta for kind in config.rope_kinds]


@pytest.mark.parametrize(
    ("words", "rotated"),
    [
        ({}, [1, 1, 1, 0]),
        ({"no_rope_layer_interval": 2}, [1, 0, 1, 0]),
        ({"no_rope_layers": [0, 1, 1, 1], "no_rope_layer_interval": 2}, [0, 1, 1, 1]),
        ({"no_rope_layers": [1, 1, 1, 1]}, [1, 1, 1, 1]),
    ],
)
def test_layers_without_rope(words, rotated):
    config = LlamaConfig.from_json(SMOLLM3 | words)
    assert thetas(config) == [100.0 * one for one in rotated]
    assert [config.rope_of(layer) is None for layer in range(4)] == [not one for one in rotated]
    assert ("layer_rope_theta" in config.switches) == (0 in rotated)


def test_windows_of_layers_without_rope():
    words = {"sliding_window": 8, "use_sliding_window": True}
    config = LlamaConfig.from_json(SMOLLM3 | words)
    assert [config.window_of(layer) for layer in range(4)] == [None, None, None, 8]
    off = LlamaConfig.from_json(SMOLLM3 | words | {"use_sliding_window": False})
    assert off.sliding_window is None


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ({}, [(5e5, False)] * 4),
        ({"rope_scaling": YARN}, [(5e5, False)] * 3 + [(5e5, True)]),
        (
            {"rope_parameters": {"full_attention": YARN | {"rope_theta": 5e5}}},
            [(5e5, False)] * 3 + [(5e5, True)],
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 10.0}}},
            [(10.0, False)] * 3 + [(5e5, False)],
        ),
        ({"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), YARN)},
         [(5e5, True)] * 4),
    ],
)  # fmt: skip
def test_parameters_for_types_of_layers(words, kinds):
    config = LlamaConfig.from_json(OLMO3 | words)
    assert [tuple(kind) for kind in config.rope_kinds] == kinds
    scaled = [config.rope_of(layer).rope_scaling is not None for layer in range(4)]
    assert scaled == [of for _, of in kinds]


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_names_of_longrope(kind):
    config = LlamaConfig.from_json(PHI3 | {"rope_scaling": {"type": kind} | TABLES})
    scaling = config.rope_scaling
    assert (scaling.rope_type, scaling.factor) == ("longrope", 4.0)
    assert attention_factor(config) == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))


@pytest.mark.parametrize("length", [None, 16, 17])
def test_longrope_depends_on_the_length(length):
    config = LlamaConfig.from_json(PHI3 | {"rope_scaling": {"type": "longrope"} | TABLES})
    expected, _ = decoder_oracle.frequencies(config, length)
    np.testing.assert_allclose(inv_freq(config, length=length), expected, rtol=1e-14)
    cos, _ = rope_table(np.arange(length or 1), config, like=np.zeros(1))
    assert cos[0, 0] == attention_factor(config)


OWN = [
    replace(CONFIGS["RoPE by layer"], model_type=model_type)
    for model_type in ("llama", "smollm3", "qwen2")
] + [replace(CONFIGS["longrope"], model_type="phi3")]


@pytest.mark.parametrize("config", OWN, ids=lambda config: config.model_type)
def test_what_a_family_has_no_words_for_is_written(config):
    assert LlamaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SMOLLM3 | {"no_rope_layers": [1, 1]}, "no_rope_layers: expected 4 entries, .*, got 2"),
        (SMOLLM3 | {"no_rope_layers": [1, 1, 2, 1]}, r"no_rope_layers: .* 0 and 1, got \[1, 1, 2"),
        (SMOLLM3 | {"no_rope_layers": 3}, "no_rope_layers: expected a list of 0 and 1, got 3"),
        (SMOLLM3 | {"no_rope_layer_interval": 0}, "no_rope_layer_interval: .* positive .*, got 0"),
        (SMOLLM3 | {"use_sliding_window": 3}, "use_sliding_window: expected true or false, got 3"),
        (OLMO3 | {"rope_parameters": YARN}, "rope_parameters: expected objects for full_attention"),
        (
            OLMO3 | {"rope_parameters": {"sliding_attention": YARN}},
            "rope_parameters: expected for sliding_attention no scaling or that of full_attention",
        ),
        (
            OLMO3 | {"rope_parameters": {"full_attention": YARN | {"truncate": False}}},
            "truncate: expected it beside full_attention and sliding_attention, got False",
        ),
        # transformers silently drops both where RoPE differs by the type of the layer.
        (
            OLMO3 | {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling: expected the kind as rope_type, got type = 'linear', which the class",
        ),
        (
            OLMO3
            | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
            | {"original_max_position_embeddings": 16},
            "original_max_position_embeddings: expected it beside rope_type, got 16 elsewhere",
        ),
        (
            PHI3 | {"rope_scaling": {"type": "su", "original_max_position_embeddings": 8} | TABLES},
            "original_max_position_embeddings: expected one, got 8 and 16",
        ),
        (
            PHI3 | {"rope_scaling": {"type": "su"} | TABLES, "partial_rotary_factor": 0.5},
            "short_factor: expected 2 numbers, one for each pair .* got 4",
        ),
        (PHI3 | {"partial_rotary_factor": 1.5}, "partial_rotary_factor: .* to 1, got 1.5"),
        (
            PHI3 | {"partial_rotary_factor": 0.4},
            "partial_rotary_factor: expected a part of head_di",
        ),
    ],
)
def test_files_that_are_refused(content, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_json(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_rope_theta": (1e4,)}, "layer_rope_theta: expected 2 entries, .*, got 1"),
        ({"layer_rope_theta": (1e4, -1.0)}, "layer_rope_theta: expected a positive .*, got -1"),
        ({"layer_rope_theta": (1e4, False)}, "layer_rope_theta: expected a positive .*, got False"),
        ({"layer_rope_theta": 1e4}, "layer_rope_theta: expected a list of numbers, got 10000.0"),
        ({"sliding_rope_scaling": 1}, "sliding_rope_scaling: expected true or false, got 1"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor: expected a positive .*, got 0"),
        (
            {"llama_4_scaling_context": 9, "rope_scaling": YARN},
            "llama_4_scaling_context: expected None with yarn, which has .*, got 9",
        ),
        ({"llama_4_scaling_beta": -0.1}, "llama_4_scaling_beta: expected a positive .*, got -0.1"),
        (
            {"layer_rope_theta": (1.0, 2.0), "rope_scaling": YARN},
            "rope_theta: expected another number than 1 with yarn",
        ),
    ],
)
def test_fields_that_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(GQA, **changes)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_channels_beyond_the_rotated_ones_stay(layout):
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 8)).astype(np.float32)
    table = rope_table(np.arange(3), replace(GQA, head_dim=4), like=x)
    y = apply_rope(x, *table, layout=layout, rotary_dim=4)
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    alone = apply_rope(np.ascontiguousarray(x[..., :4]), *table, layout=layout)
    np.testing.assert_array_equal(y[..., :4], alone)


@pytest.mark.parametrize(("width", "got"), [(3, "got 3"), (10, "got 10"), (0, "got 0")])
def test_widths_that_are_refused(width, got):
    x = np.zeros((1, 1, 1, 8), np.float32)
    with pytest.raises(ValueError, match=f"rotary_dim: expected .*{got}"):
        apply_rope(x, np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32), rotary_dim=width)


def test_temperature():
    """1 + beta ln(1 + n) after n trained contexts."""
    scaling = YARN | {"original_max_position_embeddings": 10}
    config = replace(GQA, llama_4_scaling_beta=0.5, rope_scaling=scaling)
    found = query_temperature(np.array([[0, 9, 10, 29]]), config, like=np.zeros(1))
    np.testing.assert_allclose(found, [[1, 1, 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(3)]])
    for plain in (None, {"rope_type": "linear", "factor": 2.0}):
        other = replace(config, rope_scaling=plain, llama_4_scaling_context=10)
        again = query_temperature(np.array([[0, 9, 10, 29]]), other, like=np.zeros(1))
        np.testing.assert_array_equal(again, found)
    narrow = query_temperature(np.array([9]), config, like=np.zeros(1, np.float16))
    assert narrow.dtype == np.float32
    with pytest.raises(TypeError, match="positions: expected"):
        query_temperature(np.array([1.0]), config, like=found)


@pytest.mark.parametrize(
    ("changes", "count", "message"),
    [
        ({}, None, "rope: expected two arrays, .* got NoneType"),
        ({}, 3, "rope: expected two arrays, .* got 3"),
        (
            {"llama_4_scaling_beta": 0.1},
            2,
            "rope: expected .* factors from query_temperature, got 2",
        ),
    ],
)
def test_rope_of_another_layer_is_refused(changes, count, message):
    config = replace(GQA, **changes)
    x, places = np.zeros((1, 2, 10)), np.arange(2)
    w = layer_weights(random_weights(config), config, 0)
    table = rope_table(places, config, like=x)
    rope = None if count is None else (*table, query_temperature(places, config, like=x))[:count]
    with pytest.raises(TypeError, match=message):
        decoder_layer(x, w, config=config, rope=rope, mask=Mask(places, places))
