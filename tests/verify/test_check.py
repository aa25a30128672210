"""`check`: no false alarm, no miss, and plain words about traces that cannot be checked."""

from __future__ import annotations

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_layers import LlamaConfig
from llama_layers.errors import TraceError
from llama_layers.testing import configs
from llama_layers.verify import Bound, Trace, check, record, sites
from llama_layers.verify.look import WORST, _histogram, _worst
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights

PAIRWISE = ("scores", "probabilities")


def traced(config, seed=0, dtype=np.float32, count=7, padded=False, **options):
    """A random model, and a trace of it."""
    model = model_of(config, random_weights(config, seed, dtype))
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, count))
    mask = None
    if padded:
        mask = np.ones((2, count), int)
        mask[1, : (count + 1) // 2] = 0
    return model, record(model, ids, attention_mask=mask, **options)


def changed(trace, **arrays):
    return replace(trace, arrays=dict(trace.arrays) | arrays)


def verdicts(report):
    return {result.verdict for result in report.results}


@settings(max_examples=200)
@given(
    config=configs(max_heads=4),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float32, np.float64]),
    count=st.integers(1, 9),
    padded=st.booleans(),
)
def test_no_false_alarm(config, seed, dtype, count, padded):
    model, trace = traced(config, seed, dtype, count, padded)
    report = check(trace, model)
    assert verdicts(report) <= {"PASS", "WARN"}, report.first
    assert len(report.results) == len(trace.arrays)
    assert not report.missing


@pytest.mark.parametrize("kind", CONFIGS)
def test_pairs_of_tokens(kind):
    model, trace = traced(CONFIGS[kind], sites=[*PAIRWISE, "attention", "?_rope", "v_proj"])
    report = check(trace, model)
    routes = {r.site.role: r.inputs for r in report.results if r.judgement is not None}
    assert [name.rpartition(".")[2] for name in routes["self_attn.probabilities"]] == ["scores"]
    assert routes["self_attn.attention"][0].endswith("probabilities")
    assert verdicts(report) <= {"PASS", "WARN", "SEEN"}, report.first


@settings(max_examples=60)
@given(kind=st.sampled_from(sorted(CONFIGS)), seed=st.integers(0, 1000), data=st.data())
def test_one_wrong_element_is_found_where_it_is(kind, seed, data):
    model, trace = traced(CONFIGS[kind], seed, padded=data.draw(st.booleans()))
    name = data.draw(st.sampled_from(sorted(trace.arrays)))
    array = np.array(trace.arrays[name])
    index = tuple(data.draw(st.integers(0, n - 1)) for n in array.shape)
    if trace.attention_mask is not None and not trace.attention_mask[index[:2]]:
        return  # what engines leave there is their own affair
    array[index] += np.float32(0.01) * np.abs(array).max()
    report = check(changed(trace, **{name: array}), model, explain=False)
    assert report.first.site.name == name
    assert report.first.verdict == "FAIL"
    assert report.first.worst[0].index == index
    assert report.first.judgement.index == index


@settings(max_examples=60)
@given(kind=st.sampled_from(sorted(CONFIGS)), seed=st.integers(0, 1000), data=st.data())
def test_sites_whose_inputs_are_missing(kind, seed, data):
    """Some sites only are recorded; a gross error in the last of them shows all the same."""
    model, trace = traced(CONFIGS[kind], seed)
    kept = data.draw(st.sets(st.sampled_from(sorted(trace.arrays)), min_size=1))
    fewer = replace(
        trace, arrays={name: trace.arrays[name] for name in trace.arrays if name in kept}
    )
    report = check(fewer, model)
    assert verdicts(report) <= {"PASS", "WARN", "SEEN"}, report.first
    for result in report.results:
        assert (result.judgement is None) == (result.verdict == "SEEN")
        assert set(result.inputs) <= kept | {"input_ids"}
    wrong = changed(fewer, **{result.site.name: 1.01 * fewer.arrays[result.site.name]})
    assert check(wrong, model, explain=False).first.site.name == result.site.name


def test_missing_sites_are_listed():
    model, trace = traced(GQA)
    del trace.arrays["model.layers.1.mlp.act"]
    assert check(trace, model).missing == ("model.layers.1.mlp.act",)


def test_last_token_only():
    model, trace = traced(GQA)
    last = {name: trace.arrays[name][:, -1:] for name in ("model.norm", "lm_head")}
    assert check(changed(trace, **last), model).agrees
    only_logits = changed(trace, lm_head=last["lm_head"])
    assert check(only_logits, model).agrees


def test_a_dtype_that_no_array_can_show_is_refused():
    model, trace = traced(GQA)
    said = "dtype: expected what the port rounds results to, no wider than its arrays, which are "
    with pytest.raises(ValueError, match=f"{said}float32, got float64"):
        check(trace, model, dtype="float64")
    assert check(trace, model, dtype="float32").agrees
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in trace.arrays.items()}
    with pytest.raises(ValueError, match=f"{said}bfloat16, got float16"):
        check(replace(trace, arrays=half), model, dtype="float16")
    half["lm_head"] = trace.arrays["lm_head"]
    check(replace(trace, arrays=half), model, dtype="float32")


def test_formats_that_the_arrays_do_not_show():
    """Numbers rounded to bfloat16 and stored as float32."""
    model, trace = traced(GQA)
    rounded = trace.arrays["model.norm"].astype(ml_dtypes.bfloat16).astype(np.float32)
    shown = replace(changed(trace, **{"model.norm": rounded}), metadata={})
    assert check(shown, model).first.site.name == "model.norm"
    result = check(shown, model, dtype="bfloat16").results[-2]
    assert (result.site.name, result.dtype, result.verdict) == ("model.norm", "bfloat16", "PASS")
    said = replace(shown, metadata={"dtype": "float16"})
    assert {r.dtype for r in check(said, model).results} == {"float16"}


class TestRefused:
    """Traces that cannot be checked, by name."""

    def refusal(self, trace, config=GQA):
        model = model_of(config, random_weights(config, 0, np.float32))
        with pytest.raises(TraceError) as error:
            check(trace, model)
        return str(error.value)

    def test_unknown_names(self):
        _, trace = traced(GQA)
        message = self.refusal(changed(trace, **{"model.layers.0.self_attn.q_prj": np.ones(1)}))
        assert (
            "'model.layers.0.self_attn.q_prj' (is it 'model.layers.0.self_attn.q_proj'?)" in message
        )
        for name in ("model.layers.2", "model.layers.17.mlp.up_proj"):
            message = self.refusal(changed(trace, **{name: np.ones(1)}))
            assert message.endswith(f"got {name!r} (layers are 0 to 1)")

    def test_nothing(self):
        assert "at least one site" in self.refusal(Trace({}))

    @pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj", "lm_head"])
    def test_shapes(self, name):
        _, trace = traced(GQA)
        message = self.refusal(changed(trace, **{name: trace.arrays[name][..., 1:]}))
        assert message.startswith(f"{name}: expected shape [2, 7, ")

    @pytest.mark.parametrize(
        "role", ["q_proj", "k_proj", "v_proj", "q_rope", "k_rope", "attention"]
    )
    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("told", [True, False], ids=["ids", "no ids"])
    def test_heads_before_tokens(self, role, batch, told):
        _, trace = traced(GQA)
        name = f"model.layers.1.self_attn.{role}"
        known = ["lm_head", "model.norm"] if role.endswith("rope") else ["model.embed_tokens"]
        others = {n: trace.arrays[n][:batch] for n in known}
        array = trace.arrays[name].reshape(2, 7, -1, 4)[:batch].swapaxes(1, 2)
        ids = trace.input_ids[:batch] if told else None
        message = self.refusal(Trace({name: array, **others}, ids))
        assert message.endswith("transpose axes 1 and 2, heads and tokens")
        if batch == 1:
            message = self.refusal(Trace({name: array[0], **others}, ids))
            assert message.endswith("transpose axes 0 and 1, heads and tokens")
        assert "transpose" not in self.refusal(Trace({name: array[..., 1:]}, trace.input_ids))

    def test_dtypes(self):
        _, trace = traced(GQA)
        message = self.refusal(changed(trace, lm_head=trace.arrays["lm_head"].astype(int)))
        assert message.startswith("lm_head: expected one of the dtypes")

    def test_other_model(self):
        _, trace = traced(replace(GQA, rope_theta=99.0))
        assert "with rope_theta of layer 0 100.0, got 99.0" in self.refusal(trace)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("input_ids", np.full((2, 7), 13), "input_ids: expected ids from 0 to 12"),
            ("input_ids", np.ones((2, 7)), "input_ids: expected integers"),
            ("input_ids", np.ones(7, int), "input_ids: expected shape [B, S]"),
            ("positions", np.ones((3, 7), int), "positions: expected integers in shape [7]"),
            ("positions", -np.ones(7, int), "positions: expected zero or more"),
            ("attention_mask", np.ones((2, 6)), "attention_mask: expected 0 and 1 in shape [2, 7]"),
            (
                "attention_mask",
                np.array([[1] * 7, [1, 1, -1, 1, 1, 2, 1]]),
                "attention_mask: expected 0 and 1, as Hugging Face has it, got -1 at [1, 2]",
            ),
            ("metadata", {"dtype": "float8"}, "metadata dtype: expected one of"),
            ("metadata", {"config": "{"}, "metadata config: expected a config.json"),
            *(
                ("metadata", {"config": f'{{"model_type": {kind}}}'}, "model_type: expected one of")
                for kind in ('["llama"]', "{}", "3")
            ),
        ],
    )
    def test_tokens(self, field, value, message):
        _, trace = traced(GQA)
        assert message in self.refusal(replace(trace, **{field: value}))

    def test_arguments(self):
        model, trace = traced(GQA)
        with pytest.raises(TypeError, match="input_ids: expected an array of integers, got list"):
            check(replace(trace, input_ids=[[1]]), model)
        with pytest.raises(TypeError, match="trace: expected a Trace, got dict"):
            check({}, model)
        with pytest.raises(TypeError, match="model: expected a Llama, got str"):
            check(trace, "smollm2-135m")
        with pytest.raises(ValueError, match=r"profile: expected one of .*transformers.*'torch'"):
            check(trace, model, profile="torch")
        with pytest.raises(ValueError, match=r"accumulate: expected one of .*'tf32'"):
            check(trace, model, accumulate="tf32")


@pytest.mark.parametrize("kind", CONFIGS)
def test_sites_are_those_of_a_forward_pass(kind):
    config = CONFIGS[kind]
    _, trace = traced(config, sites=["*"])
    expected = {"B": 2, "S": 7}
    for site in sites(config)[:-1]:  # log-probabilities follow the forward pass
        shape = tuple(expected.get(axis, axis) for axis in site.shape)
        assert trace.arrays[site.name].shape == shape, site.name
    assert len(trace.arrays) == len(sites(config)) - 1


def test_nan_and_inf_are_no_failure_where_they_belong():
    model, trace = traced(GQA)
    weights = random_weights(GQA, 0, np.float32)
    weights["model.embed_tokens.weight"][3, 2] = np.nan
    model = model_of(GQA, weights)
    trace = record(model, np.array([[1, 2, 3]]))
    report = check(trace, model)
    assert report.agrees
    assert report.verdict == "WARN"
    spread = [r for r in report.results if "NaN or Inf" in r.note]
    assert {r.site.role for r in spread} >= {"model.embed_tokens", "mlp.act", "lm_head"}
    clean = {n: np.nan_to_num(a) for n, a in trace.arrays.items()}
    assert check(replace(trace, arrays=clean), model).first.site.name == "model.embed_tokens"


def test_config_in_the_metadata_is_the_models():
    _, trace = traced(GQA)
    assert LlamaConfig.from_json(json.loads(trace.metadata["config"])) == GQA


def lone(trace, name="lm_head", **changes):
    """The trace with nothing but one site."""
    return replace(trace, arrays={name: np.array(trace.arrays[name])}, **changes)


def test_a_lone_site_of_many_layers():
    # Its inputs lie 2 ** 40 ways back.
    model, trace = traced(replace(GQA, num_hidden_layers=40))
    (result,) = check(lone(trace), model).results
    assert (result.verdict, result.inputs) == ("SEEN", ("input_ids",))


def test_a_lone_site_with_a_nan_differs():
    model, trace = traced(GQA)
    trace = lone(trace)
    trace.arrays["lm_head"][1, 2, 3] = np.nan
    assert verdicts(check(trace, model)) == {"DIFFERS"}


def test_padding_of_a_lone_site_is_not_compared():
    model, trace = traced(GQA, padded=True)
    trace = lone(trace)
    trace.arrays["lm_head"][1, 0] = np.nan
    trace.arrays["lm_head"][1, 1] = 1000
    assert verdicts(check(trace, model)) == {"SEEN"}
    trace.arrays["lm_head"][1, -1] += 1
    assert verdicts(check(trace, model)) == {"DIFFERS"}


def test_headline_counts_what_was_judged():
    model, trace = traced(GQA, sites=["q_proj", "input_layernorm"])
    assert check(trace, model).text().startswith("PASS: 2 of 4 sites, the others without recorded")


def test_no_numpy_name_for_a_safetensors_file(tmp_path):
    _, trace = traced(GQA)
    with pytest.raises(ValueError, match=r"expected a name for a safetensors file, got \.npz"):
        trace.save(tmp_path / "trace.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 1, WORST - 1, WORST, WORST + 1, 50])
def test_the_worst_elements_come_first(size):
    errors = np.random.default_rng(0).permutation(size) / 4
    limits = np.ones(size)
    found = _worst(2 + errors, Bound(np.full(size, 2.0), limits, limits), errors)
    assert [element.ratio for element in found] == sorted(errors, reverse=True)[:WORST]
    assert all(element.computed == 2 + errors[element.index] for element in found)
    assert _histogram(np.full((size, 2), 0.5)) == (0, 0, 0, 0, 2 * size, 0, 0, 0, 0, 0)
