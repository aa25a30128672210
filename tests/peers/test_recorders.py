"""What `record_transformers` keeps, against what transformers itself gives out."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  # NumPy learns bfloat16 from it
import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import silu
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llama_layers import Llama, load
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify import Trace, check, record
from llama_layers.verify.recorders import record_transformers
from tests.support.random_models import GQA, model_of, random_weights
from tests.support.transformers_cache import cached

pytestmark = pytest.mark.peer

BASE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "Llama": {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 3, "head_dim": 6},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1},
    "Qwen3": {"head_dim": 6, "attention_bias": True},
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def model_in(family, attention="eager", dtype=torch.float32, **options):
    """A model of random weights, biases and weights of norms included."""
    config = getattr(transformers, f"{family}Config")(**BASE | FAMILIES[family] | options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=dtype
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 4 + (parameter.ndim == 1))
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=["eager", "sdpa"])
def attention(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request):
    return request.param


def same(array, tensor):
    """Whether a recorded array has the bits of a tensor."""
    expected = to_numpy(tensor)
    return array.dtype == expected.dtype and array.tobytes() == expected.tobytes()


@torch.no_grad()
def test_every_site(family, attention, dtype):
    model = model_in(family, attention, dtype)
    trace = record_transformers(model, IDS, probabilities=attention == "eager")
    arrays = dict(trace.arrays)

    def take(name):
        return arrays.pop(name)

    def assert_is(name, tensor):
        assert same(take(name), tensor.contiguous()), name

    cache = transformers.DynamicCache(config=None)
    out = model(
        IDS,
        output_hidden_states=True,
        output_attentions=attention == "eager",
        **cached(model, cache),
    )
    assert_is("model.norm", out.hidden_states[-1])
    assert_is("lm_head", out.logits)
    width = trace.arrays["model.layers.0.self_attn.q_rope"].shape[-1]
    places = torch.arange(IDS.shape[1])[None]
    cos, sin = model.model.rotary_emb(out.hidden_states[0], places)
    x = model.model.embed_tokens(IDS)
    assert_is("model.embed_tokens", x)
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}"
        attn, mlp = layer.self_attn, layer.mlp
        assert torch.equal(x, out.hidden_states[index])
        normed = layer.input_layernorm(x)
        assert_is(f"{name}.input_layernorm", normed)
        q, k, v = attn.q_proj(normed), attn.k_proj(normed), attn.v_proj(normed)
        for role, tensor in zip("qkv", (q, k, v), strict=True):
            assert_is(f"{name}.self_attn.{role}_proj", tensor)
        q, k = (t.unflatten(-1, (-1, width)) for t in (q, k))
        if family == "Qwen3":
            q, k = attn.q_norm(q), attn.k_norm(k)
            assert_is(f"{name}.self_attn.q_norm", q)
            assert_is(f"{name}.self_attn.k_norm", k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        assert torch.equal(k, cache.layers[index].keys)
        assert_is(f"{name}.self_attn.q_rope", q.transpose(1, 2))
        assert_is(f"{name}.self_attn.k_rope", k.transpose(1, 2))
        if attention == "eager":
            weights = out.attentions[index]
            assert_is(f"{name}.self_attn.probabilities", weights)
            values = v.unflatten(-1, (-1, width)).transpose(1, 2).repeat_interleave(2, dim=1)
            heads = (weights @ values).transpose(1, 2)
            assert_is(f"{name}.self_attn.attention", heads)
        else:
            heads = torch.as_tensor(take(f"{name}.self_attn.attention").astype("float32"))
            heads = heads.to(dtype)
        added = attn.o_proj(heads.flatten(2))
        assert_is(f"{name}.self_attn.o_proj", added)
        x = x + added
        assert_is(f"{name}.attention_residual", x)
        normed = layer.post_attention_layernorm(x)
        assert_is(f"{name}.post_attention_layernorm", normed)
        gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
        assert_is(f"{name}.mlp.gate_proj", gate)
        assert_is(f"{name}.mlp.up_proj", up)
        assert_is(f"{name}.mlp.act", silu(gate) * up)
        added = mlp.down_proj(silu(gate) * up)
        assert_is(f"{name}.mlp.down_proj", added)
        x = x + added
        assert_is(name, x)
    assert not arrays


def ours(peer, tmp_path):
    """Our own model of the same weights."""
    peer.save_pretrained(tmp_path)
    return load(tmp_path, dtype=str(peer.dtype).rpartition(".")[2])


def assert_agrees(trace, model: Llama):
    report = check(trace, model, profile="transformers")
    assert {result.verdict for result in report.results} == {"PASS"}
    assert report.missing == ()


class TestTrace:
    def test_is_one_of_our_own_model(self, family, attention, dtype, tmp_path):
        peer = model_in(family, attention, dtype)
        trace = record_transformers(peer, IDS.numpy(), probabilities=attention == "eager")
        assert_agrees(trace, ours(peer, tmp_path))
        assert np.array_equal(trace.input_ids, IDS)
        assert np.array_equal(trace.positions, np.arange(7))
        assert trace.attention_mask is None
        assert trace.metadata["engine"] == f"transformers {transformers.__version__}"
        assert trace.metadata["attention"] == attention
        assert trace.metadata["dtype"] == str(dtype).rpartition(".")[2]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, family, attention, side, tmp_path):
        peer = model_in(family, attention)
        mask = np.ones((2, 7), int)
        mask[1, :2] = 0
        mask = mask if side == "left" else mask[:, ::-1].copy()
        trace = record_transformers(peer, IDS, attention_mask=mask)
        assert np.array_equal(trace.attention_mask, mask != 0)
        assert np.array_equal(trace.positions, np.arange(7))
        assert_agrees(trace, ours(peer, tmp_path))
        logits = peer(IDS, attention_mask=torch.as_tensor(mask)).logits
        assert same(trace.arrays["lm_head"], logits)

    @pytest.mark.parametrize(
        "positions", [[5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 9, 10, 20, 21], [[0] * 7, [3] * 7]]
    )
    def test_positions(self, attention, positions, tmp_path):
        """A jump does not begin another text."""
        peer = model_in("Llama", attention)
        trace = record_transformers(peer, IDS, positions=positions)
        assert np.array_equal(trace.positions, positions)
        assert_agrees(trace, ours(peer, tmp_path))

    def test_is_of_another_model(self, tmp_path):
        peer = model_in("Llama")
        trace = record_transformers(peer, IDS)
        other = ours(model_in("Llama", rms_norm_eps=1e-6), tmp_path)
        with pytest.raises(ValueError, match="rms_norm_eps"):
            check(trace, other)


def state(model):
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    modes = [module.training for module in model.modules()]
    return hooks, modes, dict(ALL_ATTENTION_FUNCTIONS._local_mapping)


class TestModelIsLeftAsItWas:
    def test_after_a_run(self, family, attention):
        model = model_in(family, attention)
        model.train()
        model.model.layers[1].eval()
        model.model.norm.register_forward_hook(lambda *_: None)
        before, expected = state(model), model_in(family, attention)(IDS).logits
        trace = record_transformers(model, IDS)
        assert same(trace.arrays["lm_head"], expected)
        assert state(model) == before
        assert torch.equal(model.eval()(IDS).logits, expected)

    @pytest.mark.parametrize(
        ("ids", "options", "error", "message"),
        [
            ([[99]], {}, IndexError, "index out of range"),
            ([[1]], {"probabilities": True}, ValueError, "attention 'eager', got 'sdpa'"),
        ],
    )
    def test_after_an_error(self, ids, options, error, message):
        model = model_in("Llama", "sdpa").train()
        before = state(model)
        with pytest.raises(error, match=message):
            record_transformers(model, ids, **options)
        assert state(model) == before

    def test_with_an_attention_of_its_own(self, tmp_path):
        calls = []

        def mine(module, query, key, *rest, **options):
            calls.append(module.layer_idx)
            return before(module, query, key, *rest, **options)

        model, before = model_in("Llama", "sdpa"), ALL_ATTENTION_FUNCTIONS["sdpa"]
        ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
        try:
            trace = record_transformers(model, IDS)
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
        finally:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        assert calls == [0, 1, 2]
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
        assert_agrees(trace, ours(model, tmp_path))

    def test_beside_another_model(self, tmp_path):
        """Another model that runs meanwhile is not recorded."""
        model, other = model_in("Llama"), model_in("Llama", num_hidden_layers=1)
        model.model.norm.register_forward_hook(lambda *_: other(IDS) and None)
        assert_agrees(record_transformers(model, IDS), ours(model, tmp_path))


class TestRefused:
    @pytest.mark.parametrize(
        ("ids", "options", "message"),
        [
            (IDS[0], {}, r"input_ids: expected shape \[B, S\], got \[7\]"),
            (IDS * 1.0, {}, "input_ids: expected integers, got float32"),
            (IDS, {"positions": [0, 1]}, r"positions: expected shape \[7\] or \[2, 7\], got \[2\]"),
            (IDS, {"attention_mask": [[1]]}, r"attention_mask: expected shape \[2, 7\], got"),
            (IDS, {"attention_mask": IDS / 2}, "attention_mask: expected integers, got float32"),
        ],
    )
    def test_arguments(self, ids, options, message):
        with pytest.raises(ValueError, match=message):
            record_transformers(model_in("Llama"), ids, **options)

    def test_other_models(self):
        config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)
        model = transformers.GPT2LMHeadModel(config)
        with pytest.raises(TypeError, match=r"model: expected the .*, got GPT2LMHeadModel"):
            record_transformers(model, IDS)
        with pytest.raises(TypeError, match=r"model: expected the .*, got LlamaModel"):
            record_transformers(model_in("Llama").model, IDS)

    def test_sites_that_are_not_seen(self, monkeypatch):
        model = model_in("Llama")
        layer = model.model.layers[1]
        monkeypatch.setattr(layer.mlp, "forward", lambda x: x)
        with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.gate_proj: never seen"):
            record_transformers(model, IDS)


@pytest.mark.parametrize("asarray", [torch.as_tensor, jnp.asarray])
def test_arrays_of_another_library(asarray, tmp_path):
    """A port in torch or jax gives its arrays as they are."""
    model = model_of(GQA, random_weights(GQA, 0, np.float32))
    trace = record(model, np.array([[1, 2, 3]]))
    port = Trace({name: asarray(a) for name, a in trace.arrays.items()}, asarray([[1, 2, 3]]))
    expected = [result.difference for result in check(trace, model).results]
    assert [result.difference for result in check(port, model).results] == expected
    port.save(tmp_path / "port.safetensors")
    saved = Trace.load(tmp_path / "port.safetensors").arrays
    assert all(np.array_equal(saved[name], array) for name, array in trace.arrays.items())


@pytest.fixture(scope="module")
def hidden_states(tmp_path_factory):
    model = model_in("Llama")
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    with torch.no_grad():
        output = model(IDS, output_hidden_states=True)
    return load(directory), output.hidden_states, output.logits


class TestHiddenStates:
    """What transformers gives with output_hidden_states, written as docs/porting.md says."""

    LAYERS = BASE["num_hidden_layers"]

    def trace(self, states, logits):
        arrays = {"model.embed_tokens": states[0], "model.norm": states[-1], "lm_head": logits}
        for i, state in enumerate(states[1:-1]):
            arrays[f"model.layers.{i}"] = state
        return arrays

    def test_each_in_its_place(self, hidden_states):
        model, states, logits = hidden_states
        assert len(states) == self.LAYERS + 1
        assert check(Trace(self.trace(states, logits), IDS), model).agrees

    def test_the_last_as_the_last_layers_output(self, hidden_states):
        model, states, logits = hidden_states
        arrays = self.trace(states, logits)
        arrays[f"model.layers.{self.LAYERS - 1}"] = arrays.pop("model.norm")
        report = check(Trace(arrays, IDS), model)
        assert report.first.site.name == f"model.layers.{self.LAYERS - 1}"
        assert report.first.explanations[0].name == "hidden state normalised already"

    def test_each_one_place_late(self, hidden_states):
        model, states, _ = hidden_states
        arrays = {f"model.layers.{i}": state for i, state in enumerate(states[:-1])}
        failures = check(Trace(arrays, IDS), model).failures
        assert len(failures) == self.LAYERS
        for failure in failures:
            assert failure.explanations[0].name == "hidden states one place late"

    def test_log_probabilities(self, hidden_states):
        model, states, logits = hidden_states
        arrays = self.trace(states, logits.log_softmax(-1))
        (failure,) = check(Trace(arrays, IDS), model).failures
        assert [e.name for e in failure.explanations] == ["log-probabilities for logits"]
