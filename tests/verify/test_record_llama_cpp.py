"""Traces of llama.cpp, behind a stand-in."""

from __future__ import annotations

import ctypes
import json
import sys

import numpy as np
import pytest

from llama_layers.layers.sites import sites
from llama_layers.verify.recorders import record_llama_cpp
from tests.support import tiny
from tests.support.llama_cpp_stand_in import Llama, Tensor, graph_of


@pytest.fixture
def llama(monkeypatch):
    def install(graph, **options):
        stand_in = Llama(graph, **options)
        monkeypatch.setitem(sys.modules, "llama_cpp", stand_in.module)
        monkeypatch.setitem(sys.modules, "llama_cpp._ggml", stand_in.ggml)
        monkeypatch.setattr("llama_layers.verify.recorders.llama_cpp.version", lambda _: "0.0")
        return stand_in

    return install


def drawn(config, count):
    """Random numbers in place of each site, two sequences."""
    rng, sizes = np.random.default_rng(5), {"B": 2, "S": count}
    return {
        site.name: rng.standard_normal([sizes.get(n, n) for n in site.shape]).astype(np.float32)
        for site in sites(config)
        if not site.optional
    }


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.QWEN2, tiny.BIASED])
def test_sites(tmp_path, llama, config):
    file = tiny.write_gguf(
        tmp_path / "m.gguf", tiny.arrays(config), config, architecture=config.model_type
    )
    arrays = drawn(config, 3)
    permuted = config.model_type == "llama"
    stand_in = llama(
        lambda tokens: graph_of(arrays, config, tokens, permuted),
        rope_type=0 if permuted else 2,
    )
    ids = [[0, 5, 7], [1, 5, 9]]
    trace = record_llama_cpp(file, ids)
    assert trace.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(trace.arrays[name], array), name
    assert np.array_equal(trace.input_ids, ids)
    said = json.loads(trace.metadata["config"])
    assert said["num_attention_heads"] == config.num_attention_heads
    assert said["model_type"] == config.model_type
    assert trace.metadata["kv_cache"] == "float16"
    assert stand_in.open == []
    params = stand_in.contexts[0]
    assert (params.n_ctx, params.n_ubatch, params.type_k, params.type_v) == (3, 3, 1, 1)
    assert params.flash_attn_type == 0


def test_options(tmp_path, llama):
    file = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays())
    arrays = drawn(tiny.CONFIG, 1)
    stand_in = llama(lambda tokens: graph_of(arrays, tiny.CONFIG, tokens, True))
    trace = record_llama_cpp(file, [[1]], kv_cache="float32", flash_attention=True)
    params = stand_in.contexts[0]
    assert (params.type_k, params.type_v, params.flash_attn_type) == (0, 0, 1)
    assert trace.metadata["kv_cache"] == "float32"
    assert trace.metadata["flash_attention"] == "yes"
    assert trace.arrays["lm_head"].shape == (1, 1, tiny.CONFIG.vocab_size)


def changed_graph(change):
    arrays = drawn(tiny.CONFIG, 3)
    return lambda tokens: change(list(graph_of(arrays, tiny.CONFIG, tokens, True)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda graph: [t for t in graph if t.name != b"ffn_swiglu-1"],
            "model.layers.1.mlp.act: llama.cpp showed no tensor of its name",
        ),
        (
            lambda graph: [*graph, Tensor("l_out-1", np.ones((2, 32), np.float32))],
            "model.layers.1: expected shape [1, 3, 32], got [1, 1, 2, 32]",
        ),
        (
            lambda graph: [Tensor("embd", np.ones((3, 32), np.int32)), *graph],
            "m.gguf: embd: expected floats, got ggml_type 26",
        ),
    ],
)
def test_refused_graphs(tmp_path, llama, change, message):
    file = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays())
    stand_in = llama(changed_graph(change))
    with pytest.raises(RuntimeError) as error:
        record_llama_cpp(file, [[0, 1, 2]])
    assert message in str(error.value)
    assert stand_in.open == []


def test_refused_structures(tmp_path, llama):
    """A version of ggml_tensor with other fields is noticed."""
    file = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays())
    tensor = Tensor("embd", np.ones((3, 32), np.float32))
    ctypes.memset(tensor.address + 16, 1, 1)  # the size of its first axis
    llama(lambda _: [tensor])
    with pytest.raises(RuntimeError, match="embd: struct ggml_tensor is not the one that is"):
        record_llama_cpp(file, [[0, 1, 2]])


def test_failures(tmp_path, llama):
    file = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays())
    stand_in = llama(changed_graph(lambda graph: graph), status=1)
    with pytest.raises(RuntimeError, match=r"m\.gguf: llama_decode: expected 0, got 1"):
        record_llama_cpp(file, [[0, 1, 2]])
    assert stand_in.open == []
    llama(changed_graph(lambda graph: graph), rope_type=-1)
    with pytest.raises(RuntimeError, match=r"m\.gguf: expected RoPE that rotates pairs"):
        record_llama_cpp(file, [[0, 1, 2]])
    llama(None)
    with pytest.raises(RuntimeError, match=r"m\.gguf: llama\.cpp cannot load it"):
        record_llama_cpp(file, [[0, 1, 2]])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([1, 2], {}, r"input_ids: expected integers in shape \[B, S\], got int64 in \[2\]"),
        ([[1.0]], {}, r"input_ids: expected integers in shape \[B, S\], got float64"),
        ([[]], {}, "input_ids: expected integers"),
        ([[40]], {}, "input_ids: expected ids from 0 to 39, got 40 to 40"),
        ([[1]], {"kv_cache": "q8_0"}, "kv_cache: expected 'float16' or 'float32', got 'q8_0'"),
    ],
)
def test_arguments(tmp_path, llama, ids, options, message):
    llama(changed_graph(lambda graph: graph))
    file = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays())
    with pytest.raises(ValueError, match=message):
        record_llama_cpp(file, ids, **options)


def test_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    file = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays())
    with pytest.raises(ImportError, match="pip install llama-cpp-python"):
        record_llama_cpp(file, [[1]])
