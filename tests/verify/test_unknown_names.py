"""Names that no site has: what they probably mean."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers.errors import TraceError
from llama_layers.verify import Trace, check, compare
from tests.support.random_models import GQA, model_of, random_weights

MODEL = model_of(GQA, random_weights(GQA, 0, np.float32))


def refusal(*names):
    with pytest.raises(TraceError) as error:
        check(Trace({name: np.ones(1, np.float32) for name in names}, np.array([[1]])), MODEL)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [  # transformers' words, and those of others
        ("logits", "lm_head"),
        ("position_ids", "positions"),
        ("inputs_embeds", "model.embed_tokens"),
        ("last_hidden_state", "model.norm"),
        ("token_ids", "input_ids"),
        ("Mask", "attention_mask"),
        ("hidden_states", "model.norm for the last"),
        ("hidden_states.0", "model.embed_tokens"),
        ("hidden_states_1", "model.layers.0"),
        ("hidden_states[2]", "model.norm"),  # of two layers
        ("attentions", "self_attn.probabilities"),
    ],
)
def test_said(name, meaning):
    assert refusal(name).endswith(f"{meaning}?)")
    assert f"{name!r} (did you mean" in refusal(name)


@pytest.mark.parametrize("name", ["hidden_states.7", "x" * 10_000, "model.layers.0.zzz" * 1000])
def test_nothing_is_meant(name):
    message = refusal(name)
    assert "did you mean" not in message
    assert len(message) < 3000


@pytest.mark.parametrize("number", ["9" * 5000, "99999999999"])
def test_layers_that_no_model_has(number):
    name = f"model.layers.{number}.mlp.act"
    assert "(layers are 0 to 1)" in refusal(name)
    trace = Trace({name: np.ones((1, 1, 1))})
    with pytest.raises(TraceError, match="layers are 0 to 0"):
        compare(trace, trace)


def test_names_stay_on_one_line():
    message = refusal("a\nb\x1b[31m\u202e")
    assert message.isprintable()
    assert "\\n" in message
