"""Layers on arrays of dask, whose parts may be on many machines: the definitions run unchanged."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers import Llama, forward, generate, load
from tests.support import decoder_oracle, tiny
from tests.support.random_models import CONFIGS, GQA, random_weights, run_in_chunks

dask = pytest.importorskip("dask.array")
pytestmark = pytest.mark.peer

CHUNK = 5  # which divides no axis of a model: every product meets several


def chunked(array):
    return dask.from_array(array, chunks=CHUNK)


def model_on_dask(config, weights):
    return Llama.from_state_dict({n: chunked(w) for n, w in weights.items()}, config)


@pytest.mark.parametrize("kind", ["biases", "qwen2", "some windows", "yarn"])
def test_logits_are_those_of_naive_loops(kind):
    config = CONFIGS[kind]
    weights = random_weights(config)
    ids = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    logits = forward(model_on_dask(config, weights), chunked(ids)).logits
    assert isinstance(logits, dask.Array)  # nothing is computed before somebody asks
    for found, row in zip(logits.compute(), ids, strict=True):
        expected = decoder_oracle.logits(weights, config, row)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_cache():
    weights = random_weights(GQA)
    model = model_on_dask(GQA, weights)
    ids = np.array([[1, 2, 3, 4, 5, 6]])
    found = run_in_chunks(model, ids, [2, 3, 5], array=chunked)
    expected = decoder_oracle.logits(weights, GQA, ids[0])
    np.testing.assert_allclose(found[0], expected, rtol=1e-9, atol=1e-9)


def test_tokens_of_a_loaded_model(tmp_path):
    path = tiny.write_single(tmp_path, random_weights(GQA, dtype=np.float32), GQA)
    ids = np.array([[1, 2, 3]])
    options = {"max_new_tokens": 4, "eos_token_id": ()}
    expected = [step.tolist() for step in generate(load(path), ids, **options)]
    steps = generate(load(path, backend=dask), chunked(ids), **options)
    assert [np.asarray(step).tolist() for step in steps] == expected
