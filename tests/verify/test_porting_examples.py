"""The programs in docs/examples, which the page on ports shows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from llama_layers import load
from llama_layers.verify import Trace, check

DOCS = Path(__file__).parents[2] / "docs"
IDS = [504, 3575, 282, 4649, 314]  # "The capital of France is"
COMPILERS = {
    "write_trace.cpp": ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1"],
    "write_trace.rs": ["rustc", "--edition=2021", "-Dwarnings", "-Copt-level=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("source", COMPILERS)
def test_traces(source, smollm2, tmp_path):
    compiler, *options = COMPILERS[source]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    program, file = tmp_path / "write_trace", tmp_path / "port.safetensors"
    subprocess.run([compiler, *options, "-o", program, DOCS / "examples" / source], check=True)
    subprocess.run([program, smollm2 / "model.safetensors", file], check=True)
    trace = Trace.load(file)
    assert np.array_equal(trace.input_ids, [IDS])
    assert trace.input_ids.dtype == np.int32
    assert trace.metadata == {"engine": "my port 1.0", "dtype": "float32"}
    with safe_open(smollm2 / "model.safetensors", framework="numpy") as weights:
        x = weights.get_tensor("model.embed_tokens.weight")[IDS].astype(np.float64)
        weight = weights.get_tensor("model.layers.0.input_layernorm.weight")
    norm = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * weight
    assert np.array_equal(trace.arrays["model.embed_tokens"], [x])
    np.testing.assert_allclose(trace.arrays["model.layers.0.input_layernorm"], [norm], rtol=1e-5)
    assert check(trace, load(smollm2)).verdict == "PASS"


def test_page_shows_the_files():
    text = (DOCS / "porting.md").read_text(encoding="utf-8")
    shown = re.findall(r"literalinclude\} (\S+)", text)
    assert sorted(shown) == sorted(
        f"examples/{file.name}" for file in (DOCS / "examples").iterdir()
    )
