"""The programs in docs/examples, which the page on ports shows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from llama_layers.verify import Trace

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = np.array([0.5, -1, 2, 0, 0.25, 3, -4, 1], np.float32).reshape(1, 2, 1, 4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_cpp(tmp_path):
    source, program = DOCS / "examples" / "write_trace.cpp", tmp_path / "write_trace"
    strict = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["g++", *strict, "-o", program, source], check=True)
    file = tmp_path / "port.safetensors"
    subprocess.run([program, file], check=True)
    trace = Trace.load(file)
    assert np.array_equal(trace.input_ids, [[504, 3575]])
    assert trace.input_ids.dtype == np.int32
    (name,) = trace.arrays
    assert name == "model.layers.0.self_attn.q_rope"
    assert trace.arrays[name].dtype == np.float32
    assert np.array_equal(trace.arrays[name], NUMBERS)
    assert trace.metadata == {
        "engine": "my port 1.0",
        "dtype": "bfloat16",
        "accumulate": "float32",
    }
    # The numbers of a safetensors file begin at a multiple of 8 bytes.
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def test_page_shows_the_files():
    text = (DOCS / "porting.md").read_text(encoding="utf-8")
    shown = re.findall(r"literalinclude\} (\S+)", text)
    assert sorted(shown) == sorted(
        f"examples/{file.name}" for file in (DOCS / "examples").iterdir()
    )
