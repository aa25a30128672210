"""GGUF files of each architecture that is read."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers import ConfigError, load
from llama_layers.checkpoint.gguf.config import ARCHITECTURES, read_config
from tests.support import gguf_families, tiny
from tests.support.gguf_families import CASES, EVERY, THETA
from tests.support.gguf_files import MODEL


def test_every_architecture_has_a_case():
    assert {gguf_families.architecture_of(case) for case in CASES} == set(ARCHITECTURES)


@pytest.mark.parametrize("case", EVERY)
def test_weights_and_config(tmp_path, case):
    config = gguf_families.config_of(case)
    model = load(gguf_families.write(tmp_path / "m.gguf", case))
    assert model.config == config
    tiny.assert_holds(model, gguf_families.weights_of(config))


def read(architecture, **keys):
    """The config of a file with more keys."""
    metadata = {key.replace("llama", architecture): value for key, (_, value) in MODEL.items()}
    metadata["general.architecture"] = architecture
    for key, value in keys.items():
        array = np.array(value) if isinstance(value, list) else value
        metadata[f"{architecture}.{key.replace('__', '.')}"] = array
    return read_config(metadata, {"token_embd.weight": (40, 32)}, {})


WINDOW = {"attention__sliding_window": 7}
PATTERN = "attention__sliding_window_pattern"


@pytest.mark.parametrize(
    ("said", "expected"), [(2, "SF"), (1, "FF"), (0, "SS"), ([False, True], "FS")]
)
def test_window_patterns(said, expected):
    """A flag for each layer, or every how many layers one has no window; 0 for none."""
    config = read("olmo2", **WINDOW, **{PATTERN: said}).config
    assert "".join(kind[0].upper() for kind in config.layer_types) == expected


def test_rope_of_layers():
    assert read("gemma2", rope__freq_base_swa=THETA).config.layer_rope_theta is None
    config = read("gemma2", rope__freq_base_swa=30.0).config
    assert config.layer_rope_theta == (30.0, THETA)
    # A factor without a type is linear.
    config = read("olmo2", **WINDOW, rope__scaling__factor=4.0).config
    assert (config.rope_scaling.rope_type, config.sliding_rope_scaling) == ("linear", False)


def test_theta_times_a_power_of_alpha():
    config = read("hunyuan-dense", rope__scaling__alpha=1000.0).config
    assert config.rope_theta == pytest.approx(THETA * 1000 ** (8 / 6), rel=1e-12)
    assert config.rope_scaling is None


YARN = {key.replace(".", "__"): value for key, value in gguf_families.YARN.items()}


def test_the_usual_factor_of_yarn():
    """OLMo 3's files say it, as config.json does, and llama.cpp computes it."""
    factor = {"rope__scaling__yarn_attn_factor": float(np.float32(0.1 * np.log(4) + 1))}
    found = read("olmo2", **YARN, **factor)
    assert found.config.rope_scaling.attention_factor is None
    assert found.ignored_keys == ()


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        (
            "olmo2",
            WINDOW | {PATTERN: [True]},
            "pattern: expected a flag for each of 2 layers, got",
        ),
        ("gemma2", {PATTERN: "LG"}, "pattern: expected an integer, or a flag for each of 2 layers"),
        ("granite_swa", WINDOW, "missing granite_swa.attention.sliding_window_pattern"),
        (
            "granite_swa",
            WINDOW | {PATTERN: [True, False], "attention__rope_pattern": [1, 0, 1]},
            "rope_pattern: expected a flag for each of 2 layers, got an array of 3",
        ),
        ("granite", {"rope__scaling__finetuned": 1}, "finetuned: expected true or false, got 1"),
        ("gemma3", {"rope__dimension_count_swa": 4}, "dimension_count_swa: expected the head_dim"),
        ("gemma3", {"attention__key_length_swa": 4}, "key_length_swa: expected the head_dim, 8"),
    ],
)
def test_what_is_refused(architecture, keys, message):
    with pytest.raises(ConfigError, match=message):
        read(architecture, **keys)
