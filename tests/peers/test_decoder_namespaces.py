"""One source on every library: whole models on torch, jax and array-api-strict, jax compiled too.

NumPy's float64 pass is the oracle, which naive loops and transformers check elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import KVCache, check, forward, generate, record
from llama_layers.arrays.dtypes import FLOATS, dtype_name
from llama_layers.arrays.transfer import from_numpy, to_numpy
from llama_layers.testing import configs
from tests.support.random_models import CONFIGS, model_of, random_weights

pytestmark = pytest.mark.peer

LIBRARIES = {"torch": torch, "jax": jnp, "array_api_strict": array_api_strict}
KINDS = ["gqa", "biases", "qwen2", "tied", "some windows", "window", "yarn", "llama3", "linear"]
SWITCHED = "gemma;olmo2;norms after RoPE;multipliers;sinks;longrope;RoPE by layer".split(";")


def on(xp: Any) -> Any:
    return lambda array: from_numpy(np.asarray(array), xp)


def made(kind: str, dtype: Any = np.float32, xp: Any = None) -> Any:
    """A model with room for 40 positions, of the same numbers in every library."""
    config = replace(CONFIGS[kind], max_position_embeddings=40)
    weights = random_weights(config, dtype=dtype)
    return model_of(config, weights) if xp is None else model_of(config, weights, on(xp))


def some_ids(rng: np.random.Generator, *shape: int) -> Any:
    return rng.integers(0, 13, shape).astype(np.int32)


def exact_logits(kind: str, ids: Any, dtype: Any = np.float32, **options: Any) -> Any:
    """In float64, of the weights as rounded to a dtype."""
    model = made(kind)
    weights = random_weights(model.config, dtype=dtype)
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    return forward(model_of(model.config, wide), ids, **options).logits


def assert_rounded_as_well(logits: Any, kind: str, ids: Any, **options: Any) -> None:
    """Within 4 times NumPy's own float32 error, or 4 ulps of the largest logit, of the oracle."""
    assert dtype_name(logits.dtype) == "float32"
    exact = exact_logits(kind, ids, **options)
    own = np.abs(forward(made(kind), ids, **options).logits - exact).max()
    ulps = 4 * np.spacing(np.abs(exact).max().astype(np.float32))
    assert np.abs(to_numpy(logits) - exact).max() <= 4 * own + ulps


@pytest.mark.parametrize("kind", [*KINDS, "dynamic"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_float32(name, kind, rng):
    xp, ids = LIBRARIES[name], some_ids(rng, 2, 20)
    mask = np.ones((2, 20), np.int32)
    mask[1, :6] = 0
    model = made(kind, xp=xp)
    assert_rounded_as_well(forward(model, on(xp)(ids)).logits, kind, ids)
    logits = forward(model, on(xp)(ids), attention_mask=on(xp)(mask)).logits
    assert_rounded_as_well(logits, kind, ids, attention_mask=mask)


@pytest.mark.parametrize("kind", [*KINDS, *SWITCHED, "dynamic"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_float64(name, kind, rng):
    """All arithmetic is in float64: the libraries differ by its rounding alone."""
    xp, ids = LIBRARIES[name], some_ids(rng, 2, 20)
    with jax.enable_x64(True):
        logits = forward(made(kind, np.float64, xp), on(xp)(ids)).logits
        assert dtype_name(logits.dtype) == "float64"
        expected = forward(made(kind, np.float64), ids).logits
        np.testing.assert_allclose(to_numpy(logits), expected, rtol=0, atol=1e-12)


@given(config=configs(max_heads=4), seed=st.integers(0, 2**32 - 1))
def test_torch_is_within_the_bounds(config, seed):
    """With any switches: each site, of NumPy's inputs; tests/test_any_config.py has the same."""
    weights = random_weights(config, seed, np.float32)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, 5))
    trace = record(model_of(config, weights, torch.asarray), torch.asarray(ids))
    report = check(trace, model_of(config, weights), explain=False)
    assert report.agrees, report.first
    assert not report.missing


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("rolling", [None, 5])
def test_chunks(name, rolling, rng):
    cuts = [5, 10, 11] if name == "jax" else [4, 9, 10, 11, 15]  # jax compiles for each length
    xp, ids = LIBRARIES[name], some_ids(rng, 2, cuts[-1] + 5)
    model = made("window", xp=xp)
    cache, parts = KVCache.create(model, 2, ids.shape[1], rolling=rolling), []
    for part in np.split(ids, cuts, axis=1):
        logits, cache = forward(model, on(xp)(part), cache=cache)
        parts.append(to_numpy(logits))
    assert_rounded_as_well(np.concatenate(parts, axis=1), "window", ids)


# jax without a cache of one size compiles each operation again for each length.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in LIBRARIES
        for kind in ("gqa", "window")
        if (name, kind) != ("jax", "gqa")
    ],
)
def test_texts(name, kind, rng):
    xp, ids = LIBRARIES[name], some_ids(rng, 3, 6)
    count = 4 if name == "jax" else 8
    options = {"max_new_tokens": count, "temperature": 0.7, "top_p": 0.9, "rng": 5}
    theirs = generate(made(kind, xp=xp), on(xp)(ids), **options)
    ours = np.stack(list(generate(made(kind), ids, **options)))
    np.testing.assert_array_equal(np.stack([to_numpy(step) for step in theirs]), ours)


@pytest.mark.parametrize("name", ["torch", "jax"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gqa", "qwen2"])
def test_16_bits(name, dtype, kind, rng):
    """The activations are in 16 bits too, and no logit is off by more than 8 of their roundings.

    The worst that was seen are 2.4 (bfloat16) and 3.1 (float16), of the largest logit. This tells
    that such models run, and nothing finer: the bounds of each function are tested elsewhere.
    """
    xp, ids = LIBRARIES[name], some_ids(rng, 2, 20)
    model = made(kind, dtype, xp)
    cache = KVCache.create(model, 2, 20)
    first, cache = forward(model, on(xp)(ids[:, :10]), cache=cache)
    rest, cache = forward(model, on(xp)(ids[:, 10:]), cache=cache)
    for array in (first, rest, cache.keys[0]):
        assert dtype_name(array.dtype) == dtype
    logits = np.concatenate([to_numpy(part).astype(float) for part in (first, rest)], axis=1)
    exact = exact_logits(kind, ids, dtype)
    unit = FLOATS[dtype].unit_roundoff
    assert np.abs(logits - exact).max() <= 8 * unit * np.abs(exact).max()


class Counted:
    """A compiled step of a model, and how often it was traced."""

    def __init__(self, model: Any) -> None:
        self.traces = 0

        def run(ids: Any, cache: Any, attention_mask: Any = None) -> Any:
            self.traces += 1
            return forward(model, ids, cache=cache, attention_mask=attention_mask)

        self.run = jax.jit(run)


@pytest.mark.parametrize(
    ("prefill", "kind"), [("eager", "gqa"), *(("compiled", kind) for kind in KINDS)]
)
def test_one_trace_for_all_steps(prefill, kind, rng):
    ids = some_ids(rng, 2, 40)
    model = made(kind, xp=jnp)
    step = Counted(model)
    cache = KVCache.create(model, 2, 40)
    first = on(jnp)(ids[:, :7])
    run = step.run if prefill == "compiled" else Counted(model).run.__wrapped__
    logits, cache = run(first, cache)
    parts, traces = [to_numpy(logits)], step.traces
    assert traces == (prefill == "compiled")
    for i in range(7, 40):
        logits, cache = step.run(on(jnp)(ids[:, i : i + 1]), cache)
        parts.append(to_numpy(logits))
    assert step.traces == traces + 1
    assert int(cache.length) == 40
    assert_rounded_as_well(np.concatenate(parts, axis=1), kind, ids)


def test_one_trace_with_a_rolling_cache(rng):
    ids = some_ids(rng, 2, 40)
    model = made("window", xp=jnp)
    step = Counted(model)
    cache, parts = KVCache.create(model, 2, 40, rolling=2), []
    for i in range(0, 40, 2):
        logits, cache = step.run(on(jnp)(ids[:, i : i + 2]), cache)
        parts.append(to_numpy(logits))
    assert step.traces == 1
    assert_rounded_as_well(np.concatenate(parts, axis=1), "window", ids)


@pytest.mark.parametrize("kind", ["gqa", "window"])
def test_one_trace_with_padding(kind, rng):
    ids, mask = some_ids(rng, 2, 30), np.ones((2, 30), np.int32)
    mask[1, :5] = 0
    model = made(kind, xp=jnp)
    step = Counted(model)
    logits, cache = step.run(
        on(jnp)(ids[:, :8]), KVCache.create(model, 2, 30), on(jnp)(mask[:, :8])
    )
    parts = [to_numpy(logits)]
    for i in range(8, 30):
        logits, cache = step.run(on(jnp)(ids[:, i : i + 1]), cache)
        parts.append(to_numpy(logits))
    assert step.traces == 2
    logits = np.concatenate(parts, axis=1)
    logits[mask == 0] = forward(made(kind), ids, attention_mask=mask).logits[mask == 0]
    assert_rounded_as_well(logits, kind, ids, attention_mask=mask)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_a_cache(kind, rng):
    step = Counted(made(kind, xp=jnp))
    for _ in range(2):
        ids = some_ids(rng, 2, 20)
        logits = step.run(on(jnp)(ids), None).logits
        assert_rounded_as_well(logits, kind, ids)
    assert step.traces == 1


def test_compiled_dynamic_rope_is_refused(rng):
    model = made("dynamic", xp=jnp)
    ids, cache = on(jnp)(some_ids(rng, 2, 3)), KVCache.create(model, 2, 10)
    message = "positions: expected known numbers for rope_type 'dynamic', .* got traced ones"
    with pytest.raises(ValueError, match=message):
        Counted(model).run(ids, cache)


def test_compiled_ids_out_of_range_give_nan(rng):
    """Nothing can be raised there: the numbers are not known."""
    model = made("gqa", xp=jnp)
    ids = some_ids(rng, 1, 4)
    ids[0, 2] = 13
    logits = to_numpy(Counted(model).run(on(jnp)(ids), None).logits)
    assert np.isnan(logits[0, 2:]).all()


def test_a_cache_holds_what_jax_makes_of_its_arrays():
    """Shapes, say, which no constructor of a cache would take."""
    like = jnp.zeros(0, jnp.float32)
    cache = KVCache.create(CONFIGS["gqa"], 1, 4, like=like).extend(1)
    shapes = jax.tree.map(lambda leaf: jnp.shape(leaf), cache)
    assert shapes.keys == ((1, 4, 2, 4),) * 2
    assert (shapes.max_len, shapes.room, shapes.keep) == (4, 1, None)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, cache)
    assert isinstance(doubled, KVCache)
    assert doubled.length == 2
