"""torch.compile of every function without a break of its graph, in float64 against NumPy."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llama_layers import (
    KVCache,
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
    linear,
    mlp,
    qkv_projection,
    rms_norm,
    rope_table,
    swiglu,
)
from tests.support.random_models import CONFIGS, model_of, random_weights

pytestmark = pytest.mark.peer

IDS = np.array([[3, 1, 12, 0, 7], [5, 5, 2, 9, 11]])
CONFIG = replace(CONFIGS["gqa"], num_hidden_layers=1)
MODELS = {"numpy": model_of(CONFIG, random_weights(CONFIG))}
MODELS["torch"] = model_of(CONFIG, random_weights(CONFIG), torch.asarray)
LAYERS = {name: model.weights.layers[0] for name, model in MODELS.items()}

X = np.random.default_rng(0).standard_normal((2, 5, 10))
Q = np.random.default_rng(1).standard_normal((2, 5, 4, 4))
PLACES = np.arange(5)
MASKED = np.tri(5, dtype=bool)


def half(_: str, array: Any) -> Any:
    return array / 2


# Two thetas, a layer without RoPE and a scaling of some layers.
ROPES = {
    library: model_of(CONFIGS["RoPE by layer"], random_weights(CONFIGS["RoPE by layer"]), array)
    for library, array in (("numpy", np.asarray), ("torch", torch.asarray))
}


def layer(name: str, x: Any, places: Any, **tap: Any) -> Any:
    rope = rope_table(places, CONFIG, like=x)
    mask = Mask(places, places, window=3)
    return decoder_layer(x, LAYERS[name], config=CONFIG, rope=rope, mask=mask, **tap)


def with_a_cache(name: str, ids: Any, places: Any) -> Any:
    """In two steps, of a cache that is made where it is compiled."""
    model = MODELS[name]
    first, cache = forward(model, ids[:, :3], cache=KVCache.create(model, 2, 5))
    return first, forward(model, ids[:, 3:], cache=cache, positions=places[3:]).logits


def rows(name: str, ids: Any) -> Any:
    cache = forward(MODELS[name], ids, cache=KVCache.create(MODELS[name], 2, 5)).cache
    return cache.take([1, -2, 1]).keys[0], cache.repeat(2).values[0]


# Each takes the name of the library, and arrays of it.
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "embed": (lambda name, ids, table: embed(ids, table), (IDS, X[0].repeat(4, axis=0))),
    "rms_norm": (lambda name, x, w: rms_norm(x, w, eps=1e-3), (X, X[0, 0])),
    "linear": (lambda name, x, w, b: linear(x, w, b), (X, X[0], X[0, :, 0])),
    "qkv_projection": (
        lambda name, x, q, k, v: qkv_projection(
            x, QKVWeights.from_separate(q, k, v, num_heads=2, num_kv_heads=1)
        ),
        (X, X[0, :4], X[0, :2], X[0, 2:4]),
    ),
    "rope": (
        lambda name, q, places: apply_rope(q, *rope_table(places, CONFIG, like=q)),
        (Q, PLACES * 300),
    ),
    "attention": (
        lambda name, q, mask: attention(q, q[:, :, :2], q[:, :, 2:], mask=mask, scale=0.3),
        (Q, MASKED),
    ),
    "attention by a Mask": (
        lambda name, q, places: attention(q, q, q, mask=Mask(places, places, 2)),
        (Q, PLACES),
    ),
    "swiglu": (lambda name, x, y: swiglu(x, y), (X, 1 - X)),
    "mlp": (lambda name, x, w: mlp(x, MLPWeights(w, w, w.T)), (X, X[0])),
    "decoder_layer": (layer, (X, PLACES)),
    "forward": (lambda name, ids: forward(MODELS[name], ids, last_only=True).logits, (IDS,)),
    "forward with RoPE by layer": (lambda name, ids: forward(ROPES[name], ids).logits, (IDS,)),
    "forward with a cache": (with_a_cache, (IDS, PLACES)),
    "cache.take and cache.repeat": (rows, (IDS,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    torch.compiler.reset()
    function, arrays = FUNCTIONS[name]
    backend = "aot_eager" if name == "forward with a cache" else "eager"
    run = torch.compile(lambda *a: function("torch", *a), fullgraph=True, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(*map(torch.asarray, arrays))
    expected = function("numpy", *arrays)
    if not isinstance(expected, tuple):
        found, expected = (found,), (expected,)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_taps_by_short_names():
    tap = {"probabilities": half}

    def run(name: str, ids: Any, x: Any, places: Any) -> tuple[Any, Any]:
        return forward(MODELS[name], ids, tap=tap).logits, layer(name, x, places, tap=tap)

    compiled = torch.compile(lambda *a: run("torch", *a), fullgraph=True, backend="eager")
    given = IDS, X, PLACES
    found = compiled(*map(torch.asarray, given))
    for one, other in zip(found, run("numpy", *given), strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=0, atol=1e-12)


def test_what_is_out_of_range_gives_nan():
    """Eagerly it is refused; -1 is not the last row."""
    table = torch.arange(8.0).reshape(4, 2)

    def run(ids: Any) -> Any:
        return embed(ids, table), rope_table(ids, CONFIG, like=table)

    rows, (cos, sin) = torch.compile(run, fullgraph=True, backend="eager")(
        torch.tensor([[-1, 0, 3, 4]], dtype=torch.int8)
    )
    np.testing.assert_array_equal(rows[0], [[np.nan] * 2, [0, 1], [6, 7], [np.nan] * 2])
    assert torch.isnan(cos[0]).all(dim=1).tolist() == [True, False, False, False]
    assert torch.isnan(sin[0]).all(dim=1).tolist() == [True, False, False, False]


def test_dynamic_rope_is_refused():
    config = CONFIGS["dynamic"]
    run = torch.compile(lambda p: rope_table(p, config, like=torch.zeros(0)), backend="eager")
    with pytest.raises(ValueError, match=r"positions: expected known numbers for .* 'dynamic'"):
        run(torch.arange(3))


def test_gradients_through_a_compiled_model():
    """To weights from which the model is made where it is compiled."""
    weights = {n: torch.asarray(a).requires_grad_() for n, a in random_weights(CONFIG).items()}

    def loss(arrays: Any, ids: Any) -> Any:
        return forward(model_of(CONFIG, arrays), ids).logits.square().mean()

    run = torch.compile(loss, fullgraph=True, backend="aot_eager")
    slopes = [
        torch.autograd.grad(function(weights, torch.asarray(IDS)), list(weights.values()))
        for function in (run, loss)
    ]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_weights_that_are_read_when_used():
    """Once they were read: no compiler looks into files."""
    arrays = {name: torch.asarray(array) for name, array in random_weights(CONFIG).items()}
    model = Llama(CONFIG, LlamaWeights.from_named(arrays, CONFIG))
    expected = forward(model, torch.asarray(IDS)).logits
    run = torch.compile(lambda ids: forward(model, ids).logits, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(torch.asarray(IDS)), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_inductor():
    """Needs a C++ compiler, and is slow."""
    torch.compiler.reset()
    function, arrays = FUNCTIONS["mlp"]
    run = torch.compile(lambda *a: function("torch", *a), fullgraph=True)
    found = run(*map(torch.asarray, arrays))
    np.testing.assert_allclose(found.numpy(), function("numpy", *arrays), rtol=0, atol=1e-12)
