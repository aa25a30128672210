"""Log-probabilities made of right logits in a wrong way: each is named, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers.verify import Trace, check, mistakes
from llama_layers.verify.operations import Logprobs
from tests.support.mistakes import Mistake
from tests.support.ported import BASE, WEIGHTS, run
from tests.support.random_models import model_of
from tests.verify.test_unbounded import IDS, MISTAKES_IN_LAYERS
from tests.verify.test_unbounded import Port as LayersPort

T = 0.7


def log_softmax(a):
    a = np.asarray(a, np.float64)
    m = a.max(axis=-1, keepdims=True)
    return a - (m + np.log(np.exp(a - m).sum(axis=-1, keepdims=True)))


def log_sum_exp(a):
    return a.astype(np.float64) - log_softmax(a)


def in_format(name):
    return lambda y: np.asarray(y, np.float32).astype(name).astype(np.float32)


bfloat16, float16 = in_format(ml_dtypes.bfloat16), in_format(np.float16)


def top_k(a, k):
    return np.where(a >= np.sort(a, axis=-1)[..., -k, None], a, -np.inf)


def top_p(a, p):
    kept = np.full(a.shape, -np.inf)
    for place in np.ndindex(a.shape[:-1]):
        mass = 0.0
        for token in np.argsort(-a[place]):
            kept[place][token] = a[place][token]
            mass += np.exp(log_softmax(a[place])[token])
            if mass >= p:
                break
    return kept


class Port:
    """What a wrong formula can see."""

    def __init__(self, trace):
        self.ids = np.asarray(trace.input_ids)
        self.logits = trace.arrays["lm_head"]
        self.states = trace.arrays["model.norm"]

    def pick(self, numbers, ids=None):
        """Of the next tokens, [B, S - 1]."""
        ids = self.ids[:, 1:] if ids is None else ids
        return np.take_along_axis(numbers[:, : ids.shape[1]], ids[..., None], axis=-1)[..., 0]

    @property
    def right(self):
        return self.pick(log_softmax(self.logits))


def sliding(p):
    """As vLLM's prompt_logprobs: number s is that of token s, the first is of no token."""
    return np.concatenate([np.zeros((2, 1)), p.right], axis=1)


def padded_vocabulary(p):
    zeros = np.zeros((*p.logits.shape[:2], 31))
    return p.pick(log_softmax(np.concatenate([p.logits, zeros], axis=-1)))


def wrong_head(p):
    weight = bfloat16(WEIGHTS["base"]["lm_head.weight"])
    return p.pick(log_softmax(bfloat16(bfloat16(p.states) @ weight.T)))


# What is planted, by the name that it is to have. Those with a temperature are checked at T.
PLANTED = {
    "another temperature": lambda p: p.pick(log_softmax(p.logits / 1.3)),
    "renormalised over the top k": lambda p: p.pick(log_softmax(top_k(p.logits, 20))),
    "renormalised over the top p": lambda p: p.pick(log_softmax(top_p(p.logits, 0.9))),
    "logits capped before the log-softmax": lambda p: p.pick(
        log_softmax(3 * np.tanh(p.logits.astype(float) / 3))
    ),
    "padding of the vocabulary counted": padded_vocabulary,
    "tokens shifted by one": sliding,
    "logarithm to base 2": lambda p: p.right / np.log(2),
    "logarithm to base 10": lambda p: p.right / np.log(10),
    "negative log-likelihood": lambda p: -p.right,
    "probabilities for log-probabilities": lambda p: np.exp(p.right),
    "logits for log-probabilities": lambda p: p.pick(p.logits),
    "logits less their maximum for log-probabilities": lambda p: p.pick(
        p.logits - p.logits.max(axis=-1, keepdims=True)
    ),
    "log-probabilities summed": lambda p: np.cumsum(p.right, axis=1),
    "log-softmax over the wrong axis": lambda p: p.pick(
        np.moveaxis(log_softmax(np.moveaxis(p.logits, 1, 2)), 2, 1)
    ),
    "head in bfloat16": lambda p: p.pick(log_softmax(bfloat16(p.logits))),
    "head in float16": lambda p: p.pick(log_softmax(float16(p.logits))),
    "log-sum-exp rounded to bfloat16": lambda p: p.pick(p.logits - bfloat16(log_sum_exp(p.logits))),
    "log-sum-exp rounded to float16": lambda p: p.pick(p.logits - float16(log_sum_exp(p.logits))),
    "logarithm of probabilities in bfloat16": lambda p: p.pick(
        np.log(bfloat16(np.exp(log_softmax(p.logits))))
    ),
    "logarithm of probabilities in float16": lambda p: p.pick(
        np.log(float16(np.exp(log_softmax(p.logits))))
    ),
}
OTHER_FORMS = {
    "log-probabilities summed": [
        lambda p: np.broadcast_to(p.right.sum(axis=1, keepdims=True), p.right.shape),
        lambda p: np.broadcast_to(p.right.mean(axis=1, keepdims=True), p.right.shape),
    ],
    "tokens shifted by one": [
        lambda p: p.pick(log_softmax(p.logits), p.ids),
        lambda p: np.concatenate([p.right[:, 1:], np.zeros((2, 1))], axis=1),
    ],
    "log-softmax over the wrong axis": [
        lambda p: p.pick(np.moveaxis(log_softmax(np.moveaxis(p.logits, 0, 2)), 2, 0))
    ],
}
FORMS = list(PLANTED.items())
FORMS += [(name, wrong) for name, others in OTHER_FORMS.items() for wrong in others]
ALONE = {"head in bfloat16": wrong_head}
# That can be told only with a temperature, padding or very unlikely tokens: below.
ELSEWHERE = {
    "temperature forgotten",
    "temperature applied twice",
    "padding counted",
    "logarithm of probabilities in float32",
}


@pytest.fixture(scope="module")
def right():
    return run(Mistake("none", "input_layernorm", lambda p: p.right))


def told(report):
    assert report.first.site.name == "logprobs"
    return [explanation.name for explanation in report.first.explanations]


def traced(trace, logprobs, *, alone=False, **fields):
    arrays = {} if alone else {"lm_head": trace.arrays["lm_head"]}
    arrays["logprobs"] = np.asarray(logprobs, np.float32)
    return Trace(arrays, trace.input_ids, **fields)


def test_every_one_is_planted():
    names = {m.name for m in mistakes.MISTAKES if m.operations is Logprobs}
    assert names == PLANTED.keys() | ELSEWHERE


@pytest.mark.parametrize(("name", "wrong"), FORMS, ids=[name for name, _ in FORMS])
def test_beside_the_logits(name, wrong, right):
    trace, model = right
    with np.errstate(divide="ignore"):
        report = check(traced(trace, wrong(Port(trace))), model)
    assert told(report) == [name]


# Named beside the logits. From float64's logits on, some are rounded to the number beside the
# port's, which can be too many.
_NOT_ALONE = {"head in float16"}


@pytest.mark.parametrize("name", [name for name in PLANTED if name not in _NOT_ALONE])
def test_alone(name, right):
    trace, model = right
    with np.errstate(divide="ignore"):
        wrong = ALONE.get(name, PLANTED[name])(Port(trace))
        report = check(traced(trace, wrong, alone=True), model)
    assert told(report)[0] == name


def _from_own_position(p):
    """Of each token s, the first as well, as the logits at s make it."""
    return p.pick(log_softmax(p.logits), p.ids)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("tokens shifted by one", _from_own_position),
        ("another temperature", PLANTED["another temperature"]),
        ("renormalised over the top k", PLANTED["renormalised over the top k"]),
    ],
)
def test_nothing_upstream_is_tried_where_the_site_explains_itself(name, wrong, right, monkeypatch):
    """What is tried in layers takes the whole model each time."""
    trace, model = right

    def refused(*_):
        raise AssertionError("a layer was changed")

    monkeypatch.setattr("llama_layers.verify.diagnose_unbounded._Between._made", refused)
    with np.errstate(divide="ignore"):
        report = check(traced(trace, wrong(Port(trace)), alone=True), model)
    assert told(report)[0] == name


def test_all_tokens_of_the_vocabulary(right):
    trace, model = right
    a = trace.arrays["lm_head"]
    for name, wrong in {
        "another temperature": log_softmax(a / 1.3),
        "renormalised over the top k": log_softmax(top_k(a, 20)),
        "logarithm to base 2": log_softmax(a) / np.log(2),
        "log-softmax over the wrong axis": np.moveaxis(log_softmax(np.moveaxis(a, 1, 2)), 2, 1),
    }.items():
        assert told(check(traced(trace, wrong), model)) == [name]
    assert check(traced(trace, log_softmax(a)), model).agrees


@pytest.mark.parametrize("stated", [T, 1.5])
def test_a_temperature_that_the_trace_states(stated, right):
    trace, model = right
    p, said = Port(trace), {"metadata": {"temperature": str(stated)}}
    assert check(traced(trace, p.pick(log_softmax(p.logits / stated)), **said), model).agrees
    wrong_ones = {"temperature forgotten": 1, "temperature applied twice": stated**2}
    for name, divisor in wrong_ones.items():
        wrong = p.pick(log_softmax(p.logits / divisor))
        assert told(check(traced(trace, wrong, **said), model))[0] == name


def test_padding_in_a_sum():
    trace, model = run(Mistake("none", "input_layernorm", lambda p: p.right, padded=True))
    p = Port(trace)
    mask = {"attention_mask": trace.attention_mask}
    keep = np.asarray(trace.attention_mask)
    both = keep[:, 1:] & keep[:, :-1]
    assert not both.all()
    report = check(traced(trace, np.cumsum(p.right, axis=1), **mask), model)
    assert told(report)[0] == "padding counted"
    report = check(traced(trace, np.cumsum(np.where(both, p.right, 0), axis=1), **mask), model)
    assert told(report)[0] == "log-probabilities summed"


def test_nothing_but_nan_is_no_shift(right):
    trace, model = right
    array = np.full((2, trace.input_ids.shape[1] - 1), np.nan)
    report = check(traced(trace, array, alone=True), model)
    assert (report.verdict, told(report)) == ("FAIL", [])
    assert "the port has NaN or Inf where float64 has not, or the reverse." in report.text(
        width=999
    )


def test_probabilities_that_underflow(right):
    """In float32 the exponential of -104 is 0."""
    trace, model = right
    logits = 60 * trace.arrays["lm_head"]
    p = Port(replace(trace, arrays={**trace.arrays, "lm_head": logits}))
    with np.errstate(all="ignore"):
        wrong = np.log(np.exp(p.right).astype(np.float32))
    assert np.isneginf(wrong).any()
    weights = replace(model.weights, lm_head=60 * model.weights.lm_head)
    trace = Trace({"lm_head": logits, "logprobs": wrong}, trace.input_ids)
    report = check(trace, replace(model, weights=weights))
    result = next(r for r in report.results if r.site.name == "logprobs")
    assert [e.name for e in result.explanations] == ["logarithm of probabilities in float32"]


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_few_wrong_tokens_are_no_temperature(tokens, right):
    """One number that is fitted to few tokens would explain anything."""
    trace, model = right
    rng = np.random.default_rng(tokens)
    wrong = Port(trace).right
    wrong[0, 3 : 3 + tokens] += rng.standard_normal(tokens)
    for alone in (False, True):
        report = check(traced(trace, wrong, alone=alone), model)
        assert not report.agrees
        assert told(report) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_narrow_formats(dtype, right):
    """Logits and log-probabilities that were both rounded."""
    trace, model = right
    narrow = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    logits = trace.arrays["lm_head"].astype(narrow)
    p = Port(replace(trace, arrays={**trace.arrays, "lm_head": logits.astype(np.float32)}))

    def checked(numbers):
        arrays = {"lm_head": logits, "logprobs": numbers.astype(narrow)}
        return check(Trace(arrays, trace.input_ids), model)

    assert checked(p.right).agrees
    for name in (
        "another temperature",
        "renormalised over the top k",
        "logarithm to base 2",
        "log-probabilities summed",
        "tokens shifted by one",
    ):
        assert told(checked(PLANTED[name](p)))[0] == name


@pytest.mark.parametrize("name", ["RoPE layout interleaved", "no causal mask", "layer left out"])
def test_mistakes_in_layers(name):
    """From log-probabilities alone the same is told as from logits alone."""
    logits = LayersPort(BASE, WEIGHTS["base"], **MISTAKES_IN_LAYERS[name]).run()["lm_head"]
    numbers = np.take_along_axis(log_softmax(logits)[:, :-1], IDS[:, 1:, None], axis=-1)[..., 0]
    trace = Trace({"logprobs": numbers.astype(np.float32)}, IDS)
    assert told(check(trace, model_of(BASE, WEIGHTS["base"]))) == [name]
