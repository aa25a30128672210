"""`decoder_layer` against naive loops, and closed forms of what it is made of."""

from __future__ import annotations

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_layers import (
    KVCache,
    LayerCache,
    Mask,
    decoder_layer,
    query_temperature,
    rope_table,
)
from llama_layers.testing import assert_same_bits, configs
from tests.support import decoder_oracle
from tests.support.random_models import CONFIGS, GQA, layer_weights, random_weights
from tests.test_forward import FLOAT32, assert_close

CAUSAL = np.tril(np.ones((6, 6), bool))


def drawn(config, seed, count=6):
    """Weights of one layer, and hidden states that an oracle looks up as embeddings."""
    thetas = config.layer_rope_theta
    one = replace(
        config,
        num_hidden_layers=1,
        vocab_size=2 * count,
        layer_types=None,
        layer_rope_theta=None if thetas is None else thetas[:1],
    )
    weights = random_weights(one, seed)
    return one, weights, weights["model.embed_tokens.weight"].reshape(2, count, -1)


def expected_of(config, weights, positions):
    count = config.vocab_size // 2
    rows = [
        decoder_oracle.forward(weights, config, row * count + np.arange(count), positions)
        for row in range(2)
    ]
    return np.stack([row["model.layers.0"] for row in rows])


def run(config, weights, x, positions, mask, cache=None):
    w = layer_weights(weights, config, 0)
    rope = None
    if (own := config.rope_of(0)) is not None:
        rope = rope_table(positions, own, like=x)
        if config.llama_4_scaling_beta:
            rope = (*rope, query_temperature(positions, config, like=x))
    return decoder_layer(x, w, config=config, rope=rope, mask=mask, cache=cache)


@settings(max_examples=60)
@given(config=configs(max_heads=4), seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6))
def test_like_naive_loops(config, seed, count):
    if config.rope_scaling is not None and config.rope_scaling.depends_on_length:
        config = replace(config, rope_scaling=None)  # of the length: see test_forward
    config, weights, x = drawn(config, seed, count)
    positions = np.sort(np.random.default_rng(seed).choice(60, size=count, replace=False))
    mask = Mask(np.arange(count), np.arange(count), config.sliding_window)
    expected = expected_of(config, weights, positions)
    assert_close(run(config, weights, x, positions, mask), expected)
    if config.sliding_window is None:
        boolean = np.tril(np.ones((count, count), bool))
        assert_same_bits(
            run(config, weights, x, positions, boolean), run(config, weights, x, positions, mask)
        )


@pytest.mark.parametrize("name", ["gqa", "biases", "qwen2", "window"])
@pytest.mark.parametrize("cuts", [[], [1, 4], [1, 2, 3, 4, 5]])
def test_with_a_cache(name, cuts):
    config, weights, x = drawn(CONFIGS[name], 0)
    cache = KVCache.create(config, 2, 6, like=x)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, 6], strict=True):
        view = LayerCache(cache.extend(stop - start), 0)
        mask = Mask(np.arange(start, stop), np.arange(stop), config.sliding_window)
        parts.append(
            run(config, weights, x[:, start:stop], np.arange(start, stop), mask, cache=view)
        )
        cache = view.cache
    expected = expected_of(config, weights, np.arange(6))
    assert_close(np.concatenate(parts, axis=1), expected)


def test_identity_with_zero_output_projections():
    config, weights, x = drawn(GQA, 0)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.0.{name}.weight"] *= 0
    assert_same_bits(run(config, weights, x, np.arange(6), CAUSAL), x)


@pytest.mark.parametrize("zero", ["self_attn.o_proj", "mlp.down_proj"])
def test_one_branch_at_a_time(zero):
    config, weights, x = drawn(CONFIGS["biases"], 0)
    weights[f"model.layers.0.{zero}.weight"] *= 0
    expected = expected_of(config, weights, np.arange(6))
    assert_close(run(config, weights, x, np.arange(6), CAUSAL), expected)


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 1.0])
def test_eps_of_the_config_in_both_norms(eps):
    config, weights, x = drawn(replace(GQA, rms_norm_eps=eps), 0)
    small = {**weights, "model.embed_tokens.weight": weights["model.embed_tokens.weight"] / 100}
    expected = expected_of(config, small, np.arange(6))
    assert_close(run(config, small, x / 100, np.arange(6), CAUSAL), expected)


def test_without_a_mask_every_token_sees_every_other():
    config, weights, x = drawn(GQA, 0)
    everything = np.ones((6, 6), bool)
    assert_same_bits(
        run(config, weights, x, np.arange(6), None),
        run(config, weights, x, np.arange(6), everything),
    )


def test_values_are_not_turned():
    """Equal keys: each query gets the mean of the values, whatever their positions."""
    config, weights, x = drawn(replace(GQA, attention_bias=True), 0)
    weights["model.layers.0.self_attn.k_proj.weight"] *= 0
    weights["model.layers.0.self_attn.k_proj.bias"] *= 0
    near = run(config, weights, x, np.arange(6), CAUSAL)
    assert_close(run(config, weights, x, 1000 + 7 * np.arange(6), CAUSAL), near)


def test_on_every_library(backend):
    config, weights, x = drawn(CONFIGS["biases"], 0)
    expected = expected_of(config, weights, np.arange(6))
    narrow = {name: array.astype(np.float32) for name, array in weights.items()}
    x = backend.array(x.astype(np.float32))
    w = layer_weights(narrow, config, 0, backend.array)
    rope = rope_table(backend.array(np.arange(6)), config, like=x)
    y = decoder_layer(x, w, config=config, rope=rope, mask=backend.array(CAUSAL))
    assert backend.holds(y)
    assert y.dtype == x.dtype
    # The float32 weights are off by a rounding each, on top of those of the arithmetic.
    assert_close(y, expected, FLOAT32)


@pytest.mark.parametrize(
    ("argument", "given", "message"),
    [
        ("w", None, "w: expected LayerWeights, got NoneType"),
        ("config", {}, "config: expected LlamaConfig, got dict"),
        (
            "rope",
            None,
            "rope: expected two arrays, cosines and sines from rope_table, got NoneType",
        ),
        ("rope", (np.ones((6, 2)),), "rope: expected two arrays, .*, got 1"),
        ("rope", np.ones((2, 6, 2)), "rope: expected two arrays, .*, got ndarray"),
        (
            "cache",
            KVCache.create(GQA, 2, 6, like=np.zeros(0)),
            r"cache: expected LayerCache\(cache.extend\(S\), layer\) of a KVCache, got KVCache",
        ),
    ],
)
def test_refuses_arguments_of_another_type(argument, given, message):
    config, weights, x = drawn(GQA, 0)
    arguments = {
        "w": layer_weights(weights, config, 0),
        "config": config,
        "rope": rope_table(np.arange(6), config, like=x),
        "cache": None,
    }
    arguments[argument] = given
    w = arguments.pop("w")
    with pytest.raises(TypeError, match=message):
        decoder_layer(x, w, **arguments, mask=None)


def test_refuses_a_cache_without_room_made_for_the_tokens():
    config, weights, x = drawn(GQA, 0)
    cache = LayerCache(KVCache.create(config, 2, 12, like=x).extend(5), 0)
    with pytest.raises(ValueError, match=r"k: expected shape \[2, 5, .* extended by, got \[2, 6,"):
        run(config, weights, x, np.arange(6), None, cache=cache)


def test_refuses_what_its_functions_do():
    config, weights, x = drawn(GQA, 0)
    with pytest.raises(ValueError, match="weight: expected shape"):
        run(config, weights, x[..., :9], np.arange(6), None)
    with pytest.raises(ValueError, match=r"cos: expected shape \[6, 2\] or \[2, 6, 2\]"):
        run(config, weights, x, np.arange(5), None)
    with pytest.raises(ValueError, match=r"mask: expected shape \[6, 6\]"):
        run(config, weights, x, np.arange(6), CAUSAL[:, :5])
    with pytest.raises(TypeError, match="weight: expected an array of the same library as x"):
        run(config, weights, array_api_strict.asarray(x), np.arange(6), None)
