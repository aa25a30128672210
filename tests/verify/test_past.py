"""Traces of later tokens alone: the keys and values of the past, or their want."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from llama_layers import KVCache, forward
from llama_layers.errors import TraceError
from llama_layers.verify import Trace, check, record
from llama_layers.verify.validate import validated
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights

PAST = 5
ATTENTION = ("self_attn.scores", "self_attn.probabilities", "self_attn.attention")
EVERY = ["*", "scores", "probabilities"]


def whole_run(config=GQA, dtype=np.float32, **options):
    """A model and a trace of all tokens at once."""
    model = model_of(config, random_weights(config, 3, dtype))
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 8))
    return model, record(model, ids, **options)


def part(trace, tokens, **more):
    """Some tokens of a trace of all, at their positions."""
    pairs = {"self_attn.scores", "self_attn.probabilities"}
    arrays = {
        name: array[:, :, tokens]
        if name.partition(".layers.")[2][2:] in pairs
        else array[:, tokens]
        for name, array in trace.arrays.items()
    }
    mask = trace.attention_mask
    return Trace(
        arrays | more,
        trace.input_ids[:, tokens],
        np.asarray(trace.positions)[..., tokens],
        None if mask is None else mask[:, tokens],
    )


def past_arrays(trace, config, count=PAST):
    """What a cache has of the first tokens, from the trace of all."""
    heads = (config.num_key_value_heads, config.head_dim)
    keys = "k_norm" if config.qk_norm_after_rope else "k_rope"
    arrays = {}
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn."
        arrays[name + "past_key"] = trace.arrays[name + keys][:, :count]
        values = trace.arrays[name + "v_proj"][:, :count]
        arrays[name + "past_value"] = values.reshape(*values.shape[:2], *heads)
    return arrays


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_arrays_of_the_past(kind):
    config = CONFIGS[kind]
    model, trace = whole_run(config, sites=EVERY)
    step = part(trace, slice(PAST, None), **past_arrays(trace, config))
    report = check(step, model)
    assert report.verdict == "PASS", report
    assert len(report.results) == len(trace.arrays)
    assert all(r.judgement is not None for r in report.results if r.site.role in ATTENTION)


@pytest.mark.parametrize("sites", [EVERY, None])
def test_without_them_attention_is_not_judged(sites):
    model, trace = whole_run(sites=sites)
    for tokens in (slice(7, None), slice(PAST, None)):
        report = check(part(trace, tokens), model)
        assert report.verdict == "PASS", report
        waiting = [r for r in report.results if r.judgement is None]
        roles = ATTENTION if sites else ATTENTION[-1:]
        # Probabilities follow from recorded scores alone.
        judged = {"self_attn.probabilities"} if sites else set()
        assert {r.site.role for r in waiting} == set(roles) - judged
        assert all(r.note.startswith("not judged: its first token") for r in waiting)
        assert all("--past" in r.note for r in waiting)


def test_a_trace_of_the_past():
    model, trace = whole_run()
    past = part(trace, slice(None, PAST))
    assert check(part(trace, slice(PAST, None)), model, past=past).verdict == "PASS"
    middle = part(trace, slice(3, PAST), **past_arrays(trace, GQA, 3))
    report = check(part(trace, slice(PAST, None)), model, past=middle)
    assert report.verdict == "PASS", report
    shorter = part(trace, slice(None, PAST - 1))
    with pytest.raises(TraceError, match=r"past: expected tokens up to position 4, .* up to 3"):
        check(part(trace, slice(PAST, None)), model, past=shorter)
    counted = replace(part(trace, slice(PAST, None)), positions=None)
    assert check(counted, model, past=past).verdict == "PASS"


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_layout_of_the_past(layout):
    """Pairs next to each other, in the keys of the past, too."""
    model, trace = whole_run()
    step = part(trace, slice(PAST, None), **past_arrays(trace, GQA))

    def interleaved(name, array):
        if layout == "half" or not name.endswith(("q_proj", "k_proj", "_rope", "past_key")):
            return array
        halves = array.reshape(*array.shape[:2], -1, 2, GQA.head_dim // 2)
        return np.swapaxes(halves, -1, -2).reshape(array.shape)

    arrays = {name: interleaved(name, array) for name, array in step.arrays.items()}
    assert check(replace(step, arrays=arrays), model, rope_layout=layout).verdict == "PASS"


def test_padding_of_the_past():
    mask = np.ones((2, 8), int)
    mask[1, :2] = 0
    model, trace = whole_run(attention_mask=mask)
    more = past_arrays(trace, GQA)
    step = part(trace, slice(PAST, None), **more)
    padded = replace(step, attention_mask=mask)
    assert check(padded, model).verdict == "PASS"
    assert check(replace(padded, positions=None), model).verdict == "PASS"
    past = part(trace, slice(None, PAST))
    assert check(part(trace, slice(PAST, None)), model, past=past).verdict == "PASS"
    unpadded = check(step, model)
    assert unpadded.first.site.role == "self_attn.attention"


@pytest.mark.parametrize(
    ("kind", "options"), [("gqa", {}), ("window", {}), ("window", {"rolling": 1})]
)
def test_our_recorder(kind, options):
    config = CONFIGS[kind]
    model, trace = whole_run(config)
    cache = KVCache.create(model, 2, 16, **options)
    for token in range(PAST):
        cache = forward(model, trace.input_ids[:, token : token + 1], cache=cache).cache
    length = cache.length
    step = record(model, trace.input_ids[:, PAST : PAST + 1], cache=cache)
    assert cache.length == length
    assert step.positions.tolist() == [PAST]
    assert check(step, model).verdict == "PASS"
    name = "model.layers.1.self_attn.past_key"
    kept = step.arrays[name].shape[1]
    exact = trace.arrays["model.layers.1.self_attn.k_rope"][:, PAST - kept : PAST]
    assert np.allclose(step.arrays[name], exact, rtol=1e-4, atol=1e-5)


def test_a_wrong_key_of_the_past_is_found():
    model, trace = whole_run()
    more = past_arrays(trace, GQA)
    more["model.layers.1.self_attn.past_key"] = 1.5 * more["model.layers.1.self_attn.past_key"]
    report = check(part(trace, slice(PAST, None), **more), model)
    assert report.first.site.name == "model.layers.1.self_attn.attention"
    assert len(report.failures) == 1


@pytest.mark.parametrize("role", ["scores", "probabilities", "attention"])
def test_mistakes_are_looked_for_with_a_past(role):
    """No mistake of the register stumbles over queries and keys of different numbers."""
    model, trace = whole_run(sites=EVERY)
    step = part(trace, slice(PAST, None), **past_arrays(trace, GQA))
    name = f"model.layers.0.self_attn.{role}"
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(step.arrays[name].shape).astype(np.float32)
    arrays = {**step.arrays, name: step.arrays[name] + noise}
    if role == "attention":
        arrays = {n: a for n, a in arrays.items() if not n.endswith(("scores", "probabilities"))}
    report = check(replace(step, arrays=arrays), model)
    assert report.first.site.name == name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda k, v: {"past_key": k}, "past_value: expected it beside"),
        (
            lambda k, v: {"past_key": k.swapaxes(1, 2), "past_value": v.swapaxes(1, 2)},
            "transpose axes 1 and 2, heads and tokens",
        ),
        (lambda k, v: {"past_key": k, "past_value": v[:, 1:]}, "past_value: expected shape"),
        (lambda k, v: {"past_key": k.astype(int), "past_value": v}, "expected one of the dtypes"),
    ],
)
def test_refused(change, said):
    model, trace = whole_run()
    name = "model.layers.0.self_attn."
    found = past_arrays(trace, GQA)
    more = change(found[name + "past_key"], found[name + "past_value"])
    step = part(trace, slice(PAST, None), **{name + key: array for key, array in more.items()})
    with pytest.raises(TraceError, match=said):
        check(step, model)


def test_a_whole_cache_instead_of_new_keys():
    model, trace = whole_run()
    step = part(trace, slice(PAST, None))
    name = "model.layers.0.self_attn.k_rope"
    arrays = {**step.arrays, name: trace.arrays[name]}
    with pytest.raises(TraceError, match=r"write the first 5 tokens.*as self_attn\.past_key"):
        check(replace(step, arrays=arrays), model)


def test_the_past_of_another_batch():
    model, trace = whole_run()
    past = part(trace, slice(None, PAST))
    one = Trace({n: a[:1] for n, a in past.arrays.items()}, past.input_ids[:1])
    with pytest.raises(TraceError, match="past: expected 2 sequences"):
        check(part(trace, slice(PAST, None)), model, past=one)


def test_a_past_without_its_own():
    model, trace = whole_run()
    middle = part(trace, slice(3, PAST))
    with pytest.raises(TraceError, match="from the first token on, got one from position 3 on"):
        check(part(trace, slice(PAST, None)), model, past=middle)


def test_a_past_beside_that_of_the_trace():
    model, trace = whole_run()
    past, step = part(trace, slice(None, PAST)), part(trace, slice(PAST, None))
    earlier = record(model, past.input_ids)
    cache = forward(model, past.input_ids, cache=KVCache.create(model, 2, 8)).cache
    own = record(model, step.input_ids, cache=cache)
    assert check(own, model).verdict == "PASS"
    with pytest.raises(TraceError, match="past: expected nothing, since the trace has keys and va"):
        check(own, model, past=earlier)


def test_unknown_names_in_the_past():
    model, trace = whole_run()
    past = part(trace, slice(None, PAST), zzz=np.ones(1))
    with pytest.raises(TraceError, match="past: expected names of sites"):
        check(part(trace, slice(PAST, None)), model, past=past)
    report = check(part(trace, slice(PAST, None)), model, past=past, ignore_unknown=True)
    assert report.verdict == "PASS"


def test_positions_that_were_not_written():
    """Those of the rotations are told, however far from the first they are."""
    model = model_of(GQA, random_weights(GQA, 3, np.float32))
    ids = np.random.default_rng(1).integers(0, GQA.vocab_size, (2, 43))
    step = replace(part(record(model, ids), slice(40, None)), positions=None)
    found = check(step, model).first
    assert found.site.role == "self_attn.q_rope"
    assert [cause.name for cause in found.explanations] == ["RoPE at other positions"]
    said = "tokens 0..2 at positions 40..42 instead of positions 0..2; if that is meant, the trace"
    assert said in found.explanations[0].detail


def test_in_jobs(tmp_path):
    """Each job has the past of its layers, as places of files."""
    model, trace = whole_run()
    step = part(trace, slice(PAST, None), **past_arrays(trace, GQA))
    step.save(tmp_path / "step.safetensors")
    opened = Trace.load(tmp_path / "step.safetensors")
    with ThreadPoolExecutor(1) as executor:
        report = check(opened, model, executor=executor)
    assert replace(report, seconds=0.0) == replace(check(opened, model), seconds=0.0)
    past = validated(opened, model.config).past
    assert len(pickle.dumps(past)) < len(pickle.dumps(step.arrays)) / 2
    again = pickle.loads(pickle.dumps(past))
    assert again.count(1) == PAST
