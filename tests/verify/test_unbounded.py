"""Sites whose inputs were not recorded: what went wrong since the arrays that were."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llama_layers.verify import Trace, check, mistakes, record
from llama_layers.verify.mistakes import Kind
from tests.support.mistakes import MISTAKES, read_off
from tests.support.ported import (
    BASE,
    CONFIGS,
    WEIGHTS,
    attended,
    causal,
    normed,
    omega,
    run,
    silu,
    turned,
)
from tests.support.random_models import model_of

IDS = np.random.default_rng(3).integers(0, 97, (2, 12))
COUNT = IDS.shape[1]


class Port:
    """Llama in naive float64, layer by layer, with something to go wrong in each step."""

    def __init__(self, config, weights, **wrong):
        self.config, self.weights, self.wrong = config, weights, wrong
        self.layers = wrong.get("layers", range(config.num_hidden_layers))

    def run(self, ids=IDS):
        """What comes out of the embedding, each layer, and the head."""
        x = self.weights["model.embed_tokens.weight"][ids].astype(float)
        x = x * self.wrong.get("embedding", 1.0)
        arrays = {"model.embed_tokens": x}
        for layer, weights_of in enumerate(self.layers):
            if weights_of is not None:
                x = self.layer(x, weights_of)
            arrays[f"model.layers.{layer}"] = x
        x = normed(x, self.weights["model.norm.weight"], self.eps)
        arrays["lm_head"] = x @ self.weights["lm_head.weight"].T
        return {name: array.astype(np.float32) for name, array in arrays.items()}

    @property
    def eps(self):
        return self.wrong.get("eps", self.config.rms_norm_eps)

    def layer(self, x, layer):
        x = x + self.attention(self.norm(x, layer, "input_layernorm"), layer)
        return x + self.mlp(self.norm(x, layer, "post_attention_layernorm"), layer)

    def norm(self, x, layer, name):
        weight = self.weights[f"model.layers.{layer}.{name}.weight"]
        return normed(x, self.wrong.get("norm", lambda w: w)(weight), self.eps)

    def linear(self, x, layer, name):
        y = x @ self.weights[f"model.layers.{layer}.{name}.weight"].astype(float).T
        bias = self.weights.get(f"model.layers.{layer}.{name}.bias")
        return y if bias is None or self.wrong.get("no_bias") else y + bias

    def attention(self, x, layer):
        names = self.wrong.get("qkv", "qkv")
        q, k, v = (self.heads(self.linear(x, layer, f"self_attn.{n}_proj")) for n in names)
        phases = np.outer(np.arange(COUNT), omega(self.config, self.wrong.get("theta")))
        turn = self.wrong.get("turn", turned)
        allowed = causal(COUNT, self.wrong.get("window", self.config.sliding_window))
        y = attended(
            turn(q, phases),
            turn(k, phases),
            v,
            self.wrong.get("allowed", allowed),
            scale=self.wrong.get("scale"),
            kv_of=self.wrong.get("kv_of"),
        )
        y = self.linear(y.reshape(*x.shape[:2], -1), layer, "self_attn.o_proj")
        return self.wrong.get("attention", 1.0) * y

    def heads(self, array):
        return array.reshape(*array.shape[:2], -1, self.config.head_dim)

    def mlp(self, x, layer):
        gate, up = (self.linear(x, layer, f"mlp.{name}_proj") for name in ("gate", "up"))
        y = self.wrong.get("gate", lambda g, u: silu(g) * u)(gate, up)
        return self.wrong.get("mlp", 1.0) * self.linear(y, layer, "mlp.down_proj")


def in_pairs(x):
    """Channels i and i + D / 2 side by side."""
    return np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)


MISTAKES_IN_LAYERS = {
    "RoPE layout interleaved": {"turn": lambda x, p: turned(x, p, "interleaved")},
    "RoPE permutation left in": {"turn": lambda x, p: turned(in_pairs(x), p)},
    "RoPE rotated the other way": {"turn": lambda x, p: turned(x, p, sign=-1)},
    "RoPE not applied": {"turn": lambda x, p: x},
    "another rope_theta": {"theta": 10000.0},
    "another scale of scores": {"scale": 1.0},
    "no causal mask": {"allowed": np.ones((COUNT, COUNT), bool)},
    "key heads tiled": {"kv_of": lambda h: h % 2},
    "another eps": {"eps": 1e-6},
    "norm weight skipped": {"norm": np.ones_like},
    "norm weight plus one": {"norm": lambda w: w + 1},
    "keys and values swapped": {"qkv": "qvk"},
    "gate and up swapped in the product": {"gate": lambda g, u: silu(u) * g},
    "gelu (tanh) for silu": {
        "gate": lambda g, u: u * g / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3)))
    },
    "layer left out": {"layers": [0, None, 2]},
    "another layer's weights": {"layers": [0, 0, 2]},
}
WHOLE = {
    "embedding scaled by the root of hidden_size": {"embedding": 32**0.5},
    "bias missing": {"no_bias": True},
    "another window": {"window": COUNT},
}
KINDS = {"bias missing": "biases", "another window": "window"}


def checked(kind="base", names=None, **wrong):
    config, weights = CONFIGS[kind], WEIGHTS[kind]
    arrays = Port(config, weights, **wrong).run()
    kept = {n: a for n, a in arrays.items() if names is None or n in names}
    return check(Trace(kept, IDS), model_of(config, weights))


def told(result):
    return [explanation.name for explanation in result.explanations]


@pytest.mark.parametrize("kind", ["base", "mha", "biases", "window"])
def test_a_right_port_agrees(kind):
    report = checked(kind)
    assert {r.verdict for r in report.results} <= {"PASS", "SEEN"}
    assert checked(kind, ["lm_head"]).agrees


@pytest.mark.parametrize("name", [*list(MISTAKES_IN_LAYERS)[::2], "another layer's weights"])
def test_the_outputs_of_layers(name):
    wrong = MISTAKES_IN_LAYERS[name]
    report = checked(**wrong)
    assert report.first.site.name == f"model.layers.{1 if 'layers' in wrong else 0}"
    assert report.first.verdict == "DIFFERS"
    assert told(report.first) == [name]
    assert 0 <= report.first.explanations[0].ratio <= 1
    assert f"Likely cause: {name}" in str(report)
    assert "explains all of them" in str(report) or "No other site fails" in str(report)


@pytest.mark.parametrize(
    "name", sorted((MISTAKES_IN_LAYERS | WHOLE).keys() - {"another layer's weights"})
)
def test_nothing_but_logits(name):
    report = checked(KINDS.get(name, "base"), ["lm_head"], **(MISTAKES_IN_LAYERS | WHOLE)[name])
    assert told(report.first) == [name]


@pytest.mark.parametrize("names", [None, ["lm_head"]])
@pytest.mark.parametrize("block", ["attention", "mlp"])
def test_a_block_that_is_not_added(block, names):
    report = checked(names=names, **{block: 0.0})
    assert "block not added" in told(report.first)


def test_a_layer_that_was_not_recorded_was_left_out():
    names = ["model.layers.0", "model.layers.2", "lm_head"]
    report = checked(names=names, layers=[0, None, 2])
    assert report.first.site.name == "model.layers.2"
    assert told(report.first) == ["layer left out"]
    assert report.first.explanations[0].detail == "The port seems to skip layer 1."


# What no module of transformers gives.
NO_MODULE = (
    *("self_attn.q_rope", "self_attn.k_rope", "self_attn.attention"),
    *("attention_residual", "mlp.act"),
)
UPSTREAM = [
    m
    for m in MISTAKES
    if m.config == "base"
    and (m.role in NO_MODULE or m.role in ("self_attn.o_proj", "mlp.down_proj"))
    and any(k.name == m.name and k.kind == Kind.FORMULA for k in mistakes.MISTAKES)
    # Nothing was recorded of another layer's keys; of runs in chunks there is another mistake.
    # Where RoPE is not recorded, queries before it are RoPE that is not applied.
    # Heads that attention mixes are heads that the projection out reads in another order.
    and m.name
    not in (
        *("another layer's keys and values", "a token sees the next", "queries before RoPE"),
        *("heads before tokens", "heads mixed up"),
        "RoPE applied twice",  # to queries only, which is another mistake
    )
    and m not in read_off.MISTAKES  # which show in the port's own array of the site
]


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(m, id=f"{m.name}, {m.role}", marks=[pytest.mark.slow] if i % 8 else [])
        for i, m in enumerate(UPSTREAM)
    ],
)
def test_a_mistake_at_a_site_that_was_not_recorded(mistake):
    trace, model = run(mistake)
    kept = {n: a for n, a in trace.arrays.items() if not n.endswith(NO_MODULE)}
    report = check(replace(trace, arrays=kept), model)
    assert report.first.verdict in ("DIFFERS", "FAIL")
    assert mistake.name in told(report.first)
    if mistake.role == "mlp.act":
        (detail,) = (e.detail for e in report.first.explanations if e.name == mistake.name)
        assert detail.endswith(f" That is at {mistake.site}.")


def test_the_last_layers_were_left_out():
    report = checked(names=["model.embed_tokens", "lm_head"], layers=[0, None, None])
    assert told(report.first) == ["last layers left out"]
    assert report.first.explanations[0].detail == "The port seems to skip layers 1 to 2."


def test_noise_is_not_explained():
    rng = np.random.default_rng(0)
    config, weights = CONFIGS["base"], WEIGHTS["base"]
    arrays = Port(config, weights).run()
    del arrays["model.layers.2"], arrays["lm_head"]
    arrays["model.layers.1"] += rng.standard_normal((2, COUNT, 32)).astype(np.float32) / 10
    report = check(Trace(arrays, IDS), model_of(config, weights))
    assert report.first.site.name == "model.layers.1"
    assert report.first.explanations == ()
    assert "No mistake that is known here explains it." in str(report)
    quiet = check(Trace(arrays, IDS), model_of(config, weights), explain=False)
    assert "No mistake" not in str(quiet)


class TestNotANumber:
    """NaN is a failure where it begins, if the model has none."""

    def traced(self, weights):
        model = model_of(BASE, weights)
        return record(model, IDS), model

    def test_everywhere(self):
        trace, model = self.traced(WEIGHTS["base"])
        arrays = {n: np.full_like(a, np.nan) for n, a in trace.arrays.items()}
        for ids in (IDS, None):
            report = check(replace(trace, arrays=arrays, input_ids=ids), model)
            assert report.exit_status == 1
            assert report.first.site.name == "model.embed_tokens"
        assert "NaN or Inf, and nothing recorded before it has any" in report.text(width=1000)

    def test_of_the_model_itself(self):
        for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
            weights = dict(WEIGHTS["base"])
            weights[name] = weights[name].copy()
            weights[name][3, 2] = np.nan
            trace, model = self.traced(weights)
            lone = {n: np.full_like(a, np.nan) for n, a in trace.arrays.items() if "layers.0" in n}
            report = check(Trace({"model.layers.0": lone["model.layers.0"]}), model)
            assert report.verdict == "NONE"

    def test_overflow_is_told(self):
        model = model_of(BASE, WEIGHTS["base"])
        x, added = (np.full((1, 2, 32), 4e4, np.float16) for _ in "ab")
        added[0, 0] = 1
        name = "model.layers.1.attention_residual"
        with np.errstate(over="ignore"):
            y = x + added
        arrays = {"model.layers.0": x, "model.layers.1.self_attn.o_proj": added, name: y}
        result = check(Trace(arrays), model).results[-1]
        assert (result.site.name, result.verdict) == (name, "WARN")
        assert result.note == "32 numbers overflowed float16 here"

    def test_padding_and_hidden_scores_may_be_any(self):
        trace, model = self.traced(WEIGHTS["base"])
        keep = np.ones(IDS.shape, bool)
        keep[1, :3] = False
        x = np.array(trace.arrays["model.layers.0"])
        x[1, :3] = np.nan
        assert check(Trace({"model.layers.0": x}, attention_mask=keep), model).verdict == "NONE"
        last = {"lm_head": trace.arrays["lm_head"][:, -1:].copy()}
        assert check(Trace(last, attention_mask=keep), model).verdict == "NONE"
        scores = np.where(causal(COUNT), 1.0, -np.inf) * np.ones((2, 4, 1, 1), np.float32)
        name = "model.layers.1.self_attn.scores"
        assert check(Trace({name: scores.astype(np.float32)}), model).verdict == "NONE"
        scores[0, 0, 5, 2] = np.inf
        assert check(Trace({name: scores.astype(np.float32)}), model).verdict == "FAIL"


class TestHiddenStates:
    """What transformers gives with output_hidden_states: the input of each layer, and the output
    of the last one after the model's norm."""

    LAYERS = BASE.num_hidden_layers

    def hidden_states(self):
        arrays = Port(BASE, WEIGHTS["base"]).run()
        weight = WEIGHTS["base"]["model.norm.weight"]
        last = normed(arrays.pop(f"model.layers.{self.LAYERS - 1}"), weight, BASE.rms_norm_eps)
        logits = arrays.pop("lm_head")
        return [*arrays.values(), last.astype(np.float32)], logits

    def report(self, arrays, ids=IDS):
        return check(Trace(arrays, ids), model_of(BASE, WEIGHTS["base"]))

    def test_the_last_is_normalised(self):
        states, logits = self.hidden_states()
        arrays = {f"model.layers.{i}": state for i, state in enumerate(states[1:])}
        report = self.report({"model.embed_tokens": states[0], **arrays, "lm_head": logits})
        last = f"model.layers.{self.LAYERS - 1}"
        assert [failure.site.name for failure in report.failures] == [last, "lm_head"]
        assert told(report.first) == ["hidden state normalised already"]
        assert "write it as model.norm" in str(report).replace("\n  ", " ")
        assert "The likely cause explains all of them." in str(report)
        arrays["model.norm"] = arrays.pop(last)
        assert self.report({"model.embed_tokens": states[0], **arrays, "lm_head": logits}).agrees

    @pytest.mark.parametrize("embedded", [False, True])
    @pytest.mark.parametrize("with_ids", [False, True])
    def test_each_is_what_goes_in(self, embedded, with_ids):
        states, _ = self.hidden_states()
        arrays = {f"model.layers.{i}": state for i, state in enumerate(states[:-1])}
        if embedded:
            arrays["model.embed_tokens"] = states[0]
        report = self.report(arrays, IDS if with_ids else None)
        if not embedded and not with_ids:  # nothing says what goes into the first
            assert told(report.first)[:1] == ["another layer's weights"]
            return
        assert [failure.site.layer for failure in report.failures] == [*range(self.LAYERS)]
        assert "hidden_states[i] of transformers" in report.first.explanations[0].detail
        for failure in report.failures:
            assert told(failure)[0] == "hidden states one place late"
        assert "The likely cause explains all of them." in str(report)

    def test_beside_all_sites(self):
        model = model_of(BASE, WEIGHTS["base"])
        trace = record(model, IDS)
        states = [trace.arrays[f"model.layers.{i}"] for i in range(self.LAYERS - 1)]
        states.insert(0, trace.arrays["model.embed_tokens"])
        late = {f"model.layers.{i}": state for i, state in enumerate(states)}
        results = check(replace(trace, arrays={**trace.arrays, **late}), model).results
        for result in results:
            if result.site.role == "layer":
                assert told(result) == ["hidden states one place late"]

    def test_a_layer_left_out_is_another_mistake(self):
        """It gives what goes in, too, and the next layer goes on from that."""
        arrays = Port(BASE, WEIGHTS["base"], layers=[None, 1, 2]).run()
        report = self.report(arrays)
        assert report.first.site.name == "model.layers.0"
        assert told(report.first) == ["layer left out"]
