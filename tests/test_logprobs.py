"""Log-probabilities of texts against float64's log-softmax, token by token."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers import forward, logprobs
from llama_layers.arrays.transfer import to_numpy
from llama_layers.model import logprobs as module
from llama_layers.testing import assert_same_bits
from tests.support import decoder_oracle
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights

COUNT = 7


def exact(weights, config, ids):
    """Each token after the first of one sequence, from naive loops."""
    logits = decoder_oracle.logits(weights, config, ids)
    return np.array(
        [
            np.log(decoder_oracle.softmax(row.tolist()))[t]
            for row, t in zip(logits[:-1], ids[1:], strict=True)
        ]
    )


@pytest.mark.parametrize("block", [None, 1, 2, 30])
@pytest.mark.parametrize("kind", ["gqa", "tied", "window"])
def test_like_naive_loops(kind, block, rng, monkeypatch):
    config = CONFIGS[kind]
    weights = random_weights(config)
    model = model_of(config, weights)
    ids = rng.integers(13, size=(2, COUNT))
    if block is not None:
        monkeypatch.setattr(module, "LOGITS", block * 2 * 13)
    found = logprobs(model, ids)
    assert found.shape == (2, COUNT - 1)
    assert found.dtype == np.float64
    for row, own in zip(found, ids, strict=True):
        np.testing.assert_allclose(row, exact(weights, config, own), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_on_every_library(backend, side, rng):
    weights = random_weights(GQA, dtype=np.float32)
    model = model_of(GQA, weights, backend.array)
    ids = rng.integers(13, size=(4, COUNT))
    lengths = np.array([[7], [4], [1], [0]])
    columns = np.arange(COUNT)
    keep = columns < lengths if side == "right" else columns >= COUNT - lengths
    found = logprobs(model, backend.array(ids), attention_mask=backend.array(keep.astype(np.int32)))
    assert backend.holds(found)
    found = to_numpy(found)
    assert found.dtype == np.float32
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    for row in range(4):
        valid = np.flatnonzero(keep[row])[1:] - 1
        assert (np.delete(found[row], valid) == 0).all()
        if valid.size:
            expected = exact(wide, GQA, ids[row][keep[row]])
            np.testing.assert_allclose(found[row, valid], expected, rtol=0, atol=1e-5)


def test_logits_far_apart_stay_finite():
    """Their exponentials overflow float32, and the probabilities of most underflow."""
    weights = random_weights(GQA, dtype=np.float32)
    weights["lm_head.weight"] *= 1000
    ids = np.array([[1, 2, 3, 4, 5, 6]])
    with np.errstate(over="ignore"):  # and not by a warning alone
        found = logprobs(model_of(GQA, weights), ids)
    logits = forward(model_of(GQA, weights), ids).logits.astype(np.longdouble)[0, :-1]
    assert logits.max() > 500
    shifted = logits - logits.max(axis=-1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    expected = expected[np.arange(5), ids[0, 1:]].astype(float)
    assert expected.min() < -104  # whose exponential is 0 in float32
    np.testing.assert_allclose(found[0], expected, rtol=1e-6, atol=1e-4)


def test_a_text_of_one_token_has_nothing_to_predict():
    model = model_of(GQA, random_weights(GQA))
    assert logprobs(model, np.array([[3], [4]])).shape == (2, 0)
    assert logprobs(model, np.zeros((0, 3), int)).shape == (0, 2)
    keep = np.ones((2, 1), bool)
    assert logprobs(model, np.array([[3], [4]]), attention_mask=keep).shape == (2, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_weights(dtype, rng):
    weights = random_weights(GQA, dtype=np.dtype(dtype))
    ids = rng.integers(13, size=(1, COUNT))
    found = logprobs(model_of(GQA, weights), ids)
    assert found.dtype == np.float32
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    np.testing.assert_allclose(found[0], exact(wide, GQA, ids[0]), rtol=0, atol=1e-5)


def test_a_mask_of_ones_changes_no_bit(rng):
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    ids = rng.integers(13, size=(2, COUNT))
    ones = np.ones(ids.shape, bool)
    assert_same_bits(logprobs(model, ids, attention_mask=ones), logprobs(model, ids))


@pytest.mark.parametrize(
    ("ids", "mask", "error", "message"),
    [
        (np.zeros((2, 0), int), None, ValueError, "input_ids: expected at least one token"),
        (np.array([1, 2]), None, ValueError, r"input_ids: expected shape \[B, S\], got \[2\]"),
        (np.array([[1, 13]]), None, ValueError, "input_ids: expected ids from 0 to 12"),
        (
            np.array([[1, 2, 3, 4]]),
            np.array([[1, 0, 1, 1]]),
            ValueError,
            "attention_mask: expected padding before or after the tokens of a sequence, not",
        ),
        (np.array([[1, 2]]), np.array([[1]]), ValueError, "attention_mask: expected shape"),
        (np.array([[1, 2]]), np.array([[1, 2]]), ValueError, "attention_mask: expected 0 and 1"),
    ],
)
def test_refuses(ids, mask, error, message):
    with pytest.raises(error, match=message):
        logprobs(model_of(GQA, random_weights(GQA)), ids, attention_mask=mask)


def test_the_name_of_a_model_is_not_a_model():
    with pytest.raises(TypeError, match="model: expected a Llama, as load gives it, got str"):
        logprobs("smollm2-135m", np.array([[1, 2]]))
