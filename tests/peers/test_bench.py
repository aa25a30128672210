"""`llama-layers bench`: the other engines that are installed do the same work."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest

from llama_layers.bench import cpu
from llama_layers.bench.measure import TOLERANCES
from llama_layers.cli import main
from tests.support import random_models, tiny

pytestmark = [
    pytest.mark.peer,
    # OpenVINO forks, and jax warns of it where an earlier test of the process has loaded it.
    pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning"),
]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "plain": tiny.CONFIG,
    "tied": tiny.TIED,
    "biased": tiny.BIASED,
    "qwen2": tiny.QWEN2,
    "llama3": replace(tiny.CONFIG, rope_scaling=LLAMA3),
}


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    """Nothing is asserted of times; agreement is asked for more closely than of 16-bit numbers."""
    for name, value in (("REST", 0), ("READ_BYTES", 1 << 20), ("SQUARE", 64)):
        monkeypatch.setattr(cpu, name, value)
    monkeypatch.setitem(TOLERANCES, "float32", 1e-5)
    monkeypatch.setitem(TOLERANCES, "bfloat16", 0.05)
    monkeypatch.setitem(TOLERANCES, "float16", 0.01)


def bench(tmp_path, *arguments):
    """The engines, each with its number of times; `bench` itself refuses results that differ."""
    path = tmp_path / "bench.json"
    options = ["--rounds", "2", "--threads", "1", "--json", str(path), "--force"]
    assert main(["bench", *arguments, *options]) == 0
    cases = json.loads(path.read_text())["cases"]
    return [{name: len(times) for name, times in case["seconds"].items()} for case in cases]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino"])
def test_qkv(tmp_path, capsys, engine, dtype):
    pytest.importorskip(engine)
    options = ("--model", "smollm2-135m", "--seq", "1,9", "--dtype", dtype, "--against", engine)
    if engine != "torch" and dtype != "float32" and not able(engine, dtype):
        assert main(["bench", "qkv", *options]) == 2
        assert f"--against {engine}: " in capsys.readouterr().err
    else:
        assert bench(tmp_path, "qkv", *options) == [{"llama_layers": 2, engine: 2}] * 2


def able(engine, dtype):
    """Whether an engine multiplies numbers of 16 bits here."""
    if engine == "onnxruntime":
        return False
    core = importlib.import_module(engine).Core()
    word = {"bfloat16": "BF16", "float16": "FP16"}[dtype]
    return word in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "kind",
    [
        ("layer", "--seq", "1,4", "--context", "3"),
        ("decode", "--context", "1,6", "--tokens", "3"),
        ("prefill", "--seq", "1,5"),
    ],
)
def test_transformers(tmp_path, kind, name, dtype):
    config = CONFIGS[name]
    weights = random_models.random_weights(config, dtype=np.float32)
    model = tiny.write_single(tmp_path / "tiny", weights, config)
    options = ("--model", str(model), "--dtype", dtype, "--against", "transformers")
    assert bench(tmp_path, *kind, *options) == [{"llama_layers": 2, "transformers": 2}] * 2


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.TIED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "kind",
    [
        ("layer", "--seq", "1,4", "--context", "3"),
        ("decode", "--context", "1,6", "--tokens", "3"),
        ("prefill", "--seq", "1,5"),
    ],
)
def test_llama_cpp(tmp_path, monkeypatch, kind, dtype, config):
    pytest.importorskip("llama_cpp")
    monkeypatch.setitem(TOLERANCES, "float32", 0.02)  # a cache of float16
    weights = random_models.random_weights(config, dtype=np.float32)
    model = tiny.write_single(tmp_path / "tiny", weights, config)
    options = ("--model", str(model), "--dtype", dtype, "--against", "llama.cpp")
    assert bench(tmp_path, *kind, *options) == [{"llama_layers": 2, "llama.cpp": 2}] * 2
