"""Each architecture of GGUF in llama.cpp: ``pytest tests/peers/test_llama_cpp_families.py``.

No part of .ci/run, as test_llama_cpp.py.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from llama_layers import forward, load
from llama_layers.verify import check
from llama_layers.verify.recorders import record_llama_cpp
from tests.support import gguf_families
from tests.support.gguf_families import CASES
from tests.support.gguf_files import NO_TOKENIZER

pytestmark = pytest.mark.llama_cpp
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

# Past every window and every trained context but 512.
TOKENS = 40
VOCABULARY = gguf_families.PLAIN.vocab_size
GELU = "gelu_pytorch_tanh"


@pytest.fixture
def ids(rng):
    return rng.integers(0, VOCABULARY, TOKENS)


def logits_of(file, ids):
    """Of each token, through llama-cpp-python's own interface, with a cache that rounds nothing."""
    options = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(
        str(file), n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False, **options
    )
    model.eval(ids.tolist())
    return model.scores[: len(ids)].copy()


def in_float16(name, array):
    return array.astype(np.float16).astype(array.dtype)


# On CPUs llama.cpp reads gelu from a table: it rounds the gate and the result to float16.
TABLE = {"*.mlp.gate_proj": in_float16, "*.mlp.act": in_float16}


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, ids, case):
    """llama.cpp's error against float64 is at most 4 times ours, or 4 ulps of the largest logit."""
    file = gguf_families.write(tmp_path / "m.gguf", case, NO_TOKENIZER)
    exact_model = load(file, dtype="float64")
    exact = forward(exact_model, ids[None]).logits[0]
    error = np.abs(forward(load(file), ids[None]).logits[0] - exact).max()
    if exact_model.config.hidden_act == GELU:
        by_table = forward(exact_model, ids[None], tap=TABLE).logits[0]
        error += np.abs(by_table - exact).max()
    ulps = np.spacing(np.abs(exact).max().astype(np.float32))
    assert np.abs(logits_of(file, ids) - exact).max() <= 4 * (error + ulps)


@pytest.mark.parametrize("case", CASES)
def test_every_site_passes(tmp_path, ids, case):
    """With a cache that rounds nothing, and with llama.cpp's own."""
    file = gguf_families.write(tmp_path / "m.gguf", case, NO_TOKENIZER)
    model = load(file)
    gelu = {"mlp.act"} if model.config.hidden_act == GELU else set()
    for kv_cache, rounded in (("float32", set()), ("float16", {"self_attn.attention"})):
        trace = record_llama_cpp(file, ids[None, :20], kv_cache=kv_cache)
        report = check(trace, model)
        assert Counter(result.verdict for result in report.results) == {"PASS": len(trace.arrays)}
        assert report.missing == ()
        noted = {result.site.role for result in report.results if result.profile}
        assert noted - {"self_attn.q_rope", "self_attn.k_rope"} == gelu | rounded
