"""jax.jit, grad, vmap and scan over models, in float64 against NumPy's own forward pass."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_layers import (
    KVCache,
    LayerWeights,
    Llama,
    LlamaWeights,
    Mask,
    decoder_layer,
    embed,
    forward,
    rope_table,
)
from tests.support import tiny
from tests.support.random_models import CONFIGS, model_of, random_weights

pytestmark = pytest.mark.peer

IDS = np.array([[3, 1, 12, 0, 7], [5, 5, 2, 9, 11]], np.int32)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def made(kind: str, seed: int = 0) -> Llama:
    config = CONFIGS[kind]
    return model_of(config, random_weights(config, seed), jnp.asarray)


def on_numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def exact(model: Llama, **options: Any) -> Any:
    """The logits by NumPy."""
    return forward(on_numpy(model), IDS, **options).logits


def assert_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=1e-12)


# Gradients


def loss_of(xp: Any, logits: Any) -> Any:
    """The mean over tokens of minus the logarithm of their probabilities."""
    shifted = logits[:, :-1] - xp.max(logits[:, :-1], axis=-1, keepdims=True)
    logs = shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
    return -xp.mean(xp.take_along_axis(logs, xp.asarray(IDS)[:, 1:, None], axis=-1))


@pytest.mark.parametrize("kind", ["biases", "tied"])
def test_gradients_are_finite_differences(kind, rng):
    """Of each array of the weights, in a direction of its own."""
    model = made(kind)

    def loss(weights: LlamaWeights) -> Any:
        return loss_of(jnp, forward(Llama(model.config, weights), jnp.asarray(IDS)).logits)

    value, gradient = jax.jit(jax.value_and_grad(loss))(model.weights)
    assert isinstance(gradient, LlamaWeights)
    assert (gradient.lm_head is gradient.embed_tokens) == (kind == "tied")
    assert value == pytest.approx(loss_of(np, exact(model)), rel=1e-12)

    weights, h = on_numpy(model.weights), 1e-5
    leaves, structure = jax.tree.flatten(weights)
    for index, slope in enumerate(jax.tree.leaves(gradient)):
        step = rng.standard_normal(leaves[index].shape)
        values = [
            loss_of(np, forward(Llama(model.config, changed), IDS).logits)
            for moved in (leaves[index] + h * step, leaves[index] - h * step)
            for changed in [structure.unflatten([*leaves[:index], moved, *leaves[index + 1 :]])]
        ]
        difference = (values[0] - values[1]) / (2 * h)
        assert np.sum(slope * step) == pytest.approx(difference, rel=1e-6, abs=1e-8)

    stepped = jax.tree.map(lambda w, g: w - 1e-3 * g, model.weights, gradient)
    assert loss(stepped) < value


def test_gradient_of_a_lookup_without_a_compiler():
    ids, table = jnp.asarray([[1, 1, 0]]), jnp.ones((3, 2))
    gradient = jax.grad(lambda table: embed(ids, table).sum())(table)
    np.testing.assert_array_equal(gradient, [[1, 1], [2, 2], [0, 0]])


# Models and layers as arguments


@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_a_model_is_an_argument(kind):
    model, other = made(kind), made(kind, seed=1)
    run = jax.jit(lambda model, ids: forward(model, ids).logits)
    for one in (model, other):
        assert_close(run(one, jnp.asarray(IDS)), exact(one))
    assert run._cache_size() == 1
    changed = Llama(replace(model.config, rms_norm_eps=0.5), model.weights)
    assert_close(run(changed, jnp.asarray(IDS)), exact(changed))


def test_layers_of_a_stack_in_a_scan():
    model, places = made("gqa"), jnp.arange(5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 10)))

    def layer(x: Any, w: LayerWeights, xp: Any = jnp) -> Any:
        rope = rope_table(xp.arange(5), model.config, like=x)
        mask = Mask(xp.arange(5), xp.arange(5))
        return decoder_layer(x, w, config=model.config, rope=rope, mask=mask)

    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *model.weights.layers)
    assert isinstance(stacked, LayerWeights)
    assert stacked.mlp.up_proj.shape == (2, 14, 10)
    y, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, stacked)
    expected = np.asarray(x)
    for w in on_numpy(model.weights.layers):
        expected = layer(expected, w, np)
    assert_close(y, expected)
    mask = jax.jit(lambda mask: mask.rows(0, 5))(Mask(places, places, window=2))
    assert jnp.array_equal(mask, Mask(places, places, window=2).rows(0, 5))


def test_an_ensemble_in_a_vmap():
    models = [made("biases", seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *models)
    run = jax.vmap(lambda model, ids: forward(model, ids).logits, (0, None))
    logits = jax.jit(run)(stacked, jnp.asarray(IDS))
    assert_close(logits, np.stack([exact(model) for model in models]))


def test_tokens_in_a_scan():
    model = made("window")

    def step(cache: KVCache, ids: Any) -> Any:
        logits, cache = forward(model, ids[:, None], cache=cache)
        return cache, logits[:, 0]

    cache, logits = jax.lax.scan(step, KVCache.create(model, 2, 5), jnp.asarray(IDS).T)
    assert isinstance(cache, KVCache)
    assert int(cache.length) == 5
    assert_close(jnp.swapaxes(logits, 0, 1), exact(model))


@pytest.mark.parametrize("kind", ["gqa", "tied"])
@pytest.mark.parametrize("leaf", [True, 0, object(), "word", jax.ShapeDtypeStruct((), int)])
def test_other_things_than_arrays_in_the_tree(kind, leaf):
    """jax and those who use it put them there; the structure stays."""
    model = made(kind)
    for whole in (model, model.weights, model.weights.layers[0], model.weights.layers[0].self_attn):
        other = jax.tree.map(lambda _: leaf, whole)
        assert type(other) is type(whole)
        assert jax.tree.structure(other) == jax.tree.structure(whole)
        assert type(jax.tree.map(lambda _: None, whole)) is type(whole)
    axes = jax.tree.map(lambda _: 0, model.weights)
    assert axes.layers[1].self_attn.qkv.fused == axes.lm_head == 0
    assert axes.layers[1].self_attn.qkv.num_heads == 4


def test_names_of_the_arrays():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(made("gqa"))]
    assert paths[0] == ".weights.embed_tokens"
    assert ".weights.layers[1].self_attn.qkv.fused" in paths
    assert len(paths) == len(set(paths)) == 2 * 7 + 3


def test_weights_that_are_read_when_used():
    config = CONFIGS["tied"]
    arrays = {name: jnp.asarray(a) for name, a in random_weights(config).items()}
    model = Llama(config, LlamaWeights.from_named(arrays, config))
    plain = jax.tree.map(lambda array: array, model)
    assert type(plain.weights) is LlamaWeights
    assert isinstance(plain.weights.layers, list)
    assert (
        jax.tree.structure(plain) == jax.tree.structure(model) == jax.tree.structure(made("tied"))
    )
    assert plain.weights.lm_head is plain.weights.embed_tokens
    doubled = jax.tree.map(lambda array: 2 * array, model.weights)
    assert isinstance(doubled, LlamaWeights)
    tripled = jax.tree.map(lambda one, other: one + other, model.weights, doubled)
    assert_close(tripled.layers[1].mlp.up_proj, 3 * arrays["model.layers.1.mlp.up_proj.weight"])


WAYS = {
    "load": "load(PATH, backend=jnp)",
    "from_named": "Llama(CONFIG, LlamaWeights.from_named(ARRAYS, CONFIG))",
    "from_state_dict": "Llama.from_state_dict(ARRAYS, CONFIG)",
    "of NumPy": "Llama.from_state_dict(NUMPY, CONFIG)",
}


@pytest.mark.parametrize("way", WAYS)
def test_the_first_model_of_a_program(way, tmp_path):
    """jax has met no array of ours yet, and must know the class."""
    tiny.write_single(tmp_path, tiny.arrays())
    code = f"""
from llama_layers import Llama, LlamaWeights, load
from tests.support import tiny
import jax, jax.numpy as jnp
PATH, CONFIG, NUMPY = {str(tmp_path)!r}, tiny.CONFIG, tiny.arrays()
ARRAYS = {{name: jnp.asarray(array) for name, array in NUMPY.items()}}
model = {WAYS[way]}
print(type(jax.tree.map(lambda array: array, model)).__name__, len(jax.tree.leaves(model)))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    layers = tiny.CONFIG.num_hidden_layers
    assert run.stdout.split() == ["Llama", str(7 * layers + 3)]


# What is not known while jax compiles


def test_constants():
    """Ids, positions and a mask that the compiled function closes over."""
    model, mask = made("gqa"), np.ones((2, 5), bool)
    mask[1, :2] = False
    ids, valid, places = jnp.asarray(IDS), jnp.asarray(mask), jnp.asarray([0, 2, 4, 6, 8])
    run = jax.jit(
        lambda model: (
            forward(model, ids, attention_mask=valid, positions=places, last_only=True).logits
        )
    )
    options = {"attention_mask": mask, "positions": np.arange(0, 10, 2), "last_only": True}
    assert_close(run(model), exact(model, **options))
    cache = jax.jit(lambda cache: forward(model, ids[:, :2], cache=cache).cache)(
        KVCache.create(model, 2, 5)
    )
    rest = jax.jit(lambda model: forward(model, ids[:, 2:], cache=cache).logits)(model)
    assert_close(rest, exact(model)[:, 2:])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "uint64"])
def test_ids_out_of_range_give_nan(dtype):
    """Never the row of another id, as -1 would be the last; eagerly they are refused."""
    table = jnp.arange(1.0, 401.0).reshape(200, 2)  # more rows than int8 counts
    limits = np.iinfo(dtype)
    others = (-1, -200, 200, limits.min, limits.max)
    ids = [0, 12, 127, *(i for i in others if limits.min <= i <= limits.max)]
    found = np.asarray(jax.jit(embed)(jnp.asarray([ids], dtype), table))[0]
    expected = [table[i] if 0 <= i < 200 else (np.nan, np.nan) for i in ids]
    np.testing.assert_array_equal(found, expected)
