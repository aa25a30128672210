"""The formats that a check holds an array to: as the call says, the trace, or else the array."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers.verify import Trace, check, record
from tests.support.random_models import GQA, model_of, random_weights

NORM, SITE = "model.layers.1.input_layernorm", "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def model():
    config = replace(GQA, hidden_size=64)
    return model_of(config, random_weights(config, 0, np.float32))


def product(model, result=np.float32, sums=np.float32):
    """A product by itself, summed in a format one number at a time."""
    x = record(model, np.array([[3, 1, 4, 1, 5, 9]])).arrays[NORM].astype(result)
    weight = model.weights.layers[1].self_attn.qkv.q
    total = np.zeros((*x.shape[:2], len(weight)), sums)
    for i in range(x.shape[2]):
        total = (total + x[..., i, None].astype(np.float64) * weight[:, i]).astype(sums)
    return Trace({NORM: x, SITE: total.astype(result)})


def result_of(trace, model, metadata=None, **options):
    (_, result) = check(replace(trace, metadata=metadata or {}), model, **options).results
    assert result.site.name == SITE
    return result


@pytest.mark.parametrize("sums", [np.float16, ml_dtypes.bfloat16])
def test_sums_in_fewer_bits(model, sums):
    trace, name = product(model, sums=sums), np.dtype(sums).name
    assert result_of(trace, model).verdict == "FAIL"
    for said, options in (({}, {"accumulate": name}), ({"accumulate": name}, {})):
        result = result_of(trace, model, said, **options)
        assert (result.verdict, result.dtype, result.accumulate) == ("PASS", "float32", name)
    result = result_of(trace, model, {"accumulate": name}, accumulate="float32")
    assert (result.verdict, result.accumulate) == ("FAIL", "float32")


def test_sums_of_each_dtype_by_default(model):
    for dtype, sums in (
        (np.float16, "float32"),
        (ml_dtypes.bfloat16, "float32"),
        (np.float32, "float32"),
        (np.float64, "float64"),
    ):
        result = result_of(product(model, dtype, np.dtype(sums)), model)
        assert (result.verdict, result.accumulate) == ("PASS", sums)


def test_the_call_has_the_last_word(model):
    half = product(model, ml_dtypes.bfloat16)
    wide = Trace({name: array.astype(np.float32) for name, array in half.arrays.items()})
    for said, given, expected in (
        (None, None, "float32"),
        ("bfloat16", None, "bfloat16"),
        (None, "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ):
        metadata = {} if said is None else {"dtype": said}
        result = result_of(wide, model, metadata, dtype=given)
        assert result.dtype == expected
        assert result.verdict == ("FAIL" if expected == "float32" else "PASS")


def test_an_array_has_no_more_bits_than_its_dtype(model):
    """Engines that compute in float32 hand on some arrays in bfloat16."""
    half = product(model, ml_dtypes.bfloat16)
    logits = record(model, np.array([[3, 1, 4, 1, 5, 9]])).arrays["lm_head"]
    both = replace(half, arrays={**half.arrays, "lm_head": logits})
    for metadata, dtype in (({"dtype": "float32"}, None), ({}, "float32")):
        _, result, last = check(replace(both, metadata=metadata), model, dtype=dtype).results
        assert (result.site.name, last.site.name) == (SITE, "lm_head")
        assert (result.verdict, result.dtype) == ("PASS", "bfloat16")
        assert last.dtype == "float32"
