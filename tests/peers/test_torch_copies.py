"""Deep copies and pickles of models and caches of torch: what was changed in place stays."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from llama_layers import KVCache, Llama, LlamaWeights, forward, load
from llama_layers.arrays.transfer import to_numpy
from tests.support import tiny

pytestmark = pytest.mark.peer

IDS = torch.tensor([[3, 1, 39, 12]])


def pickled(value):
    return pickle.loads(pickle.dumps(value))


WAYS = {"pickle": pickled, "deepcopy": copy.deepcopy}
UP = "model.layers.1.mlp.up_proj.weight"
Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture
def path(tmp_path):
    return tiny.write_single(tmp_path / "model", tiny.arrays())


def assert_holds(weights, expected):
    found = weights.named()
    for name, array in expected.items():
        assert np.array_equal(to_numpy(found[name]), array), name


@pytest.mark.parametrize("way", WAYS)
def test_changes_in_place_are_kept(way, path):
    model = load(path, backend=torch)
    up = model.weights.layers[1].mlp.up_proj.requires_grad_()
    with torch.no_grad():
        up.add_(1)
        model.weights.layers[0].self_attn.qkv.q.mul_(2)
    model.weights.norm.data.mul_(3)  # which no version of the tensor counts
    expected = tiny.arrays()
    expected = expected | {UP: expected[UP] + 1, Q: 2 * expected[Q], NORM: 3 * expected[NORM]}
    ones = np.ones(32, np.float32)
    other = replace(model, weights=replace(model.weights, norm=torch.asarray(ones)))
    found, replaced = WAYS[way](model), WAYS[way](other)
    assert found.weights.layers[1].mlp.up_proj.requires_grad
    found.weights.embed_tokens.zero_()
    replaced.weights.layers[0].self_attn.qkv.fused.zero_()
    assert_holds(model.weights, expected)
    assert_holds(WAYS[way](model).weights, expected)
    assert_holds(WAYS[way](other).weights, expected | {NORM: ones})


@pytest.mark.parametrize("way", WAYS)
def test_arrays_never_read_come_from_the_file(way, path):
    model = load(path, backend=torch)
    model.weights.norm.zero_()
    assert len(pickle.dumps(model)) < 4000
    found = WAYS[way](model)
    assert "embed_tokens" not in vars(found.weights)
    assert "0 of them read" in repr(found.weights.layers)
    assert_holds(found.weights, tiny.arrays() | {NORM: np.zeros(32)})


def test_a_tied_head_stays_the_embedding(tmp_path):
    weights = tiny.arrays(tiny.TIED)
    model = load(tiny.write_single(tmp_path / "model", weights, tiny.TIED), backend=torch)
    model.weights.lm_head.zero_()
    for found in (pickled(model), copy.deepcopy(model)):
        assert found.weights.lm_head is found.weights.embed_tokens
        assert not found.weights.lm_head.any()


def parameters():
    return {n: torch.nn.Parameter(torch.asarray(a)) for n, a in tiny.arrays().items()}


@pytest.mark.parametrize("source", ["state dict", "named"])
def test_models_with_gradients(source):
    """Parameters stay parameters; queries, keys and values were computed of them."""
    if source == "state dict":
        model = Llama.from_state_dict(parameters(), tiny.CONFIG)
    else:
        model = Llama(tiny.CONFIG, LlamaWeights.from_named(parameters(), tiny.CONFIG))
    logits, cache = forward(model, IDS, cache=KVCache.create(model, 1, 9))
    found, continued = copy.deepcopy(model), copy.deepcopy(cache)
    assert torch.equal(forward(found, IDS).logits, logits)
    assert isinstance(found.weights.norm, torch.nn.Parameter)
    assert found.weights.norm is not model.weights.norm
    fused = found.weights.layers[0].self_attn.qkv.fused
    assert fused.is_leaf
    assert not fused.requires_grad
    assert not continued.keys[0].requires_grad
    expected = forward(model, IDS[:, :1], cache=cache).logits
    assert torch.equal(forward(found, IDS[:, :1], cache=continued).logits, expected)
