"""GGUF files that llama.cpp's converter makes of transformers' models.

By hand, with a copy of llama.cpp's sources, as the sdist of llama-cpp-python has it::

    LLAMA_CPP_SOURCE=vendor/llama.cpp pytest tests/peers/test_llama_cpp_converter.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llama_layers import forward, load
from tests.support import convert_by_llama_cpp
from tests.support.families import CASES, written

pytestmark = pytest.mark.llama_cpp
if "LLAMA_CPP_SOURCE" not in os.environ:
    pytest.skip("no LLAMA_CPP_SOURCE was given", allow_module_level=True)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}
USUAL = {"attention_factor": 0.1 * np.log(4) + 1, "beta_fast": 32.0, "beta_slow": 1.0}
# Options instead of those of the case of the same name, where the converter drops or needs some.
OPTIONS = {
    "gemma2": CASES["gemma2"][1] | {"query_pre_attn_scalar": 10},  # the width of a head
    "gemma3_text": CASES["gemma3_text"][1]
    | {"query_pre_attn_scalar": 10, "sliding_window_pattern": 6, "num_hidden_layers": 8},
    "glm": {"head_dim": 8},
    "granite_swa": CASES["granite_swa"][1] | {"layer_rope_theta": None},
    "hunyuan_v1_dense, biases": {
        "head_dim": 12,
        "attention_bias": True,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 50.0,
            "beta_fast": 32, "mscale": 1.0,
        },
    },
    "ministral3": {
        "head_dim": 12,
        "rope_parameters": YARN
        | {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 0.5},
    },
}  # fmt: skip
# llama.cpp has none of these, or GGUF has no key for what is special in them.
LEFT_OUT = {
    *("ministral", "cwm", "helium", "helium, biases", "hyperclovax", "hyperclovax, no post norm"),
    *("vaultgemma", "smollm3, windows", "gemma2, no caps"),
}
FAMILIES = {
    case: (family, OPTIONS.get(case, options))
    for case, (family, options) in CASES.items()
    if case not in LEFT_OUT
} | {
    "llama": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True}),
    "exaone4, llama3": (
        "exaone4",
        {"rope_parameters": LLAMA3, "sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 12, "rope_parameters": YARN | {"attention_factor": 1.0}}),
    "olmo3, as published": (
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 7,
            "rope_parameters": {
                "full_attention": YARN | USUAL,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_the_logits_are_those_of_the_checkpoint(tmp_path, rng, case):
    """Off by no more than our own float32 pass is, since a converter may round norms plus 1."""
    directory = written(tmp_path, *FAMILIES[case])
    file = tmp_path / "m.gguf"
    source = Path(os.environ["LLAMA_CPP_SOURCE"])
    command = [sys.executable, convert_by_llama_cpp.__file__, source, directory, file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ids = rng.integers(0, 61, (1, 40))
    exact = forward(load(directory, dtype="float64"), ids).logits
    error = np.abs(forward(load(directory), ids).logits - exact).max()
    logits = forward(load(file, dtype="float64"), ids).logits
    assert np.abs(logits - exact).max() <= error
