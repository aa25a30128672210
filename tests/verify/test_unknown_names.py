"""Names that no site has: what they probably mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llama_layers.errors import TraceError
from llama_layers.verify import Trace, check, compare, record
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


@pytest.mark.parametrize(
    ("name", "advice"),
    [  # of forward hooks in transformers, vLLM, SGLang, mlx, GPT-NeoX and others
        ("model.layers.0.self_attn.qkv_proj", "split it into self_attn.q_proj, self_attn.k_proj"),
        ("model.layers.0.attention.query_key_value", "split it into self_attn.q_proj"),
        ("transformer.h.0.attn.c_attn", "split it into self_attn.q_proj"),
        ("model.layers.0.self_attn.qkv_proj.output.0", "split it into self_attn.q_proj"),
        ("model.layers.1.mlp.gate_up_proj", "split it into mlp.gate_proj and mlp.up_proj"),
        ("model.layers.0.mlp.act_fn", "silu(gate) alone, in transformers"),
        ("model.layers.0.self_attn", "self_attn.o_proj once more"),
        ("model.layers.0.mlp.output", "mlp.down_proj once more"),
        ("layers.0.mlp", "mlp.down_proj once more"),
        ("model.rotary_emb", "the cosines and sines of RoPE in transformers"),
        ("model.layers.0.self_attn.rotary_emb", "queries and keys after RoPE in vLLM"),
        ("model.layers.0.self_attn.rope", "queries in one call and keys in the next, in mlx"),
        ("model", "model.norm once more"),
        ("logits_processor", "lm_head once more"),
        ("model.layers.0.self_attn.q_proj.input", "write the output of that"),
        ("model.layers.0.self_attn.q_proj.weight", "a weight; a trace holds activations"),
        ("model.layers.0.self_attn.q_norm", "has no norm of queries and keys"),
        ("past_key_values.0.key", "self_attn.past_key and self_attn.past_value"),
        # of llama.cpp's llama-eval-callback
        ("ffn_silu-0", "silu(gate) alone"),
        ("kqv_merged-0", "self_attn.attention with its axes in another order"),
        ("cache_k_l0 (view)", "a cache"),
        ("Kcur-0 (reshaped)", "Kcur-0 in another order or shape"),
        ("node_12", "without a name"),
        ("q-0", "write Qcur-0"),
        ("inp_tokens", "input_ids"),
        # of TransformerLens
        ("blocks.0.ln1.hook_scale", "what the rows of a norm are divided by"),
        ("blocks.0.hook_mlp_in", "attention_residual once more"),
    ],
)
def test_no_site(name, advice):
    assert advice in refusal(name)
    assert f"{name!r} (no site: " in refusal(name)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("model.layers.0.self_attn.attn", "model.layers.0.self_attn.attention"),  # of vLLM
        ("model.layers.0.self_attn.o_proj.input", "model.layers.0.self_attn.attention"),
        ("model.layers.1.mlp.down_proj.input", "model.layers.1.mlp.act"),
        ("model.layers.1.post_attention_layernorm.input", "model.layers.1.attention_residual"),
        ("module.model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),  # of DDP
        ("_orig_mod.model.norm", "model.norm"),  # of torch.compile
        ("base_model.model.model.layers.0", "model.layers.0"),  # of PEFT
        ("model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.layers.1.output.0", "model.layers.1"),
        ("model.layers.1.mlp.up_proj_output_0", "model.layers.1.mlp.up_proj"),
        ("layers.0.self_attn.past_key", "model.layers.0.self_attn.past_key"),
    ],
)
def test_the_same_array(name, site):
    assert list(Trace({name: np.ones(1)}).arrays) == [site]


def test_layers_are_told_once():
    names = [f"model.layers.{i}.mlp.{role}" for i in range(2) for role in ("act_fn", "zzz")]
    message = refusal(*names)
    assert "layers.0.mlp.act_fn" in message
    assert "layers.1.mlp" not in message
    assert message.endswith("; and 2 more")


class TestIgnored:
    IDS = np.array([[3, 1, 4]])

    def trace(self, *names):
        trace = record(MODEL, self.IDS)
        return replace(trace, arrays=dict(trace.arrays) | dict.fromkeys(names, np.ones((1, 3, 2))))

    def test_check(self, tmp_path):
        trace = self.trace("model.layers.0.mlp.act_fn", "model.layers.99", "?")
        with pytest.raises(TraceError, match=r"ignore_unknown=True, leaves others out"):
            check(trace, MODEL)
        trace.save(tmp_path / "port.safetensors")
        for some in (trace, Trace.load(tmp_path / "port.safetensors")):
            report = check(some, MODEL, ignore_unknown=True)
            assert report.verdict == "PASS"
            assert len(report.results) == len(trace.arrays) - 3

    def test_compare(self):
        first, second = self.trace("one"), self.trace("other", "model.layers.5")
        with pytest.raises(TraceError, match="got 'one'"):
            compare(first, second)
        assert compare(first, second, ignore_unknown=True).agrees

    def test_nothing_is_left(self):
        with pytest.raises(TraceError, match=r"at least one site of the model, got '\?'"):
            check(Trace({"?": np.ones(1)}, self.IDS), MODEL, ignore_unknown=True)
