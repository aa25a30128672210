"""Vectors instead of token ids."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest

from llama_layers import KVCache, embed, forward
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import assert_same_bits
from tests.support import decoder_oracle
from tests.support.random_models import GQA, model_of, random_weights
from tests.test_forward import FLOAT32, assert_close

IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])


def test_embeddings_of_ids_are_the_ids(backend):
    model = model_of(GQA, random_weights(GQA, dtype=np.float32), backend.array)
    ids = backend.array(IDS)
    vectors = embed(ids, model.weights.embed_tokens)
    mask = backend.array(np.array([[0, 1, 1, 1], [1, 1, 1, 1]]))
    expected = forward(model, ids, attention_mask=mask).logits
    logits = forward(model, inputs_embeds=vectors, attention_mask=mask).logits
    assert backend.holds(logits)
    assert_same_bits(logits, expected)
    cache = KVCache.create(model, 2, 4)
    parts = []
    for part in (slice(0, 3), slice(3, 4)):
        output = forward(model, inputs_embeds=vectors[:, part, :], cache=cache)
        cache = output.cache
        parts.append(to_numpy(output.logits))
    whole = to_numpy(forward(model, ids).logits)
    assert_close(np.concatenate(parts, axis=1), whole, FLOAT32)


def test_any_vectors(rng):
    weights = random_weights(GQA)
    model = model_of(GQA, weights)
    vectors = rng.standard_normal((1, 5, 10))
    before = vectors.copy()
    seen = []
    tap = {"embed_tokens": lambda name, array: seen.append(array) or array}
    logits = forward(model, inputs_embeds=vectors, tap=tap).logits
    table = weights | {"model.embed_tokens.weight": vectors[0]}
    assert_close(logits[0], decoder_oracle.logits(table, GQA, range(5)))
    assert_same_bits(seen[0], vectors)
    assert_same_bits(vectors, before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_is_that_of_the_activations(dtype, rng):
    model = model_of(GQA, random_weights(GQA, dtype=np.dtype(dtype)))
    vectors = rng.standard_normal((1, 5, 10), np.float32)
    assert forward(model, inputs_embeds=vectors).logits.dtype == np.float32
    with pytest.raises(TypeError, match=f"dtype of the activations, float32, got {dtype}"):
        forward(model, inputs_embeds=vectors.astype(dtype))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, TypeError, "input_ids: expected token ids, or inputs_embeds, got neither"),
        (
            (IDS,),
            {"inputs_embeds": np.zeros((2, 4, 10), np.float32)},
            TypeError,
            "inputs_embeds: expected None together with input_ids, got both",
        ),
        (
            (),
            {"inputs_embeds": np.zeros((2, 4, 9), np.float32)},
            ValueError,
            r"inputs_embeds: expected shape \[B, S, 10\], got \[2, 4, 9\]",
        ),
        ((), {"inputs_embeds": np.zeros((4, 10), np.float32)}, ValueError, r"got \[4, 10\]"),
        ((), {"inputs_embeds": IDS[..., None]}, TypeError, "inputs_embeds: .* got int64"),
        ((), {"inputs_embeds": np.zeros((2, 4, 10))}, TypeError, "float32, got float64"),
        (
            (),
            {"inputs_embeds": array_api_strict.zeros((2, 4, 10))},
            TypeError,
            "inputs_embeds: expected an array of the same library as weights",
        ),
    ],
)
def test_refuses(arguments, options, error, message):
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    with pytest.raises(error, match=message):
        forward(model, *arguments, **options)
