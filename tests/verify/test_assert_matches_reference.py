"""`assert_matches_reference`: other people's ports in their own test suites."""

from __future__ import annotations

import numpy as np
import pytest
from random_models import GQA, model_of, random_weights

from llama_layers import forward
from llama_layers.testing import assert_matches_reference
from llama_layers.verify import record

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
