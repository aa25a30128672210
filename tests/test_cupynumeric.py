"""Layers on cuPyNumeric's arrays, or on what has the same names and lacks the same ones."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers import KVCache, Llama, forward, generate, load
from tests.support import cupynumeric_stand_in, decoder_oracle, tiny
from tests.support.random_models import CONFIGS, GQA, random_weights, run_in_chunks

try:  # the real one, where it is
    import cupynumeric
except ImportError:
    cupynumeric = cupynumeric_stand_in.module


def placed(array):
    return cupynumeric.array(np.asarray(array))


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_naive_loops(kind):
    config = CONFIGS[kind]
    weights = random_weights(config)
    ids = np.array([[1, 2, 3, 4]])
    model = Llama.from_state_dict({n: placed(w) for n, w in weights.items()}, config)
    logits = forward(model, placed(ids)).logits
    assert type(logits) is type(placed(ids))
    expected = decoder_oracle.logits(weights, config, ids[0])
    close(logits[0], expected)
    close(run_in_chunks(model, ids, [2, 3], array=placed)[0], expected)


def test_padding():
    weights = random_weights(GQA)
    model = Llama.from_state_dict({n: placed(w) for n, w in weights.items()}, GQA)
    ids = np.array([[0, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]])
    keep = np.array([[False, False, True, True, True, True], [True] * 6])
    found = run_in_chunks(model, ids, [3, 5], keep=keep, array=placed)
    close(found[0, 2:], decoder_oracle.logits(weights, GQA, ids[0, 2:]))
    close(found[1], decoder_oracle.logits(weights, GQA, ids[1]))


def test_a_copy_of_a_cache():
    weights = random_weights(GQA)
    model = Llama.from_state_dict({n: placed(w) for n, w in weights.items()}, GQA)
    cache = forward(model, placed([[1, 2]]), cache=KVCache.create(model, 1, 4)).cache
    copy = cache.copy()
    before = np.asarray(copy.keys[0]).copy()
    forward(model, placed([[3]]), cache=cache)
    np.testing.assert_array_equal(np.asarray(copy.keys[0]), before)
    found = forward(model, placed([[4]]), cache=copy).logits
    close(found[0], decoder_oracle.logits(weights, GQA, np.array([1, 2, 4]))[-1:])


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_tokens_of_a_loaded_model(tmp_path, temperature):
    path = tiny.write_single(tmp_path, random_weights(GQA, dtype=np.float32), GQA)
    ids = np.array([[1, 2, 3]])
    options = {"max_new_tokens": 4, "eos_token_id": (), "temperature": temperature, "rng": 0}
    expected = [step.tolist() for step in generate(load(path), ids, **options)]
    steps = generate(load(path, backend=cupynumeric), placed(ids), **options)
    assert [np.asarray(step).tolist() for step in steps] == expected


def test_bfloat16_is_refused(tmp_path):
    path = tiny.write_single(tmp_path, random_weights(GQA, dtype=np.float32), GQA)
    with pytest.raises(TypeError, match="bfloat16"):
        _ = load(path, backend=cupynumeric, dtype="bfloat16").weights.norm
