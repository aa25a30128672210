"""Ports with a mistake made in naive code: it is found at its site, and named first."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers import KVCache, forward
from llama_layers.verify import Trace, check, judge, mistakes, sites
from llama_layers.verify.build import operation_of
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes import Kind
from llama_layers.verify.operations import Logprobs
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.validate import validated
from tests.support.mistakes import MISTAKES, Mistake
from tests.support.ported import (
    BASE,
    CONFIGS,
    COUNT,
    LAYER,
    WEIGHTS,
    attended,
    causal,
    omega,
    run,
    softmax,
    told,
    turned,
)
from tests.support.random_models import model_of

NAME = f"model.layers.{LAYER}.self_attn"
# Named in tests of their own.
ELSEWHERE = {
    "another token's logits",
    "NaN or Inf begins here",
    "RoPE layout half",
    "another token's norm",
    "cache shared by all layers",
    "hidden states one place late",
    "other token ids",
    "result cut off",
    "parts of ranks added in bfloat16",
    "parts of ranks added in float16",
    *(m.name for m in mistakes.MISTAKES if m.operations is Logprobs),  # test_logprob_mistakes.py
}


@pytest.mark.parametrize(
    "mistake",
    [m for m in MISTAKES if m.config in CONFIGS],  # others are of families alone
    ids=lambda m: f"{m.name}, {m.role or 'layer'}",
)
def test_named_first(mistake):
    """And nothing else is named, but what leaves the same array."""
    report = check(*run(mistake))
    assert report.first.site.name == mistake.site
    assert report.first.verdict == "FAIL"
    assert [result.site.name for result in report.failures] == [mistake.site]
    names = told(report)
    assert names[:1] == [mistake.name]
    assert set(names) == {mistake.name, *mistake.also}
    for explanation in report.first.explanations:
        assert 0 <= explanation.ratio <= 1
        assert explanation.detail.endswith(".")


PORTED = {mistake.name for mistake in MISTAKES} | ELSEWHERE


def test_only_mistakes_in_formulas_need_no_port():
    """Whatever is read off the port's own array needs a port to read it off."""
    assert {m.name for m in mistakes.MISTAKES} >= PORTED
    assert not {m.name for m in mistakes.MISTAKES if m.kind >= Kind.SOLVED} - PORTED


# Those of the register that have no port here, and some that have, so that there are any.
REGISTERED = [
    m for m in mistakes.MISTAKES if m.kind < Kind.SOLVED and (m.common or m.name not in PORTED)
]


@pytest.mark.parametrize("mistake", REGISTERED, ids=lambda m: m.name)
def test_a_port_made_of_the_register(mistake):
    """It computes the wrong formula, rounds once, and goes on."""
    for planted in planted_from(mistake):
        report = check(*run(planted))
        assert report.first.site.name == planted.site
        assert told(report)[0] == mistake.name
        return
    pytest.fail("no site shows the mistake")


def planted_from(mistake):
    """The mistake at each site at which it makes a difference."""
    for config in CONFIGS:
        right = Mistake("none", "input_layernorm", lambda p: p.right, config)
        trace, model = run(right)
        recorded = validated(trace, model.config)
        for site in sites(model.config):
            if site.optional or site.layer not in (None, LAYER):
                continue
            operation = operation_of(site, recorded.route(site), recorded, model)
            array, formats = recorded.array(site.name), Rounding("float32", "float32")
            at = FailingSite(site, operation, array, formats, recorded, model)
            for change in mistake.applied(at):
                exact = change.operation.bound(formats).exact
                wrong = Mistake(mistake.name, site.role, lambda p, y=exact: y, config)
                wrong = wrong._replace(role="" if site.role == "layer" else site.role)
                if judge(exact.astype(np.float32), at.bound(formats)).verdict == "FAIL":
                    yield wrong


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_is_said_of_a_correct_port(config, padded):
    right = Mistake("none", "input_layernorm", lambda p: p.right, config, padded=padded)
    trace, model = run(right)
    report = check(trace, model)
    assert report.agrees
    assert not any(result.explanations for result in report.results)


def test_attention_of_padding_may_be_anything():
    def wrong(p):
        y = p.right.copy()
        y[1, :4] = 7.0
        return y

    assert check(*run(Mistake("none", "self_attn.attention", wrong, padded=True))).agrees
    assert not check(*run(Mistake("none", "self_attn.attention", wrong))).agrees


@pytest.mark.parametrize(
    ("name", "config", "layout"),
    [
        ("RoPE layout half", "base", "half"),
        ("partial RoPE", "partial RoPE", "interleaved"),
    ],
)
def test_pairs_next_to_each_other(name, config, layout):
    """A port whose channels are in pairs 2i and 2i + 1; what it computes, it computes of those."""
    trace, model = run(Mistake("none", "input_layernorm", lambda p: p.right, config))
    width = model.config.rotary_dim
    pairs = np.arange(width).reshape(2, -1).T.ravel()
    stored = np.concatenate([pairs, np.arange(width, model.config.head_dim)])

    def as_stored(array):
        heads = array.reshape(*array.shape[:2], -1, model.config.head_dim)
        return heads[..., stored].reshape(array.shape)

    arrays = {
        site: as_stored(array) if site.endswith(("q_proj", "k_proj", "_rope")) else array
        for site, array in trace.arrays.items()
    }
    trace = replace(trace, arrays=arrays, metadata={"rope_layout": "interleaved"})
    assert check(trace, model).agrees
    x = arrays[f"{NAME}.k_proj"].reshape(2, COUNT, -1, model.config.head_dim)
    wrong = turned(x, np.outer(np.arange(COUNT), omega(model.config)), layout)
    arrays[f"{NAME}.k_rope"] = wrong.astype(np.float32)
    report = check(replace(trace, arrays=arrays), model)
    assert report.first.site.name == f"{NAME}.k_rope"
    assert told(report) == [name]


ROUNDING = {m.name for m in mistakes.MISTAKES if m.kind is Kind.ROUNDING or m.loosens}
FLOAT64 = [
    m
    for m in MISTAKES
    if m.config == "base" and not m.padded and not m.first and m.name not in ROUNDING
][::8]
# In float64 these are not named yet.
FLOAT64 = [m for m in FLOAT64 if m.name not in ("a low-rank product added", "mish for silu")]


@pytest.mark.parametrize("mistake", FLOAT64, ids=lambda m: f"{m.name}, {m.role or 'layer'}")
def test_float64(mistake):
    """A mistake made in float64 is explained within the bounds of float64."""
    report = check(*run(mistake._replace(dtype=np.float64)))
    assert report.first.site.name == mistake.site
    assert told(report)[0] == mistake.name


BFLOAT16 = """
RoPE layout interleaved; RoPE rotated the other way; another rope_theta; weight transposed;
keys and values swapped; RoPE permutation left in; bias missing; mean subtracted;
norm weight skipped; norm weight plus one; no causal mask; another scale of scores;
key heads tiled; gelu for silu; gate and up swapped in the product; residual missing
""".replace("\n", " ").split(";")


@pytest.mark.parametrize("name", [name.strip() for name in BFLOAT16])
def test_bfloat16(name):
    """A port whose every array is rounded to bfloat16: only its own site is kept wrong."""
    mistake = next(m for m in MISTAKES if m.name == name)
    trace, model = run(mistake)
    routes = next(r for r in check(trace, model).results if r.site.name == mistake.site).inputs
    arrays = {n: trace.arrays[n].astype(ml_dtypes.bfloat16) for n in routes}
    again = rounded_inputs(mistake, arrays)
    report = check(Trace(arrays | {mistake.site: again}, trace.input_ids), model)
    assert report.first.site.name == mistake.site
    assert told(report)[0] == name


def rounded_inputs(mistake, arrays):
    """The mistaken array in bfloat16, of inputs that are rounded to it."""
    wide = {name: array.astype(np.float32) for name, array in arrays.items()}

    def wrong(port):
        port.arrays = port.arrays | wide
        return mistake.wrong(port)

    trace, _ = run(mistake._replace(wrong=wrong))
    return trace.arrays[mistake.site].astype(ml_dtypes.bfloat16)


def test_result_cut_off():
    rng = np.random.default_rng(0)
    model = model_of(BASE, WEIGHTS["base"])
    x = rng.standard_normal((1, 9, 32)).astype(ml_dtypes.bfloat16)
    weight = WEIGHTS["base"][f"{NAME}.q_proj.weight"]
    y = x.astype(np.float32) @ weight.T
    cut = (y.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    for array, names in ((cut, ["result cut off"]), (y, [])):
        arrays = {
            f"model.layers.{LAYER}.input_layernorm": x,
            f"{NAME}.q_proj": array.astype(ml_dtypes.bfloat16),
        }
        failures = check(Trace(arrays), model).failures
        assert [e.name for result in failures for e in result.explanations] == names


def test_token_of_the_last_norm():
    """A port that keeps the logits of the last token only, and takes another for it."""
    trace, model = run(Mistake("none", "input_layernorm", lambda p: p.right))
    arrays = dict(trace.arrays)
    for name in ("model.norm", "lm_head"):
        arrays[name] = arrays[name][:, 3:4]
    report = check(Trace(arrays, trace.input_ids), model)
    assert report.first.site.name == "model.norm"
    assert told(report) == ["another token's norm"]
    assert "token 3;" in report.first.explanations[0].detail


def test_logits_of_another_token():
    """Of the last but one, and in a sequence of its own the first."""
    trace, model = run(Mistake("none", "self_attn.attention", lambda p: p.right))
    logits = trace.arrays["lm_head"]
    wrong = np.stack([logits[0, -2], logits[1, 0]])[:, None]
    report = check(replace(trace, arrays={**trace.arrays, "lm_head": wrong}), model)
    assert told(report) == ["another token's logits"]
    assert (
        "of token 12, 0; it should have those of the last, 13."
        in report.first.explanations[0].detail
    )


def test_cache_that_all_layers_share():
    """Each layer writes to one memory, and reads what the last layer wrote of earlier tokens."""
    model = model_of(BASE, WEIGHTS["base"])
    ids = np.random.default_rng(5).integers(0, BASE.vocab_size, (2, COUNT))
    memory = np.zeros((2, 2, COUNT, 2, 8))
    parts = {}

    def tap(name, array):
        at = slice(start, stop)
        if name.endswith("k_rope"):
            memory[0, :, at] = array
        if name.endswith("v_proj"):
            memory[1, :, at] = array.reshape(2, -1, 2, 8)
        if name.endswith("attention"):
            q = parts[name.replace("attention", "q_rope")][-1]
            keys = memory[:, :, :stop]
            array = attended(q, *keys, causal(COUNT)[start:stop, :stop]).astype(np.float32)
        parts.setdefault(name, []).append(array)
        return array

    cache = KVCache.create(model, 2, COUNT)
    for start, stop in ((0, 5), (5, 6), (6, 10), (10, COUNT)):
        cache = forward(model, ids[:, start:stop], cache=cache, tap=tap).cache
    arrays = {name: np.concatenate(chunks, axis=1) for name, chunks in parts.items()}
    report = check(Trace(arrays, ids), model)
    assert report.first.site.name == "model.layers.0.self_attn.attention"
    assert told(report) == ["cache shared by all layers"]
    assert "start at tokens 0, 5, 6, 10." in report.first.explanations[0].detail


def pairwise(q, k, allowed, scale):
    """Scores [B, heads, S, T] of grouped heads."""
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = np.einsum("bshd,bthd->bhst", q.astype(np.float64), k) * scale
    return np.where(allowed, scores, -np.inf)


@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("scores", "another scale of scores"),
        ("probabilities", "no causal mask"),
        ("probabilities", "softmax over the queries"),
        ("attention", "key heads tiled"),
        ("attention", "keys for values"),
    ],
)
def test_sites_of_pairs(site, name):
    trace, model = run(Mistake("none", "input_layernorm", lambda p: p.right))
    arrays = dict(trace.arrays)
    q, k = arrays[f"{NAME}.q_rope"], arrays[f"{NAME}.k_rope"]
    v = arrays[f"{NAME}.v_proj"].reshape(k.shape)
    allowed = np.ones((COUNT, COUNT), bool) if name == "no causal mask" else causal(COUNT)
    scores = pairwise(q, k, causal(COUNT), 1.0 if "scale" in name else 8**-0.5)
    arrays[f"{NAME}.scores"] = scores.astype(np.float32)
    p = softmax(pairwise(q, k, allowed, 8**-0.5))
    if "queries" in name:
        e = np.exp(scores)
        p = e / e.sum(axis=-2, keepdims=True)
    arrays[f"{NAME}.probabilities"] = p.astype(np.float32)
    if site == "probabilities":
        del arrays[f"{NAME}.scores"]
    if site == "attention":
        v = k if "values" in name else v
        order = [0, 1, 0, 1] if "tiled" in name else [0, 0, 1, 1]
        y = np.einsum("bhst,bthd->bshd", p, v[:, :, order])
        arrays[f"{NAME}.attention"] = y.astype(np.float32)
    report = check(Trace(arrays, trace.input_ids), model)
    assert report.first.site.name == f"{NAME}.{site}"
    assert told(report)[0] == name
