"""RoPE scaling in GGUF files: keys, and a tensor of divisors."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from llama_layers import ConfigError, RopeScaling, forward, load, query_temperature
from llama_layers.checkpoint import open_checkpoint
from llama_layers.layers.rope import attention_factor
from tests.support import tiny
from tests.support.gguf_families import llama3_divisors
from tests.support.gguf_files import write_model


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.factor": 4.0}, RopeScaling("linear", factor=4.0)),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5},
            RopeScaling("linear", factor=2.5),
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.finetuned": True,
            },
            RopeScaling("yarn", factor=8.0, original_max_position_embeddings=32),
        ),
    ],
)
def test_rope_scaling(tmp_path, keys, expected):
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(), keys=keys)
    assert load(path).config.rope_scaling == expected


LLAMA3 = replace(
    tiny.CONFIG,
    head_dim=64,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        "llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)


def test_llama3_scaling(tmp_path):
    divisors = llama3_divisors(500000.0, 64, 32.0)
    assert len(set(divisors)) > 3  # kept, blended and divided frequencies are all there
    path = tiny.write_gguf(
        tmp_path / "m.gguf",
        tiny.arrays(LLAMA3),
        LLAMA3,
        keys={"attention.key_length": 64},
        rope_freqs=divisors,
    )
    assert load(path).config == LLAMA3


@pytest.mark.parametrize(
    ("divisors", "message"),
    [
        (llama3_divisors(500000.0, 64, 32.0, high=2.0), "high_freq_factor 4 .* got others"),
        (np.arange(1, 33), "got others"),
        (np.ones(31), "expected 32 positive numbers"),
        (np.zeros(32), "expected 32 positive numbers"),
    ],
)
def test_other_factors_are_refused(tmp_path, divisors, message):
    path = tiny.write_gguf(
        tmp_path / "m.gguf",
        tiny.arrays(LLAMA3),
        LLAMA3,
        keys={"attention.key_length": 64},
        rope_freqs=divisors,
    )
    with pytest.raises(ConfigError, match=f"m.gguf: rope_freqs.weight: .*{message}"):
        load(path)


YARN = {
    "llama.rope.scaling.type": ("str", "yarn"),
    "llama.rope.scaling.factor": ("f32", 4.0),
    "llama.rope.scaling.original_context_length": ("u32", 16),
}


@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        ({}, {}),
        ({"yarn_beta_fast": 24.0, "yarn_beta_slow": 2.0}, {"beta_fast": 24.0, "beta_slow": 2.0}),
        ({"yarn_ext_factor": 1.0, "attn_factor": 1.0}, {}),
        # config.json's, which llama.cpp does not read.
        ({"yarn_attn_factor": 0.7}, {"attention_factor": 0.7}),
        ({"yarn_attn_factor": 0.75, "attn_factor": 2.0}, {"attention_factor": 1.5}),
        ({"yarn_ext_factor": -1.0}, {}),  # llama.cpp's word for its default
        # llama.cpp multiplies what follows from the factor, 0.1 ln(4) + 1.
        ({"attn_factor": 0.5}, {"attention_factor": 0.5 * (0.1 * math.log(4) + 1)}),
    ],
)
def test_yarn(tmp_path, keys, fields):
    more = {f"llama.rope.scaling.{key}": ("f32", value) for key, value in keys.items()}
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", YARN | more))
    assert checkpoint.config.rope_scaling == RopeScaling(
        "yarn", factor=4.0, original_max_position_embeddings=16, **fields
    )
    assert checkpoint.ignored_keys == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"factor": None},
        {"factor": ("f32", 0.0)},  # likewise
        {"factor": ("f32", 1.0)},
        {"type": ("str", "none")},
    ],
)
def test_yarn_of_no_factor_is_none(tmp_path, changes):
    more = {f"llama.rope.scaling.{key}": value for key, value in changes.items()}
    assert (
        open_checkpoint(write_model(tmp_path / "m.gguf", YARN | more)).config.rope_scaling is None
    )


def test_yarn_takes_the_context_that_is_missing(tmp_path):
    for context in (None, ("u32", 0)):
        keys = YARN | {"llama.rope.scaling.original_context_length": context}
        scaling = open_checkpoint(write_model(tmp_path / "m.gguf", keys)).config.rope_scaling
        assert scaling == RopeScaling("yarn", factor=4.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("yarn_ext_factor", 0.0), ("yarn_log_multiplier", 0.1)],
)
def test_yarn_that_is_refused(tmp_path, key, value):
    path = write_model(tmp_path / "m.gguf", YARN | {f"llama.rope.scaling.{key}": ("f32", value)})
    with pytest.raises(ConfigError, match=rf"rope.scaling.{key}: expected"):
        open_checkpoint(path)


def test_the_old_name_of_the_factor(tmp_path):
    old = {"llama.rope.scale_linear": ("f32", 4.0)}
    scaling = open_checkpoint(write_model(tmp_path / "m.gguf", old)).config.rope_scaling
    assert scaling == RopeScaling("linear", factor=4.0)
    both = old | {"llama.rope.scaling.factor": ("f32", 2.0)}
    scaling = open_checkpoint(write_model(tmp_path / "m.gguf", both)).config.rope_scaling
    assert scaling == RopeScaling("linear", factor=2.0)


def test_layers_without_rope_of_smollm3(tmp_path):
    """llama.cpp's code has them, and a file has no key: each fourth."""
    config = replace(tiny.CONFIG, num_hidden_layers=5)
    path = tmp_path / "m.gguf"
    tiny.write_gguf(path, tiny.arrays(config), config, architecture="smollm3")
    model = load(path)
    assert model.config.model_type == "smollm3"
    assert [kind is not None for kind in model.config.rope_kinds] == [True, True, True, False, True]
    expected = replace(model, config=replace(config, layer_rope_theta=(1e4, 1e4, 1e4, 0.0, 1e4)))
    ids = np.arange(6)[None]
    np.testing.assert_array_equal(forward(model, ids).logits, forward(expected, ids).logits)


@pytest.mark.parametrize("share", [None, 1.0, 0.5])
def test_temperature_of_ministral3(tmp_path, share):
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 16.0,
        "rope.scaling.original_context_length": 8,
        "attention.temperature_scale": 0.1,
    }
    if share is not None:
        keys["rope.scaling.yarn_log_multiplier"] = share
    path = tmp_path / "m.gguf"
    config = load(tiny.write_gguf(path, tiny.arrays(), architecture="mistral3", keys=keys)).config
    assert (config.model_type, config.llama_4_scaling_beta) == ("ministral3", 0.1)
    assert config.rope_scaling.original_max_position_embeddings == 8
    # llama.cpp divides by the same with another multiple of the logarithm.
    factor = (1 + 0.1 * math.log(16)) / (1 + 0.1 * (share or 0.0) * math.log(16))
    assert attention_factor(config) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"rope.scaling.type": "none"},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0},
    ],
)
def test_the_context_of_a_temperature_without_yarn(tmp_path, scaling):
    """llama.cpp divides by n_ctx_orig_yarn, which it reads whatever the kind of scaling."""
    keys = {"attention.temperature_scale": 0.5, "rope.scaling.original_context_length": 8}
    path = tmp_path / "m.gguf"
    stored = tiny.write_gguf(path, tiny.arrays(), architecture="mistral3", keys=keys | scaling)
    found = query_temperature(np.array([7, 8, 23]), load(stored).config, like=np.zeros(1))
    np.testing.assert_allclose(found, [1, 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(3)])


LONGROPE = {
    "rope_factors_short.weight": [1.0, 1.5],
    "rope_factors_long.weight": [1.25, 6.0],
}


def write_phi3(path, more, **keys):
    keys = {
        "rope.dimension_count": 4,
        "rope.scaling.original_context_length": 16,
        "rope.scaling.attn_factor": 1.25,
        "attention.sliding_window": 8,
    } | keys
    return tiny.write_gguf(
        path, tiny.fused(tiny.arrays()), architecture="phi3", keys=keys, others=more
    )


def test_longrope_of_phi3(tmp_path):
    """And a part of each head; the window is one that llama.cpp ignores, and all layers have."""
    config = load(write_phi3(tmp_path / "m.gguf", LONGROPE)).config
    assert (config.model_type, config.sliding_window) == ("phi3", 8)
    assert config.layer_types is None
    assert config.rotary_dim == 4
    assert config.rope_scaling == RopeScaling(
        "longrope",
        factor=config.max_position_embeddings / 16,
        original_max_position_embeddings=16,
        short_factor=(1.0, 1.5),
        long_factor=(1.25, 6.0),
        attention_factor=1.25,
    )


@pytest.mark.parametrize(
    ("more", "keys", "message"),
    [
        (dict(list(LONGROPE.items())[:1]), {}, "rope_factors_long.weight: missing"),
        (LONGROPE, {"rope.dimension_count": 6}, "short_factor: expected 3 numbers"),
        (LONGROPE, {"rope.dimension_count": 80}, "rope.dimension_count: expected 1 to 8, got 80"),
        (LONGROPE, {"rope.dimension_count": 3}, "partial_rotary_factor: expected a part of"),
    ],
)
def test_longrope_that_is_refused(tmp_path, more, keys, message):
    with pytest.raises(ConfigError, match=message):
        load(write_phi3(tmp_path / "m.gguf", more, **keys))
