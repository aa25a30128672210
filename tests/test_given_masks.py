"""Masks of the caller in `forward`, against naive loops and separate passes."""

from __future__ import annotations

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import KVCache, Mask, forward
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import assert_same_bits
from tests.support import decoder_oracle
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights, run_in_chunks
from tests.test_forward import FLOAT32, assert_close

KINDS = ["gqa", "window", "some windows", "mqa"]
COUNT = 7


def random_rule(rng, batch=None):
    """Any keys, later ones too; some queries see none."""
    shape = (COUNT, COUNT) if batch is None else (batch, COUNT, COUNT)
    return (rng.random(shape) < 0.5) & (rng.random((*shape[:-1], 1)) < 0.9)


def expected(weights, config, ids, rule, positions=None):
    rules = np.broadcast_to(rule, (len(ids), *rule.shape[-2:]))
    return np.stack(
        [
            decoder_oracle.forward(weights, config, row, positions, mask=own)["lm_head"]
            for row, own in zip(ids, rules, strict=True)
        ]
    )


@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_like_naive_loops(kind, batch, rng):
    config = CONFIGS[kind]
    weights = random_weights(config)
    model = model_of(config, weights)
    ids = rng.integers(13, size=(2, COUNT))
    rule = random_rule(rng, batch)
    exact = expected(weights, config, ids, rule)
    assert_close(forward(model, ids, mask=rule).logits, exact)
    assert np.abs(forward(model, ids).logits - exact).max() > 0.01
    # A key that comes later cannot be seen through a cache.
    rule &= np.tri(COUNT, dtype=bool)
    exact = expected(weights, config, ids, rule)
    for cuts in ([3, 4], range(1, COUNT)):
        assert_close(run_in_chunks(model, ids, [*cuts], rule=rule), exact)


@pytest.mark.parametrize("kind", ["gqa", "some windows"])
def test_on_every_library(backend, kind, rng):
    config = CONFIGS[kind]
    weights = random_weights(config, dtype=np.float32)
    model = model_of(config, weights, backend.array)
    ids = rng.integers(13, size=(2, COUNT))
    rule = random_rule(rng, 2) & np.tri(COUNT, dtype=bool)
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    exact = expected(wide, config, ids, rule)
    output = forward(model, backend.array(ids), mask=backend.array(rule))
    assert backend.holds(output.logits)
    assert_close(output.logits, exact, FLOAT32)
    assert_close(run_in_chunks(model, ids, [2, 5], rule=rule, array=backend.array), exact, FLOAT32)


def test_columns_may_be_all_places_of_a_cache(rng):
    """Those of tokens that have not come yet hide them, whatever they say."""
    model = model_of(GQA, random_weights(GQA))
    ids = rng.integers(13, size=(2, COUNT))
    rule = random_rule(rng) & np.tri(COUNT, dtype=bool)
    wide = np.concatenate([rule, np.ones((COUNT, 2), bool)], axis=1) | ~np.tri(
        COUNT, COUNT + 2, dtype=bool
    )
    cache = KVCache.create(model, 2, COUNT + 2)
    exact = run_in_chunks(model, ids, range(1, COUNT), rule=rule)
    for i in range(COUNT):
        logits, cache = forward(model, ids[:, i : i + 1], cache=cache, mask=wide[i : i + 1])
        assert_close(logits[:, 0], exact[:, i])


@given(seed=st.integers(0, 2**32 - 1), window=st.integers(1, 4), rolling=st.integers(1, 3))
def test_columns_of_a_ring_are_slots(seed, window, rolling):
    rng = np.random.default_rng(seed)
    config = replace(GQA, sliding_window=window)
    weights = random_weights(config, seed)
    model = model_of(config, weights)
    ids = rng.integers(13, size=(1, COUNT))
    rule = random_rule(rng) & np.tri(COUNT, dtype=bool)
    cuts = list(range(rolling, COUNT, rolling))
    exact = expected(weights, config, ids, rule)
    assert_close(run_in_chunks(model, ids, cuts, rule=rule, rolling=rolling), exact)


def test_padding_stays_hidden(rng):
    weights = random_weights(GQA)
    model = model_of(GQA, weights)
    ids = rng.integers(13, size=(2, COUNT))
    keep = np.arange(COUNT) >= np.array([[0], [3]])
    rule = random_rule(rng) | np.eye(COUNT, dtype=bool)
    exact = [
        expected(weights, GQA, ids[row : row + 1, start:], rule[start:, start:])[0]
        for row, start in ((0, 0), (1, 3))
    ]
    logits = forward(model, ids, mask=rule, attention_mask=keep).logits
    assert_close(logits[0], exact[0])
    assert_close(logits[1, 3:], exact[1])
    causal = rule & np.tri(COUNT, dtype=bool)
    exact = expected(weights, GQA, ids[1:, 3:], causal[3:, 3:])[0]
    logits = run_in_chunks(model, ids, [2, 5], rule=causal, keep=keep)
    assert_close(logits[1, 3:], exact)


@pytest.mark.parametrize("kind", ["gqa", "window", "some windows", "llama3"])
def test_packed_documents_are_documents_alone(backend, kind, rng):
    config = CONFIGS[kind]
    model = model_of(config, random_weights(config, dtype=np.float32), backend.array)
    lengths = [4, 1, 6]
    ids = rng.integers(13, size=(1, sum(lengths)))
    document = np.repeat(np.arange(3), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    mask = (document[:, None] == document) & np.tri(len(document), dtype=bool)
    options = {"positions": backend.array(positions), "mask": backend.array(mask)}
    packed = to_numpy(forward(model, backend.array(ids), **options).logits)
    for alone in range(3):
        own = ids[:, document == alone]
        exact = to_numpy(forward(model, backend.array(own)).logits)
        assert_close(packed[:, document == alone], exact, FLOAT32)
    # Positions alone hide nothing.
    seen = to_numpy(forward(model, backend.array(ids), positions=options["positions"]).logits)
    assert np.abs(seen - packed)[:, 4:].max() > 0.01


def test_branches_of_a_tree_are_texts_of_their_own(rng):
    """Drafts after a text, at once: each sees the text and those before it in its branch."""
    model = model_of(GQA, random_weights(GQA))
    text, first, second = (rng.integers(13, size=(1, n)) for n in (3, 2, 3))
    cache = forward(model, text, cache=KVCache.create(model, 1, 8)).cache
    branch = np.array([0, 0, 1, 1, 1])
    mask = np.ones((5, 8), bool)
    mask[:, 3:] = (branch[:, None] == branch) & np.tri(5, dtype=bool)
    logits = forward(
        model,
        np.concatenate([first, second], axis=1),
        cache=cache,
        positions=np.array([3, 4, 3, 4, 5]),
        mask=mask,
    ).logits
    for own, drafts in ((branch == 0, first), (branch == 1, second)):
        alone = forward(model, np.concatenate([text, drafts], axis=1)).logits
        assert_close(logits[:, own], alone[:, 3:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_used_as_it_is_in_every_layer(kind, rng):
    config = CONFIGS[kind]
    weights = random_weights(config)
    model = model_of(config, weights)
    ids = rng.integers(13, size=(2, COUNT))
    keep = np.array([[True] * COUNT, [False] * 2 + [True] * (COUNT - 2)])
    slots = np.arange(COUNT)
    mask = Mask(slots, slots, 4, keep)
    plain = replace(config, sliding_window=None, layer_types=None)
    rule = np.tri(COUNT, dtype=bool) & ~np.tri(COUNT, k=-4, dtype=bool) & keep[:, None, :]
    exact = expected(weights, plain, ids, rule)
    assert_close(forward(model, ids, mask=mask).logits, exact)
    cache = forward(model, ids[:, :3], cache=KVCache.create(model, 2, 9), mask=mask_of(mask, 0, 3))
    rest = forward(model, ids[:, 3:], cache=cache.cache, mask=mask_of(mask, 3, COUNT))
    assert_close(np.concatenate([cache.logits, rest.logits], axis=1), exact)


def mask_of(mask, start, stop):
    """The part for some queries, and the keys until then."""
    return Mask(mask.queries[start:stop], mask.keys[:stop], mask.window, mask.keep[:, :stop])


def test_everything_allowed_that_is_causal_changes_no_bit(rng):
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    ids = rng.integers(13, size=(2, COUNT))
    assert_same_bits(
        forward(model, ids, mask=np.tri(COUNT, dtype=bool)).logits, forward(model, ids).logits
    )


IDS = np.array([[1, 2, 3], [4, 5, 6]])
SLOTS = np.arange(3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": np.ones((3, 3))}, TypeError, "^mask: expected bool, got float64"),
        ({"mask": [[True] * 3] * 3}, TypeError, "^mask: expected an array of NumPy, CuPy"),
        ({"mask": np.ones((3, 4), bool)}, ValueError, r"^mask: .* \[3, 3\] or \[2, 3, 3\], got"),
        ({"mask": np.ones((3, 3, 3), bool)}, ValueError, r"^mask: .*, got \[3, 3, 3\]"),
        ({"mask": np.ones((1, 2, 3, 3), bool)}, ValueError, r"^mask: .*, got \[1, 2, 3, 3\]"),
        ({"mask": np.ones(3, bool)}, ValueError, r"^mask: .*, got \[3\]"),
        ({"mask": np.array(True)}, ValueError, r"^mask: .*, got \[\]"),
        (
            {"mask": array_api_strict.ones((3, 3), dtype=array_api_strict.bool)},
            TypeError,
            "^mask: expected an array of the same library as input_ids",
        ),
        ({"mask": Mask(SLOTS, np.arange(4))}, ValueError, r"^mask.keys: expected shape \[3\]"),
        (
            {"mask": Mask(SLOTS, SLOTS), "attention_mask": np.ones((2, 3), bool)},
            ValueError,
            "^mask: expected an array together with attention_mask, got a Mask",
        ),
    ],
)
def test_refuses(options, error, message):
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    with pytest.raises(error, match=message):
        forward(model, IDS, **options)


def test_refuses_with_a_cache():
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    cache = KVCache.create(model, 2, 9)
    cache = forward(model, IDS, cache=cache, attention_mask=np.array([[0, 1, 1], [1, 1, 1]])).cache
    for wrong, message in (
        (np.ones((3, 3), bool), r"^mask: expected shape \[3, 6\] or \[2, 3, 6\], got \[3, 3\]"),
        (np.ones((3, 7), bool), r"^mask: .*, got \[3, 7\]"),
        (Mask(SLOTS + 3, SLOTS), r"^mask.keys: expected shape \[6\], got \[3\]"),
        (Mask(SLOTS + 3, np.arange(6)), "^mask: expected a Mask with keep, since the cache holds"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(model, IDS, cache=cache, mask=wrong)
    with pytest.raises(ValueError, match=r"^mask: .*, got \[3, 7\]"):
        forward(
            model,
            IDS,
            cache=cache,
            mask=np.ones((3, 7), bool),
            attention_mask=np.zeros((2, 3), bool),
        )
    assert cache.length == 3
    assert cache.keep[:, 3:].all()  # nothing was written
