"""The forward pass of random tiny checkpoints against transformers, which reads the same files.

The oracle of the rounding errors is our own pass in float64, since transformers' is not in float64
throughout: norms, softmax and RoPE stay in float32. That the oracle is right is shown twice: here,
to within what float32 can show, by transformers; and by naive loops in the other tests.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llama_layers import KVCache, Llama, forward, generate, load
from tests.support.transformers_cache import cached

pytestmark = pytest.mark.peer

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
TOKENS = 100  # beyond the original context of every scaled RoPE below

# The largest difference of transformers' float32 from our float64, over the largest logit. Phases
# alone are rounded by up to 100 * 2**-24 = 6e-6 there, and 6.3e-6 is the worst that was seen.
ORACLE = 3e-5


def scaled(rope_type: str, *, max_position_embeddings: int = 128, **numbers: Any) -> dict[str, Any]:
    """Arguments of transformers' config for a kind of RoPE; a wide head has frequencies to tell."""
    rope = {"rope_type": rope_type, "rope_theta": 100.0, **numbers}
    return {
        "head_dim": 32,
        "max_position_embeddings": max_position_embeddings,
        "rope_parameters": rope,
    }


ORIGINAL = {"original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "beta_fast": 2.0, **ORIGINAL}
ROPE = {
    "default": scaled("default"),
    "linear": scaled("linear", factor=4.0),
    "dynamic": scaled("dynamic", factor=2.0, max_position_embeddings=32),
    "yarn": scaled("yarn", **YARN),
    "yarn, not truncated": scaled("yarn", **YARN, truncate=False),
    "yarn, default betas": scaled("yarn", factor=4.0, **ORIGINAL),
    "yarn, beta_slow": scaled("yarn", **YARN, beta_slow=0.3),
    "yarn, attention_factor": scaled("yarn", **YARN, attention_factor=0.7),
    "yarn, mscale": scaled("yarn", **YARN, mscale=1.0, mscale_all_dim=0.5),
    "llama3": scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL),
}
# transformers reads one mscale without the other as none, and takes the context for the original.
SAME_AS_YARN = {
    "yarn, one mscale": scaled("yarn", **YARN, mscale=0.5),
    "yarn, no original context": scaled(
        "yarn", factor=4.0, beta_fast=2.0, max_position_embeddings=32
    ),
}
LLAMA = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "head_dim": {"head_dim": 20},
    "tied": {"tie_word_embeddings": True},
    **ROPE,
    **SAME_AS_YARN,
}
CASES = {
    **{name: ("Llama", options) for name, options in LLAMA.items()},
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "qwen3, biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen2, window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen2, window on all": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen2, window unused": ("Qwen2", {"use_sliding_window": False, "sliding_window": 9}),
    "float16": ("Llama", {"dtype": torch.float16}),
    "bfloat16": ("Qwen2", {"dtype": torch.bfloat16}),
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint, as transformers runs it in float32, and as we do."""

    theirs: Any
    ours: Llama
    oracle: Llama

    def theirs_on(self, ids: Any, **options: Any) -> Any:
        with torch.no_grad():
            # Short texts after long ones keep the frequencies of those ("dynamic"), until a text
            # comes that fits into the trained context.
            self.theirs(torch.zeros((1, 1), dtype=torch.int64))
            logits = self.theirs(torch.from_numpy(ids), use_cache=False, **options).logits
        return logits.numpy()

    def assert_rounded_as_well(self, logits: Any, theirs: Any, exact: Any) -> None:
        """Our error is at most 4 times theirs.

        Where their few errors cancel by luck, so need not ours: 4 ulps of the largest logit are
        always allowed, which is what the last product, of 48 terms, may add by itself.
        """
        assert logits.dtype == np.float32
        assert exact.dtype == np.float64
        ulps = 4 * np.spacing(np.abs(exact).max().astype(np.float32))
        error, their_error = (np.abs(run - exact).max() for run in (logits, theirs))
        assert error <= 4 * their_error + ulps


def make_pair(directory: Any, family: str, options: dict[str, Any]) -> Pair:
    """Write random weights with transformers, of a size that makes attention sharp."""
    torch.manual_seed(1)
    options = BASE | options
    dtype = options.pop("dtype", torch.float32)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, centre, 0.3)
    model.to(dtype).save_pretrained(directory, max_shard_size="60KB")
    return Pair(
        type(model).from_pretrained(directory, dtype=torch.float32).eval(),
        load(directory),
        load(directory, dtype="float64"),
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each pair, made when first asked for."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            made[name] = make_pair(tmp_path_factory.mktemp("tiny"), *CASES[name])
        return made[name]

    return get


@pytest.fixture
def pair(request: pytest.FixtureRequest, pairs: Any) -> Pair:
    """The pair of a case."""
    return pairs(request.param)


def some_ids(rng: np.random.Generator, *shape: int) -> Any:
    return rng.integers(0, BASE["vocab_size"], shape)


def in_chunks(model: Llama, ids: Any, cuts: list[int], cache: KVCache, mask: Any = None) -> Any:
    """The logits of a pass that is cut before some tokens."""
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        own = None if mask is None else mask[:, :stop]
        logits, cache = forward(model, ids[:, start:stop], cache=cache, attention_mask=own)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_whole(pair, rng):
    ids = some_ids(rng, 2, TOKENS)
    theirs, exact = pair.theirs_on(ids), forward(pair.oracle, ids).logits
    np.testing.assert_allclose(theirs, exact, rtol=0, atol=ORACLE * np.abs(exact).max())
    pair.assert_rounded_as_well(forward(pair.ours, ids).logits, theirs, exact)


def test_oracle_is_in_float64_throughout(pairs, rng):
    rounded = {}

    def tap(name, array):
        assert array.dtype == np.float64, name
        rounded[name] = np.mean(array == array.astype(np.float32))
        return array

    forward(pairs("yarn").oracle, some_ids(rng, 2, TOKENS), tap=tap)
    assert rounded.pop("model.embed_tokens") == 1  # as stored
    assert len(rounded) > 3 * 10
    for name, share in rounded.items():  # values of the first token are attended to unchanged
        assert share < 0.02, name


def test_every_kind_of_rope_is_another(pairs, rng):
    """The kinds and their options, on the same weights, differ by far more than any error."""
    ids = some_ids(rng, 1, TOKENS)
    exact = {name: forward(pairs(name).oracle, ids).logits for name in ROPE}
    for first, second in itertools.combinations(exact, 2):
        apart = np.abs(exact[first] - exact[second]).max()
        assert apart > 1000 * ORACLE * np.abs(exact[first]).max(), (first, second)


@pytest.mark.parametrize("pair", [name for name in CASES if name != "dynamic"], indirect=True)
def test_in_chunks_and_token_by_token(pair, rng):
    ids = some_ids(rng, 2, TOKENS)
    theirs, exact = pair.theirs_on(ids), forward(pair.oracle, ids).logits
    cuts = sorted(rng.choice(np.arange(1, 60), 4, replace=False).tolist())
    cache = KVCache.create(pair.ours, 2, TOKENS)
    logits = in_chunks(pair.ours, ids, [*cuts, *range(60, TOKENS)], cache)
    pair.assert_rounded_as_well(logits, theirs, exact)


@pytest.mark.parametrize("pair", ["dynamic"], indirect=True)
def test_dynamic_in_chunks(pair, rng):
    """The frequencies of each chunk are those of the length so far, as in transformers."""
    ids, cuts = some_ids(rng, 2, TOKENS), [20, 33, 34, 70]
    cache, parts = transformers.DynamicCache(), []
    pair.theirs_on(ids[:, :1])  # forgets the longer texts that it has seen
    with torch.no_grad():
        for part in np.split(ids, cuts, axis=1):
            output = pair.theirs(
                torch.from_numpy(part), use_cache=True, **cached(pair.theirs, cache)
            )
            parts.append(output.logits.numpy())
    theirs = np.concatenate(parts, axis=1)
    exact = in_chunks(pair.oracle, ids, cuts, KVCache.create(pair.oracle, 2, TOKENS))
    np.testing.assert_allclose(theirs, exact, rtol=0, atol=ORACLE * np.abs(exact).max())
    logits = in_chunks(pair.ours, ids, cuts, KVCache.create(pair.ours, 2, TOKENS))
    pair.assert_rounded_as_well(logits, theirs, exact)
    assert np.abs(exact - forward(pair.oracle, ids).logits).max() > 0.1  # and not of the whole


@pytest.mark.parametrize("pair", ["mistral", "qwen2, window on all"], indirect=True)
@pytest.mark.parametrize("most", [1, 8])
def test_rolling_cache(pair, most, rng):
    ids = some_ids(rng, 2, TOKENS)
    theirs, exact = pair.theirs_on(ids), forward(pair.oracle, ids).logits
    cache = KVCache.create(pair.ours, 2, TOKENS, rolling=most)
    assert cache.capacity < 20
    logits = in_chunks(pair.ours, ids, list(range(most, TOKENS, most)), cache)
    pair.assert_rounded_as_well(logits, theirs, exact)


def padded_batch(rng: np.random.Generator, side: str, count: int) -> Any:
    """Ids, a mask of them as transformers has it, and the positions that generate gives them."""
    mask = (np.arange(count) < np.asarray([count, 37, 5])[:, None]).astype(np.int64)
    if side == "left":
        mask = np.ascontiguousarray(mask[:, ::-1])
    return some_ids(rng, 3, count), mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0)


PADDED = ["gqa", "llama3", "mistral", "qwen2, window", "bfloat16"]


@pytest.mark.parametrize("pair", [*PADDED, "dynamic"], indirect=True)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(pair, side, rng):
    """The logits of the real tokens, whatever the others are."""
    ids, mask, positions = padded_batch(rng, side, 60)
    real = mask == 1
    theirs = pair.theirs_on(
        ids, attention_mask=torch.from_numpy(mask), position_ids=torch.from_numpy(positions)
    )[real]
    exact = forward(pair.oracle, ids, attention_mask=mask).logits[real]
    np.testing.assert_allclose(theirs, exact, rtol=0, atol=ORACLE * np.abs(exact).max())
    logits = forward(pair.ours, ids, attention_mask=mask).logits[real]
    pair.assert_rounded_as_well(logits, theirs, exact)


@pytest.mark.parametrize("pair", PADDED, indirect=True)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_in_chunks(pair, side, rng):
    ids, mask, positions = padded_batch(rng, side, 60)
    real = mask == 1
    theirs = pair.theirs_on(
        ids, attention_mask=torch.from_numpy(mask), position_ids=torch.from_numpy(positions)
    )[real]
    exact = forward(pair.oracle, ids, attention_mask=mask).logits[real]
    cache = KVCache.create(pair.ours, 3, 60)
    logits = in_chunks(pair.ours, ids, [3, 7, 30, 59], cache, mask)[real]
    pair.assert_rounded_as_well(logits, theirs, exact)


@pytest.mark.parametrize("pair", ["gqa", "mistral", "qwen2", "tied"], indirect=True)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_texts(pair, penalty, rng):
    """A batch of prompts, padded before their first token, some of which end early."""
    ids, lengths = some_ids(rng, 8, 20), rng.integers(1, 21, 8)
    mask = (np.arange(20) >= 20 - lengths[:, None]).astype(np.int64)
    ids[mask == 0] = ids[:, -1:].repeat(20, axis=1)[mask == 0]  # seen, for the penalty, either way
    options = {"eos_token_id": list(range(3, 9)), "repetition_penalty": penalty}
    theirs = pair.theirs.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
        **options,
    )[:, 20:]
    model = replace(pair.ours, config=replace(pair.ours.config, pad_token_id=0))
    options["eos_token_id"] = tuple(options["eos_token_id"])
    steps = generate(model, ids, attention_mask=mask, max_new_tokens=24, **options)
    ours = np.stack(list(steps), axis=1)
    assert (ours == 0).any()
    np.testing.assert_array_equal(ours, theirs)
