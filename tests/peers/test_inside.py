"""Masks, taps, processors and log-probabilities on torch and jax, and against transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llama_layers import KVCache, Llama, forward, generate, logprobs
from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify import check, record
from tests.peers.test_decoder_namespaces import LIBRARIES, made, on, some_ids
from tests.support.random_models import model_of, random_weights
from tests.support.torch_models import random_model
from tests.test_forward import FLOAT32, assert_close

pytestmark = pytest.mark.peer

COUNT = 9
# Norms and RoPE of transformers are float32 in a float64 model, too.
THEIRS = {"rtol": 0, "atol": 1e-6}


def random_rule(rng, *batch):
    rule = rng.random((*batch, COUNT, COUNT)) < 0.6
    return rule & np.tri(COUNT, dtype=bool) | np.eye(COUNT, dtype=bool)


@pytest.fixture(scope="module")
def pair():
    """A model of transformers in float64 that gives its patterns, and ours of the same tensors."""
    theirs = random_model(attn_implementation="eager").double().eval()
    return theirs, Llama.from_state_dict(theirs.state_dict(), theirs.config)


def ids_of(rng, *shape):
    return torch.from_numpy(rng.integers(0, 96, shape))


def test_patterns_of_transformers(pair, rng):
    theirs, ours = pair
    ids = ids_of(rng, 2, COUNT)
    with torch.no_grad():
        expected = theirs(ids, output_attentions=True).attentions
    seen = {}
    forward(ours, ids, tap={"probabilities": lambda name, p: seen.setdefault(name, p)})
    assert len(seen) == len(expected) == 3
    for found, layer in zip(seen.values(), expected, strict=True):
        torch.testing.assert_close(found, layer, **THEIRS)


def test_masks_of_transformers(pair, rng):
    """There a mask with an axis for heads is added to the scores."""
    theirs, ours = pair
    ids, rule = ids_of(rng, 2, COUNT), torch.from_numpy(random_rule(rng, 2))
    added = torch.where(rule, 0.0, -torch.inf).double()[:, None]
    with torch.no_grad():
        expected = theirs(ids, attention_mask=added).logits
    torch.testing.assert_close(forward(ours, ids, mask=rule).logits, expected, **THEIRS)


def test_inputs_embeds_of_transformers(pair, rng):
    theirs, ours = pair
    vectors = torch.from_numpy(rng.standard_normal((2, COUNT, 48)))
    with torch.no_grad():
        expected = theirs(inputs_embeds=vectors).logits
    found = forward(ours, inputs_embeds=vectors).logits
    torch.testing.assert_close(found, expected, **THEIRS)


def test_the_loss_of_transformers(pair, rng):
    theirs, ours = pair
    ids = ids_of(rng, 3, COUNT)
    with torch.no_grad():
        expected = theirs(ids, labels=ids).loss
    torch.testing.assert_close(-logprobs(ours, ids).mean(), expected.double(), **THEIRS)


def test_processors_of_transformers(pair, rng):
    """A list of them, as it is given to their generate, gives the same text and scores."""
    theirs, ours = pair
    ids = ids_of(rng, 2, 4)
    processors = transformers.LogitsProcessorList(
        [
            transformers.NoRepeatNGramLogitsProcessor(2),
            transformers.SuppressTokensLogitsProcessor([3, 5, 7, 11]),
            transformers.RepetitionPenaltyLogitsProcessor(1.4),
        ]
    )
    with torch.no_grad():
        expected = theirs.generate(
            ids, do_sample=False, max_new_tokens=12, logits_processor=processors,
            eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    options = {"max_new_tokens": 12, "logits_processor": processors, "eos_token_id": ()}
    steps = list(generate(ours, ids, **options, return_logprobs=True))
    found = torch.stack([step.ids for step in steps], dim=1)
    torch.testing.assert_close(found, expected.sequences[:, 4:])
    assert not (found == torch.stack(list(generate(ours, ids, max_new_tokens=12)), dim=1)).all()
    for step, logits in zip(steps, expected.logits, strict=True):
        likely = torch.log_softmax(logits.double(), dim=-1)
        own = likely.gather(1, step.ids[:, None])[:, 0]
        torch.testing.assert_close(step.logprobs, own, rtol=0, atol=1e-5)  # they round to float32


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("kind", ["gqa", "some windows"])
def test_on_each_library(name, kind, rng):
    """Masks, patched probabilities and log-probabilities as NumPy's float64 pass gives them."""
    xp, ids, rule = LIBRARIES[name], some_ids(rng, 2, COUNT), random_rule(rng, 2)
    model, exact = made(kind, xp=xp), made(kind, np.float64)
    wide = {k: a.astype(np.float64) for k, a in random_weights(exact.config, 0, np.float32).items()}
    exact = model_of(exact.config, wide)
    heads = rng.random((4, 1, 1)).astype(np.float32)

    def passed(model, array):
        tap = {"*.1.self_attn.probabilities": lambda name, p: p * array(heads)}
        cache = KVCache.create(model, 2, COUNT)
        first = forward(model, array(ids[:, :5]), cache=cache, mask=array(rule[:, :5, :5]), tap=tap)
        cache, later = first.cache, array(rule[:, 5:])
        rest = forward(model, array(ids[:, 5:]), cache=cache, mask=later, tap=tap)
        return [to_numpy(logits) for logits in (first.logits, rest.logits)]

    for found, expected in zip(passed(model, on(xp)), passed(exact, np.asarray), strict=True):
        assert found.dtype == np.float32
        assert_close(found, expected, FLOAT32)
    found, expected = logprobs(model, on(xp)(ids)), logprobs(exact, ids)
    assert_close(found, expected, FLOAT32)
    steps = generate(model, on(xp)(ids), max_new_tokens=3, return_logprobs=True)
    theirs = generate(exact, ids, max_new_tokens=3, return_logprobs=True)
    for step, other in zip(steps, theirs, strict=True):
        np.testing.assert_array_equal(to_numpy(step.ids), other.ids)
        assert_close(step.logprobs, other.logprobs, FLOAT32)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_probabilities_of_bfloat16_are_float32(name, rng):
    """So that a tap that returns them changes nothing but float32's roundings."""
    xp, ids = LIBRARIES[name], on(LIBRARIES[name])(some_ids(rng, 1, COUNT))
    model = made("gqa", "bfloat16", xp)
    dtypes = []
    tap = {"probabilities": lambda name, p: dtypes.append(dtype_name(p.dtype)) or p}
    found = forward(model, ids, tap=tap).logits
    assert dtypes == ["float32"] * 2
    assert dtype_name(found.dtype) == "bfloat16"
    plain = to_numpy(forward(model, ids).logits).astype(float)
    assert np.abs(to_numpy(found).astype(float) - plain).max() <= 2**-7 * np.abs(plain).max()
    trace = record(model, ids, sites=["*"])
    assert {dtype_name(a.dtype) for a in trace.arrays.values()} == {"bfloat16"}


def test_a_recorded_trace_of_torch_passes(rng):
    model = made("some windows", xp=torch)
    trace = record(model, on(torch)(some_ids(rng, 2, COUNT)), sites=["*"])
    assert check(trace, made("some windows")).verdict == "PASS"


class Compiled:
    """A step compiled by jax, with a mask that it is called with."""

    def __init__(self, model, **options):
        self.traces = 0

        def run(ids, cache, mask):
            self.traces += 1
            return forward(model, ids, cache=cache, mask=mask, **options)

        self.run = jax.jit(run)


@pytest.mark.parametrize(
    ("kind", "rolling"), [("gqa", None), ("some windows", None), ("window", None), ("window", 2)]
)
def test_compiled_masks(kind, rolling, rng):
    """The columns are all places of the cache, whose length is not known there."""
    ids, rule = some_ids(rng, 2, COUNT + 1), random_rule(rng, 2)
    rule = np.pad(rule, ((0, 0), (0, 1), (0, 1)), constant_values=True)
    rule &= np.tri(COUNT + 1, dtype=bool)
    model = made(kind, xp=jnp)
    step = Compiled(model)
    cache, parts = KVCache.create(model, 2, COUNT + 1, rolling=rolling), []
    for i in range(0, COUNT + 1, 2):
        logits, cache = step.run(on(jnp)(ids[:, i : i + 2]), cache, on(jnp)(rule[:, i : i + 2]))
        parts.append(to_numpy(logits))
    assert step.traces == 1
    exact = forward(made(kind), ids, mask=rule).logits
    assert_close(np.concatenate(parts, axis=1), exact.astype(float), FLOAT32)


def test_compiled_without_a_cache_and_with_taps(rng):
    ids, rule = some_ids(rng, 2, COUNT), random_rule(rng)
    off = np.array([1, 0, 1, 1], np.float32)[:, None, None]
    tap = {"probabilities": lambda name, p: p * off}
    step = Compiled(made("gqa", xp=jnp), tap=tap)
    found = step.run(on(jnp)(ids), None, on(jnp)(rule)).logits
    expected = forward(made("gqa"), ids, mask=rule, tap=tap).logits
    assert_close(found, expected.astype(float), FLOAT32)


def test_compiled_logprobs(rng):
    ids = some_ids(rng, 2, COUNT)
    model = made("gqa", xp=jnp)
    mask = np.arange(COUNT) >= np.array([[0], [4]])
    found = jax.jit(lambda ids, mask: logprobs(model, ids, attention_mask=mask))(
        on(jnp)(ids), on(jnp)(mask)
    )
    assert_close(found, logprobs(made("gqa"), ids, attention_mask=mask).astype(float), FLOAT32)


def test_compiled_inputs_embeds(rng):
    model = made("gqa", xp=jnp)
    vectors = rng.standard_normal((1, COUNT, 10)).astype(np.float32)
    found = jax.jit(lambda x: forward(model, inputs_embeds=x).logits)(on(jnp)(vectors))
    expected = forward(made("gqa"), inputs_embeds=vectors).logits
    assert_close(found, expected.astype(float), FLOAT32)


def test_a_wrong_mask_is_refused_while_compiling(rng):
    model = made("gqa", xp=jnp)
    cache = KVCache.create(model, 2, 12)
    with pytest.raises(ValueError, match=r"mask: expected shape \[3, 12\] or \[2, 3, 12\], got"):
        Compiled(model).run(on(jnp)(some_ids(rng, 2, 3)), cache, jnp.ones((3, 3), bool))
