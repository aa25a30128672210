"""What llama.cpp computes, recorded and checked: ``pytest tests/peers/test_llama_cpp.py``.

No part of .ci/run: llama-cpp-python is compiled where it is installed, which takes ten minutes.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from llama_layers import load
from llama_layers.checkpoint import load_tokenizer
from llama_layers.verify import Trace, check
from llama_layers.verify.recorders import record_llama_cpp
from tests.support import tiny
from tests.support.gguf_files import NO_TOKENIZER
from tests.support.texts import random_texts

pytestmark = pytest.mark.llama_cpp
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def logits_of(file, row):
    """Of each token, through llama-cpp-python's own interface."""
    options = {"type_k": llama_cpp.GGML_TYPE_F16, "type_v": llama_cpp.GGML_TYPE_F16}
    model = llama_cpp.Llama(
        str(file), n_ctx=len(row), n_batch=len(row), logits_all=True, verbose=False, **options
    )
    model.eval([int(token) for token in row])
    return model.scores[: len(row)].copy()


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.TIED, tiny.QWEN2, tiny.BIASED])
def test_tiny(tmp_path, config, count):
    file = tiny.write_gguf(
        tmp_path / "m.gguf",
        tiny.arrays(config),
        config,
        architecture=config.model_type,
        metadata=NO_TOKENIZER,
    )
    ids = np.random.default_rng(3).integers(0, config.vocab_size, (2, count))
    trace = record_llama_cpp(file, ids)
    for row, logits in zip(ids, trace.arrays["lm_head"], strict=True):
        assert np.array_equal(logits, logits_of(file, row))
    trace.save(tmp_path / "port.safetensors")
    report = check(Trace.load(tmp_path / "port.safetensors"), load(file), profile="llama.cpp")
    assert Counter(result.verdict for result in report.results) == {"PASS": len(trace.arrays)}
    assert report.missing == ()


@pytest.fixture(scope="module")
def smollm2_in_float32(smollm2, tmp_path_factory):
    """SmolLM2 as a GGUF file of float32 numbers."""
    model = load(smollm2, dtype="float32")
    file = tmp_path_factory.mktemp("f32") / "smollm2.gguf"
    tiny.write_gguf(file, tiny.all_arrays(model), model.config, metadata=NO_TOKENIZER)
    return file, model


@pytest.mark.parametrize("kv_cache", ["float16", "float32"])
@pytest.mark.parametrize("flash_attention", [False, True])
def test_smollm2(smollm2_in_float32, kv_cache, flash_attention):
    """Nothing is wrong, and what is rounded on purpose has its name."""
    file, model = smollm2_in_float32
    ids = np.random.default_rng(4).integers(0, model.config.vocab_size, (1, 64))
    trace = record_llama_cpp(file, ids, kv_cache=kv_cache, flash_attention=flash_attention)
    profile = "llama.cpp" if kv_cache == "float16" else "float32 phases"
    if flash_attention:  # reads float16, whatever the cache
        profile = "llama.cpp with flash attention"
    report = check(trace, model, profile=profile)
    assert Counter(result.verdict for result in report.results) == {"PASS": 453}
    plain = check(trace, model)
    assert {result.verdict for result in plain.results} == {"PASS"}  # the trace names the engine
    noted = {r.site.role.removeprefix("self_attn.") for r in plain.results if r.profile}
    rounded = {"attention"} if kv_cache == "float16" or flash_attention else set()
    assert noted == {"q_rope", "k_rope"} | rounded


def test_tokens(vocab):
    """Of llama.cpp's own vocabularies: ``--vocab DIR``."""
    for file in sorted(vocab.glob("*.gguf")):
        reference = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
        tokenizer = load_tokenizer(file)
        for text in random_texts(2000):
            ids = reference.tokenize(text.encode(), add_bos=True, special=True)
            assert tokenizer.encode(text) == ids, (file.name, text)
