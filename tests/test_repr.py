"""Objects that hold arrays, as they are shown: dtypes, shapes and sizes, and no numbers."""

from __future__ import annotations

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest

from llama_layers import (
    KVCache,
    LayerCache,
    Mask,
    check,
    compare,
    forward,
    load,
    qkv_projection,
    record,
)
from llama_layers.model.inputs import Inputs
from llama_layers.verify import Trace, rms_norm_bound
from tests.support import made_reports, tiny
from tests.support.random_models import model_of

IDS = np.array([[3, 1, 39, 12]])
CONFIG = replace(tiny.CONFIG, num_hidden_layers=50, attention_bias=True)
NUMBER = 7.625  # which all arrays hold


def sevens(config=CONFIG, dtype=np.float32):
    shapes = {name: a.shape for name, a in tiny.arrays(config).items()}
    return {name: np.full(shape, NUMBER, dtype) for name, shape in shapes.items()}


MODEL = model_of(CONFIG, sevens())
TRACE = Trace(
    {f"model.layers.{i}": np.full((1, 4, 32), NUMBER, np.float32) for i in range(50)}, IDS
)
LAYER = MODEL.weights.layers[0]
REPORT, COMPARISON = made_reports.report(), compare(TRACE, TRACE)
X = np.full((1, 4, 32), NUMBER, np.float32)


@pytest.mark.parametrize(
    "thing",
    [
        MODEL, MODEL.weights, LAYER, LAYER.self_attn, LAYER.self_attn.qkv, LAYER.mlp,
        KVCache.create(MODEL, 2, 16), LayerCache(KVCache.create(MODEL, 2, 16), 3),
        forward(MODEL, IDS, cache=KVCache.create(MODEL, 1, 8)),
        qkv_projection(X, LAYER.self_attn.qkv), Mask(IDS[0], IDS[0], keep=IDS > 3),
        Inputs.of(X, CONFIG, attention_mask=IDS < 39), rms_norm_bound(X, X[0, 0], eps=1e-5), TRACE,
        REPORT, REPORT.results[0], COMPARISON, COMPARISON.results[0],
    ],
    ids=lambda thing: type(thing).__name__,
)  # fmt: skip
def test_short_and_without_numbers(thing):
    said = repr(thing)
    assert len(said) < 500
    assert said.startswith(type(thing).__name__) or isinstance(thing, LayerCache)
    assert str(NUMBER) not in said


def test_dtypes_and_shapes():
    assert repr(LAYER.self_attn.qkv) == (
        "QKVWeights(fused=float32[64, 32], num_heads=4, num_kv_heads=2, bias=float32[64])"
    )
    assert repr(LAYER.mlp) == (
        "MLPWeights(gate_proj=float32[48, 32], up_proj=float32[48, 32], down_proj=float32[32, 48])"
    )
    assert repr(MODEL.weights) == (
        "LlamaWeights(50 layers, embed_tokens=float32[40, 32], norm=float32[32], "
        "lm_head=float32[40, 32])"
    )
    # 2 x 2 x 16 x 2 x 8 numbers of 4 bytes in each of 50 layers
    assert repr(KVCache.create(CONFIG, 2, 16)) == (
        "KVCache(keys=50 x float32[2, 16, 2, 8], values=50 x float32[2, 16, 2, 8], length=0, "
        "max_len=16, first=0, room=0, 0.205 MB)"
    )
    assert repr(Mask(IDS[0], IDS[0, :3], 2)) == "Mask(queries=int64[4], keys=int64[3], window=2)"
    strict = KVCache.create(CONFIG, 2, 16, like=array_api_strict.zeros(1))
    assert "float64[2, 16, 2, 8]" in repr(strict)


def test_a_model_says_how_large_it_is():
    numbers = sum(array.size for array in sevens().values())
    assert repr(MODEL).startswith(
        f"Llama(llama: 50 layers, hidden size 32, vocabulary 40, {numbers:,} parameters, "
    )


def test_nothing_is_read_to_be_shown(tmp_path):
    model = load(tiny.write_single(tmp_path / "model", tiny.arrays()))
    assert "embed_tokens=not read yet" in repr(model)
    assert repr(model.weights.layers) == "2 layers, 0 of them read"
    _ = model.weights.embed_tokens, model.weights.layers[1]
    assert repr(model.weights).startswith(
        "LlamaWeights(2 layers, embed_tokens=float32[40, 32], norm=not"
    )
    assert repr(model.weights.layers) == "2 layers, 1 of them read"


def test_a_report_says_its_verdict():
    model = model_of(tiny.CONFIG, tiny.arrays())
    trace = record(model, IDS)
    assert repr(check(trace, model)).startswith("Report(PASS: ")
    wrong = Trace(dict(trace.arrays) | {"lm_head": -trace.arrays["lm_head"]}, IDS)
    assert repr(check(wrong, model)).startswith("Report(FAIL: first at lm_head: error ")
    assert repr(compare(trace, wrong)).startswith("Comparison(DIVERGE: first at lm_head: ")
