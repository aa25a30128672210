"""Transforms of torch.func, against autograd, and ids of every integer dtype of torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llama_layers import KVCache, embed, forward, generate, logprobs, rope_table
from tests.support.random_models import CONFIGS, model_of, random_weights

pytestmark = pytest.mark.peer

CONFIG = replace(CONFIGS["gqa"], num_hidden_layers=1)
MODEL = model_of(CONFIG, random_weights(CONFIG), torch.asarray)
IDS = torch.tensor([[3, 1, 12, 0]])
X = MODEL.weights.embed_tokens[IDS]
DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


def logits(x):
    return forward(MODEL, inputs_embeds=x, last_only=True).logits


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch itself
def test_transforms():
    expected = torch.autograd.functional.jacobian(logits, X)
    along = torch.ones_like(X)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(logits)(X), expected)
    grad = torch.func.grad(lambda x: logits(x).sum())(X)
    torch.testing.assert_close(grad, expected.sum(dim=(0, 1, 2)))
    value, slope = torch.func.jvp(logits, (X,), (along,))
    assert torch.equal(value, logits(X))
    torch.testing.assert_close(slope, expected.sum(dim=(3, 4, 5)))


def test_tables_in_transforms_are_bit_for_bit_those_outside():
    def table(x):
        cos, sin = rope_table(torch.arange(4), CONFIG, like=x)
        return cos.sum() * x.sum(), (cos, sin)

    inner = torch.func.grad(table, has_aux=True)
    found = torch.func.grad(lambda x: (lambda s, a: (s.sum(), a))(*inner(x)), has_aux=True)(X)[1]
    for one, other in zip(found, table(X)[1], strict=True):
        assert torch.equal(one, other)


def test_negative_positions_are_refused_in_transforms():
    def table(x):
        return rope_table(torch.arange(-1, 3), CONFIG, like=x)[0].sum() * x.sum()

    with pytest.raises(ValueError, match="positions: expected zero or more, got -1"):
        torch.func.grad(table)(X)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_of_every_dtype(dtype):
    ids = IDS.to(getattr(torch, dtype))
    assert torch.equal(forward(MODEL, ids).logits, forward(MODEL, IDS).logits)
    assert torch.equal(logprobs(MODEL, ids), logprobs(MODEL, IDS))
    found = [
        [int(drawn) for drawn in generate(MODEL, given, max_new_tokens=3, repetition_penalty=1.5)]
        for given in (ids, IDS)
    ]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="input_ids: expected ids from 0 to 1, got 0 to 12"):
        embed(ids, X[0, :2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_dtype(dtype):
    cache = forward(MODEL, IDS.reshape(2, 2), cache=KVCache.create(MODEL, 2, 4)).cache
    taken = cache.take(torch.tensor([1, 0]).to(getattr(torch, dtype)))
    assert torch.equal(taken.keys[0], cache.keys[0].flip(0))
    least = torch.iinfo(getattr(torch, dtype)).min or torch.iinfo(getattr(torch, dtype)).max
    with pytest.raises(ValueError, match=f"rows: .* from -2 to 1, got {min(0, least)} to"):
        cache.take(torch.asarray(np.array([0, least], dtype)))
