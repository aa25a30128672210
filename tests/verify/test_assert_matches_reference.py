"""`assert_matches_reference`: other people's ports in their own test suites."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from llama_layers import forward
from llama_layers.testing import UnusualErrorWarning, assert_matches_reference
from llama_layers.verify import Report, record
from tests.support.made_reports import result
from tests.support.random_models import GQA, model_of, random_weights

IDS = np.array([[3, 1, 4, 1, 5]])


@pytest.fixture(scope="module")
def model():
    return model_of(GQA, random_weights(GQA, 0, np.float32))


def port_of(model, backend):
    """Activations as a port in a library has them."""

    def port(ids):
        there = model_of(GQA, random_weights(GQA, 0, np.float32), backend.array)
        arrays = {}

        def keep(name, array):
            arrays[name] = array
            return array

        forward(there, backend.array(ids), tap=keep)
        return arrays

    return port


def test_callable_arrays_and_trace(model, backend):
    port = port_of(model, backend)
    assert_matches_reference(port, model, input_ids=IDS)
    assert_matches_reference(port(IDS), model, input_ids=IDS)
    assert_matches_reference(port(IDS), model)  # all but the embedding
    assert_matches_reference(record(model, IDS), model)


def test_failure_is_the_report(model, backend):
    arrays = port_of(model, backend)(IDS)
    name = "model.layers.1.mlp.up_proj"
    arrays[name] = arrays[name] * 1.01
    with pytest.raises(AssertionError) as error:
        assert_matches_reference(arrays, model, input_ids=IDS)
    assert str(error.value).startswith(f"FAIL: first at {name}: error ")


def test_positions_and_padding(model):
    mask, positions = np.array([[0, 0, 1, 1, 1]]), np.array([[0, 0, 7, 8, 9]])
    trace = record(model, IDS, positions=positions, attention_mask=mask)
    given = {"input_ids": IDS, "attention_mask": mask}
    assert_matches_reference(trace.arrays, model, **given, positions=positions)
    with pytest.raises(AssertionError, match=r"first at model\.layers\.0\.self_attn\.q_rope"):
        assert_matches_reference(trace.arrays, model, **given)


def test_refused(model):
    with pytest.raises(TypeError, match=r"port: expected arrays by name, a Trace, .* got list"):
        assert_matches_reference([], model)
    with pytest.raises(TypeError, match="input_ids: expected tokens to call the port with"):
        assert_matches_reference(lambda ids: {}, model)
    scores = record(model, IDS, sites=["scores"], layers=[0]).arrays
    with pytest.raises(ValueError, match="nothing could be checked"):
        assert_matches_reference(scores, model)


def lone(model, role, inputs, dtype, computed):
    """One site of layer 1, computed from inputs in a dtype, as a port would hand them over."""
    trace = record(model, IDS)
    arrays = {n: trace.arrays[f"model.layers.1.{n}"].astype(dtype) for n in inputs}
    wide = [array.astype(np.float32) for array in arrays.values()]
    arrays[role] = computed(*wide).astype(np.float32)
    return {f"model.layers.1.{name}": array for name, array in arrays.items()}


def test_how_the_port_rounds(model):
    weight = model.weights.layers[1].mlp.up_proj

    def half_sums(x):
        total = np.zeros((*x.shape[:2], len(weight)), np.float16)
        for i in range(x.shape[2]):
            total = (total + x[..., i, None] * weight[:, i]).astype(np.float16)
        return total

    def half_silu(gate, up):
        silu = gate / (1 + np.exp(-gate))
        return silu.astype(np.float16).astype(np.float32) * up

    product = ("mlp.up_proj", ["post_attention_layernorm"], np.float32)
    gate = ("mlp.act", ["mlp.gate_proj", "mlp.up_proj"], np.float16)
    result = lone(model, *product, lambda x: (x @ weight.T).astype(np.float16))
    sums = lone(model, *product, half_sums)
    silu = lone(model, *gate, half_silu)
    silu["model.layers.1.mlp.act"] = silu["model.layers.1.mlp.act"].astype(np.float16)
    for arrays, options in (
        (result, {"dtype": "float16"}),
        (sums, {"accumulate": "float16"}),
    ):
        with pytest.raises(AssertionError, match=r"^FAIL: first at "):
            assert_matches_reference(arrays, model)
        assert_matches_reference(arrays, model, **options)
    # Named or not: what an engine does on purpose is no failure, unless another is named.
    with pytest.warns(
        UnusualErrorWarning,
        match=r"^1 of 3 sites .* is model\.layers\.1\.mlp\.act: rounds as transformers with sdpa",
    ):
        assert_matches_reference(silu, model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert_matches_reference(silu, model, profile="transformers")
    assert not warned
    with pytest.raises(AssertionError, match=r"^FAIL: first at "):
        assert_matches_reference(silu, model, profile="llama.cpp")


def test_large_errors_that_no_profile_explains_are_not_warned_of(model, monkeypatch):
    for profile, count in (("", 0), ("transformers", 1)):
        warned = result("lm_head", "WARN", 0.5, note="larger than usual", profile=profile)
        monkeypatch.setattr(
            "llama_layers.testing.reference.check", lambda *_, found=warned, **__: Report((found,))
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_matches_reference({}, model)
        assert len(caught) == count


def test_a_difference_without_inputs_is_a_failure(model):
    logits = record(model, IDS).arrays["lm_head"]
    assert_matches_reference({"lm_head": logits}, model, input_ids=IDS)
    with pytest.raises(AssertionError, match="lm_head"):
        assert_matches_reference({"lm_head": 1.1 * logits}, model, input_ids=IDS)


def test_a_traces_own_tokens_count_unless_others_are_given(model):
    trace = record(model, IDS, positions=np.arange(3, 8))
    assert_matches_reference(trace, model, input_ids=IDS)
    with pytest.raises(AssertionError, match=r"first at model\.layers\.0\.self_attn\.q_rope"):
        assert_matches_reference(trace, model, positions=np.arange(5))
