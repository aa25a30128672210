"""RoPE scaling in GGUF files: keys, and a tensor of divisors."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from llama_layers import ConfigError, RopeScaling, load
from llama_layers.checkpoint import open_checkpoint
from tests.support import tiny
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


def llama3_divisors(theta, dim, factor, low=1.0, high=4.0, context=8192):
    """What llama.cpp writes for Llama 3.1: in float32, by wavelength."""
    result = []
    for i in range(0, dim, 2):
        frequency = np.float32(1) / np.float32(theta) ** np.float32(i / dim)
        wavelength = np.float32(2 * np.pi) / frequency
        if wavelength < context / high:
            result.append(1.0)
        elif wavelength > context / low:
            result.append(factor)
        else:
            smooth = (np.float32(context) / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


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
        ({"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "attn_factor": 1.0}, {}),
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
    [("yarn_attn_factor", 0.7), ("yarn_ext_factor", 0.0), ("yarn_log_multiplier", 0.1)],
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
