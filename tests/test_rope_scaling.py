"""`RopeScaling`: each method's keys, and what is refused."""

from __future__ import annotations

import pytest

from llama_layers import ConfigError, RopeScaling

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
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


def test_two_names_for_one_type():
    same = RopeScaling.from_mapping({"type": "linear", "rope_type": "linear", "factor": 2.0})
    assert same == RopeScaling("linear", factor=2.0)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type: .*llama3, got 'longrope'"),
        ({"rope_type": "linear"}, "rope_scaling: linear needs factor"),
        (
            {"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0},
            "linear does not read beta_fast",
        ),
        # transformers accepts the key here and does not read it.
        (
            {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
            "dynamic does not read original_max_position_embeddings",
        ),
        ({"rope_type": "linear", "factor": 0.5}, r"factor: expected at least 1, got 0\.5"),
        ({"rope_type": "linear", "factor": "2"}, "factor: expected a positive .*, got '2'"),
        ({"rope_type": "linear", "factor": True}, "factor: expected a positive .*, got True"),
        ({"rope_type": "linear", "factor": 2.0, "speed": 1}, "rope_scaling: unknown speed"),
        ({"type": "linear", "rope_type": "yarn", "factor": 2.0}, "rope_type: .* linear and yarn"),
        ({"factor": 2.0}, "rope_scaling: default does not read factor"),
        ({"rope_type": "default", "factor": 2.0}, "rope_scaling: default does not read factor"),
        (YARN | {"truncate": 1}, "truncate: expected true or false, got 1"),
        (YARN | {"beta_fast": -1.0}, "beta_fast: expected a positive finite number, got -1.0"),
        (YARN | {"partial_rotary_factor": 0.5}, r"partial_rotary_factor: .*, got 0\.5"),
        (LLAMA3 | {"low_freq_factor": 4.0}, r"low_freq_factor: .* high_freq_factor = 4\.0, got 4"),
        (LLAMA3 | {"low_freq_factor": None}, "rope_scaling: llama3 needs low_freq_factor"),
        (LLAMA3 | {"high_freq_factor": None}, "rope_scaling: llama3 needs high_freq_factor"),
        (LLAMA3 | {"original_max_position_embeddings": None}, "llama3 needs original_max"),
        (LLAMA3 | {"attention_factor": 1.0}, "llama3 does not read attention_factor"),
    ],
)
def test_refuses(scaling, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling.from_mapping(scaling)


def test_original_context_is_a_count():
    for value in (8192.5, True):
        with pytest.raises(ConfigError, match="original_max_position_embeddings: expected"):
            RopeScaling.from_mapping(LLAMA3 | {"original_max_position_embeddings": value})
