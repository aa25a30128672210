"""Gradients of torch through every function, to activations and weights, against differences."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from llama_layers import (
    AttentionWeights,
    KVCache,
    LayerWeights,
    Llama,
    LlamaWeights,
    Mask,
    MLPWeights,
    QKVWeights,
    apply_rope,
    attention,
    decoder_layer,
    embed,
    forward,
    generate,
    linear,
    mlp,
    qkv_projection,
    rms_norm,
    rope_table,
    swiglu,
)
from tests.support.random_models import CONFIGS, random_weights

pytestmark = pytest.mark.peer

CONFIG = replace(CONFIGS["mqa"], num_hidden_layers=1)
IDS = torch.tensor([[3, 1, 12, 0, 7], [5, 5, 2, 9, 11]])
PLACES = torch.arange(3)
ROPE = rope_table(PLACES, CONFIG, like=torch.zeros(0, dtype=torch.float64))


def layer(x: Any, norm: Any, qkv: Any, o: Any, up: Any, down: Any) -> Any:
    w = LayerWeights(
        norm, AttentionWeights(QKVWeights(qkv, 2, 1), o), 2 * norm, MLPWeights(up, 2 * up, down)
    )
    return decoder_layer(x, w, config=CONFIG, rope=ROPE, mask=Mask(PLACES, PLACES))


# Functions, with the shapes of what they have a gradient for.
FUNCTIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "embed": (partial(embed, torch.tensor([[0, 2, 2]])), [(3, 4)]),
    "rms_norm": (partial(rms_norm, eps=1e-2), [(2, 3, 4), (4,)]),
    "linear": (linear, [(2, 3), (4, 3), (4,)]),
    "qkv_projection": (
        lambda x, q, k, v, *b: qkv_projection(
            x, QKVWeights.from_separate(q, k, v, num_heads=2, num_kv_heads=1, biases=b)
        ),
        [(1, 2, 3), (4, 3), (2, 3), (2, 3), (4,), (2,), (2,)],
    ),
    "rope": (lambda x: apply_rope(x, *ROPE), [(1, 3, 2, 4)]),
    "attention": (
        partial(attention, mask=torch.tensor([[True, False], [False, False], [True, True]])),
        [(1, 3, 4, 2), (1, 2, 2, 2), (1, 2, 2, 2)],
    ),
    "swiglu": (swiglu, [(2, 3), (2, 3)]),
    "mlp": (
        lambda x, *w: mlp(x, MLPWeights(*w)),
        [(2, 3), (4, 3), (4, 3), (3, 4), (4,), (4,), (3,)],
    ),
    "decoder_layer": (layer, [(1, 3, 6), (6,), (16, 6), (6, 8), (5, 6), (6, 5)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function, shapes = FUNCTIONS[name]
    draw = np.random.default_rng(7).standard_normal
    arrays = [torch.asarray(draw(shape)).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(function, arrays)
    assert torch.autograd.gradcheck(function, arrays, check_batched_grad=True, fast_mode=True)


WAYS = {
    "from_state_dict": lambda arrays: Llama.from_state_dict(arrays, CONFIG),
    "from_named": lambda arrays: Llama(CONFIG, LlamaWeights.from_named(arrays, CONFIG)),
}


def on_torch(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.asarray(array) for name, array in arrays.items()}


def parameters() -> dict[str, Any]:
    return {n: tensor.requires_grad_() for n, tensor in on_torch(random_weights(CONFIG)).items()}


def in_steps(model: Llama, *sizes: int) -> Any:
    """The logits through a cache, whose buffers a later step must not change for an earlier one."""
    cache, parts = KVCache.create(model, 1, 5), []
    for part in torch.split(IDS[:1], sizes, dim=1):
        logits, cache = forward(model, part, cache=cache)
        parts.append(logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    ("way", "steps"), [("from_state_dict", ()), ("from_named", ()), ("from_named", (2, 1, 2))]
)
def test_whole_models(way, steps):
    """With one head of keys: torch then keeps the buffer of a cache itself, not a copy."""
    named = parameters()

    def logits(*arrays: Any) -> Any:
        model = WAYS[way](dict(zip(named, arrays, strict=True)))
        return in_steps(model, *steps) if steps else forward(model, IDS).logits

    assert torch.autograd.gradcheck(logits, list(named.values()), fast_mode=True)


def test_a_step_of_an_optimiser_lowers_the_loss():
    named = parameters()
    optimiser = torch.optim.SGD(list(named.values()), lr=1e-2)
    losses = []
    for _ in range(3):
        logits = forward(Llama.from_state_dict(named, CONFIG), IDS).logits
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].mT, IDS[:, 1:]))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[0] > losses[1] > losses[2]


def test_a_cache_is_written_in_place_unless_gradients_need_it():
    for needed, arrays in ((True, parameters()), (False, on_torch(random_weights(CONFIG)))):
        model = Llama.from_state_dict(arrays, CONFIG)
        cache = KVCache.create(model, 2, 5)
        after = forward(model, IDS[:, :2], cache=cache).cache
        assert (after.keys[0].data_ptr() == cache.keys[0].data_ptr()) != needed
        with torch.no_grad():
            cache = KVCache.create(model, 2, 5)
            after = forward(model, IDS[:, :2], cache=cache).cache
            assert after.keys[0].data_ptr() == cache.keys[0].data_ptr()


def test_texts_of_parameters_are_those_of_their_numbers():
    texts = [
        torch.stack(list(generate(Llama.from_state_dict(named, CONFIG), IDS, max_new_tokens=4)))
        for named in (parameters(), on_torch(random_weights(CONFIG)))
    ]
    assert torch.equal(*texts)


def test_transforms_of_torch_func():
    """Gradients, and an ensemble of layers in a vmap."""
    draw = np.random.default_rng(7).standard_normal
    arrays = [torch.asarray(draw((3, *shape))) for shape in FUNCTIONS["decoder_layer"][1]]
    found = torch.func.vmap(layer)(*arrays)
    expected = torch.stack([layer(*(array[i] for array in arrays)) for i in range(3)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slope = torch.func.grad(lambda x: rms_norm(x, torch.ones(4), eps=1e-2).sum())(torch.ones(4))
    assert slope.shape == (4,)


# What a tensor may be, and what is said if it is something else


class Own(torch.Tensor):
    pass


def test_classes_of_tensors():
    x = torch.ones(2, 3)
    for other in (torch.nn.Parameter(x), x.as_subclass(Own), torch.nn.Buffer(x)):
        assert rms_norm(other, torch.ones(3), eps=1e-5).shape == (2, 3)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert rms_norm(fake, torch.ones(3), eps=1e-5).shape == (2, 3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (torch.Tensor.to_sparse, "the layout torch.sparse_coo"),
        (torch.Tensor.to_sparse_csr, "the layout torch.sparse_csr"),
        (lambda x: torch.nested.as_nested_tensor([x]), "a nested tensor"),
        (lambda x: torch.nested.as_nested_tensor([x], layout=torch.jagged), "a nested tensor"),
    ],
)
def test_tensors_that_are_not_dense(change, words):
    with pytest.raises(TypeError, match=f"^x: expected a dense tensor, got {words}$"):
        rms_norm(change(torch.ones(2, 3)), torch.ones(3), eps=1e-5)


def test_a_torch_that_is_too_old(monkeypatch):
    """Importing its namespace fails then."""
    monkeypatch.setitem(sys.modules, "array_api_compat.torch", None)
    version = re.escape(torch.__version__)
    message = f"^x: expected a tensor of a newer torch, got one of torch {version}, .*cannot use"
    with pytest.raises(TypeError, match=message):
        rms_norm(torch.ones(3), torch.ones(3), eps=1e-5)
