"""`RopeScaling`: each method's keys, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import ConfigError, LlamaConfig, RopeScaling, inv_freq
from llama_layers.layers.rope import attention_factor
from tests.support.decoder_oracle import frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 2.0],
    "long_factor": [1.0, 8.0],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "truncate": False}


@pytest.mark.parametrize(
    "scaling", [LLAMA3, YARN, {"type": "linear", "factor": 2}, {"type": "dynamic", "factor": 2.0}]
)
def test_reads(scaling):
    read = RopeScaling.from_mapping(scaling)
    assert read is not None
    assert read.rope_type == scaling.get("rope_type", scaling.get("type"))
    for key, value in scaling.items():
        if key != "type":
            assert getattr(read, key) == value


@pytest.mark.parametrize(
    "scaling", [{}, {"rope_type": "default"}, {"type": "default", "factor": None}]
)
def test_plain_rope(scaling):
    assert RopeScaling.from_mapping(scaling) is None


def test_two_names_for_the_type():
    """transformers reads the newer one, as for "mrope" beside "default" in Qwen2-VL's files."""
    for older in ("linear", "yarn"):
        same = RopeScaling.from_mapping({"type": older, "rope_type": "linear", "factor": 2.0})
        assert same == RopeScaling("linear", factor=2.0)
    assert RopeScaling.from_mapping({"type": "mrope", "rope_type": "default"}) is None


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (
            {"type": "yarn", "factor": 16.0, "finetuned": True},
            RopeScaling("yarn", factor=16.0),
        ),
        (
            {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 128},
            RopeScaling("dynamic", factor=2.0),
        ),
        ({"type": "linear", "factor": 2, "beta_fast": 1.0}, RopeScaling("linear", factor=2)),
        ({"type": "linear", "factor": 0.5}, RopeScaling("linear", factor=0.5)),
        (LLAMA3 | {"attention_factor": 1.0, "rope_theta": 1e4}, RopeScaling(**LLAMA3)),
        (
            {"type": "yarn", "factor": 4.0, "mscale": 0, "beta_slow": 0, "attn_factor": 1.0},
            RopeScaling("yarn", factor=4.0),
        ),
        ({"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e4}, None),
    ],
)
def test_words_that_no_formula_reads(scaling, expected):
    assert RopeScaling.from_mapping(scaling) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0},
            "linear does not read beta_fast",
        ),
        (LLAMA3 | {"attention_factor": 1.0}, "llama3 does not read attention_factor"),
        ({"rope_type": [1]}, r"rope_type: .*, got \[1\]"),
    ],
)
def test_arguments_must_be_read(arguments, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**arguments)


NUMBERS = st.floats(1e-6, 1e6)


@given(
    theta=st.floats(1e-30, 1e30).filter(lambda theta: theta != 1),
    half=st.integers(1, 64),
    context=st.integers(1, 2**53),
    length=st.integers(1, 2**63),
    scaling=st.one_of(
        st.builds(RopeScaling, st.sampled_from(["linear", "dynamic"]), NUMBERS),
        st.builds(
            RopeScaling,
            st.just("yarn"),
            NUMBERS,
            beta_fast=NUMBERS,
            beta_slow=NUMBERS,
            mscale=NUMBERS,
            mscale_all_dim=NUMBERS,
            original_max_position_embeddings=st.integers(1, 2**53),
        ),
        st.builds(
            RopeScaling,
            st.just("llama3"),
            NUMBERS,
            low_freq_factor=st.floats(1e-6, 1.0),
            high_freq_factor=st.floats(1.5, 1e6),
            original_max_position_embeddings=st.integers(1, 2**53),
        ),
    ),
)
def test_what_is_accepted_has_frequencies(theta, half, context, length, scaling):
    """Whatever numbers a config may have, every angle is a positive finite number."""
    config = replace(
        LlamaConfig.llama2_7b(),
        head_dim=2 * half,
        rope_theta=theta,
        max_position_embeddings=context,
        rope_scaling=scaling,
    )
    frequencies = inv_freq(config, length=length)
    assert np.all(np.isfinite(frequencies) & (frequencies > 0))
    assert 0 < attention_factor(config) < 1e8


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "su", "factor": 2.0}, "rope_type: .*longrope, got 'su'"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_scaling: longrope needs"),
        (LONGROPE | {"long_factor": [1.0, 0.0]}, "long_factor: expected a positive .*, got 0"),
        (LONGROPE | {"long_factor": 2.0}, r"long_factor: expected a list of numbers, got 2\.0"),
        (LONGROPE | {"original_max_position_embeddings": 1}, "expected more than 1 with longrope"),
        ({"rope_type": "linear"}, "rope_scaling: linear needs factor"),
        ({"rope_type": ["linear"], "factor": 2.0}, r"rope_type: .*longrope, got \['linear'\]"),
        ({"rope_type": "linear", "factor": 1e300}, r"factor: expected a number from 1e-06 to 1e"),
        ({"rope_type": "linear", "factor": 10**400}, "factor: expected a positive finite number"),
        (YARN | {"attention_factor": 1e19}, "attention_factor: expected a number from 1e-06"),
        (YARN | {"attention_factor": 0}, "attention_factor: expected a positive finite number"),
        ({"type": "dynamic", "factor": 1.0, "alpha": 1000.0}, r"alpha: expected 1 .*, got 1000\.0"),
        (YARN | {"short_factor": [1.0]}, r"short_factor: expected nothing, got \[1\.0\]"),
        ({"full_attention": {"rope_type": "yarn"}}, "full_attention: expected no parameters for"),
        ({"rope_type": "linear", "factor": "2"}, "factor: expected a positive .*, got '2'"),
        ({"rope_type": "linear", "factor": True}, "factor: expected a positive .*, got True"),
        ({"factor": 2.0}, "rope_scaling: default does not read factor"),
        ({"factor": 0.5}, "rope_scaling: default does not read factor"),
        ({"rope_type": "default", "factor": 2.0}, "rope_scaling: default does not read factor"),
        (YARN | {"truncate": 1}, "truncate: expected true or false, got 1"),
        (YARN | {"beta_fast": -1.0}, "beta_fast: expected a positive finite number, got -1.0"),
        (YARN | {"partial_rotary_factor": 0.5}, r"partial_rotary_factor: .*, got 0\.5"),
        (LLAMA3 | {"low_freq_factor": 4.0}, r"low_freq_factor: .* high_freq_factor = 4\.0, got 4"),
        (LLAMA3 | {"low_freq_factor": None}, "rope_scaling: llama3 needs low_freq_factor"),
        (LLAMA3 | {"high_freq_factor": None}, "rope_scaling: llama3 needs high_freq_factor"),
        (LLAMA3 | {"original_max_position_embeddings": None}, "llama3 needs original_max"),
    ],
)
def test_refuses(scaling, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling.from_mapping(scaling)


def test_original_context_is_a_count():
    for value in (8192.5, True):
        with pytest.raises(ConfigError, match="original_max_position_embeddings: expected"):
            RopeScaling.from_mapping(LLAMA3 | {"original_max_position_embeddings": value})


@pytest.mark.parametrize(
    ("key", "neutral", "other"),
    [
        *((name, 1, 2.0) for name in ("partial_rotary_factor", "alpha", "rope_ratio")),
        *((name, 1, 2.0) for name in ("attn_factor", "extrapolation_factor")),
        ("llama_4_scaling_beta", 0, 0.1),
        *((name, None, [2.0]) for name in ("short_factor", "long_factor")),
        *((name, None, 2.0) for name in ("short_mscale", "long_mscale")),
    ],
)
def test_what_other_programs_read_must_change_nothing(key, neutral, other):
    linear = {"rope_type": "linear", "factor": 2.0}
    assert RopeScaling.from_mapping(linear | {key: neutral}) == RopeScaling.from_mapping(linear)
    with pytest.raises(ConfigError, match=f"{key}: expected"):
        RopeScaling.from_mapping(linear | {key: other})


@pytest.mark.parametrize("truncate", [None, False])
def test_the_ramp_of_yarn_ends_at_the_last_pair(truncate):
    """Where theta is small, even the slowest pair makes more turns than beta_slow."""
    scaling = RopeScaling("yarn", factor=4.0, truncate=truncate)
    config = replace(
        LlamaConfig.llama2_7b(),
        head_dim=16,
        rope_theta=3.0,
        max_position_embeddings=200,
        rope_scaling=scaling,
    )
    expected, _ = frequencies(config)
    np.testing.assert_allclose(inv_freq(config), expected, rtol=1e-6)
