"""GGUF files of each architecture that is read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llama_layers import load
from llama_layers.checkpoint.gguf.config import ARCHITECTURES
from tests.support import tiny

# By architecture, what its file says beside what all say, and the config that it stands for.
CASES = {
    "ernie4_5": ({}, {}),
    "ernie4_5, biases": ({}, {"attention_bias": True, "mlp_bias": True}),
    "exaone": ({}, {}),
    "seed_oss": ({}, {"attention_bias": True}),
    "llama": ({}, {"attention_bias": True, "attention_out_bias": False}),
    "llama, output": ({}, {"attention_out_bias": True}),
    "qwen2": ({}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_and_config(tmp_path, case):
    keys, changes = CASES[case]
    architecture = case.partition(",")[0]
    assert architecture in ARCHITECTURES
    config = replace(tiny.CONFIG, model_type=architecture, **changes)
    weights = tiny.arrays(config)
    file = tiny.write_gguf(
        tmp_path / "m.gguf", weights, config, architecture=architecture, keys=keys
    )
    model = load(file)
    assert model.config == config
    tiny.assert_holds(model, weights)
