"""Arrays under other projects' names, in their shapes and their order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from llama_layers.errors import TraceError
from llama_layers.layers.sites import sites
from llama_layers.verify import Trace, check, record
from llama_layers.verify.aliases import SCHEMES, alias_table, canonical_arrays
from llama_layers.verify.not_sites import no_site
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights

# What each project calls them, written by hand from their sources, for layer 3.
META = {
    "tok_embeddings": "model.embed_tokens",
    "layers.3.attention_norm": "model.layers.3.input_layernorm",
    "layers.3.attention.wq": "model.layers.3.self_attn.q_proj",
    "layers.3.attention.wk": "model.layers.3.self_attn.k_proj",
    "layers.3.attention.wv": "model.layers.3.self_attn.v_proj",
    "layers.3.attention.wo": "model.layers.3.self_attn.o_proj",
    "layers.3.ffn_norm": "model.layers.3.post_attention_layernorm",
    "layers.3.feed_forward.w1": "model.layers.3.mlp.gate_proj",
    "layers.3.feed_forward.w2": "model.layers.3.mlp.down_proj",
    "layers.3.feed_forward.w3": "model.layers.3.mlp.up_proj",
    "layers.3": "model.layers.3",
    "norm": "model.norm",
    "output": "lm_head",
}
LLAMA_CPP = {
    "embd": "model.embed_tokens",
    "attn_norm-3": "model.layers.3.input_layernorm",
    "Qcur-3#0": "model.layers.3.self_attn.q_proj",
    "Qcur-3#1": "model.layers.3.self_attn.q_rope",
    "Kcur-3#0": "model.layers.3.self_attn.k_proj",
    "Kcur-3#1": "model.layers.3.self_attn.k_rope",
    "Qcur_normed-3": "model.layers.3.self_attn.q_norm",
    "Kcur_normed-3": "model.layers.3.self_attn.k_norm",
    "Vcur-3": "model.layers.3.self_attn.v_proj",
    "kq_soft_max-3": "model.layers.3.self_attn.probabilities",
    "kqv_out-3": "model.layers.3.self_attn.attention",
    "attn_out-3": "model.layers.3.self_attn.o_proj",
    "attn_post_norm-3": "model.layers.3.post_self_attn_layernorm",
    "ffn_inp-3": "model.layers.3.attention_residual",
    "ffn_norm-3": "model.layers.3.post_attention_layernorm",
    "ffn_gate-3": "model.layers.3.mlp.gate_proj",
    "ffn_up-3": "model.layers.3.mlp.up_proj",
    "ffn_swiglu-3": "model.layers.3.mlp.act",
    "ffn_out-3": "model.layers.3.mlp.down_proj",
    "ffn_post_norm-3": "model.layers.3.post_mlp_layernorm",
    "l_out-3": "model.layers.3",
    "result_norm": "model.norm",
    "result_output": "lm_head",
}
TRANSFORMER_LENS = {
    "hook_embed": "model.embed_tokens",
    "blocks.3.ln1.hook_out": "model.layers.3.input_layernorm",
    "blocks.3.attn.hook_q": "model.layers.3.self_attn.q_proj",
    "blocks.3.attn.hook_k": "model.layers.3.self_attn.k_proj",
    "blocks.3.attn.hook_v": "model.layers.3.self_attn.v_proj",
    "blocks.3.attn.q_norm.hook_out": "model.layers.3.self_attn.q_norm",
    "blocks.3.attn.k_norm.hook_out": "model.layers.3.self_attn.k_norm",
    "blocks.3.attn.hook_rot_q": "model.layers.3.self_attn.q_rope",
    "blocks.3.attn.hook_rot_k": "model.layers.3.self_attn.k_rope",
    "blocks.3.attn.hook_attn_scores": "model.layers.3.self_attn.scores",
    "blocks.3.attn.hook_pattern": "model.layers.3.self_attn.probabilities",
    "blocks.3.attn.hook_z": "model.layers.3.self_attn.attention",
    "blocks.3.hook_attn_out": "model.layers.3.self_attn.o_proj",
    "blocks.3.ln1_post.hook_out": "model.layers.3.post_self_attn_layernorm",
    "blocks.3.hook_resid_mid": "model.layers.3.attention_residual",
    "blocks.3.ln2.hook_out": "model.layers.3.post_attention_layernorm",
    "blocks.3.mlp.hook_pre": "model.layers.3.mlp.gate_proj",
    "blocks.3.mlp.hook_pre_linear": "model.layers.3.mlp.up_proj",
    "blocks.3.mlp.hook_post": "model.layers.3.mlp.act",
    "blocks.3.hook_mlp_out": "model.layers.3.mlp.down_proj",
    "blocks.3.ln2_post.hook_out": "model.layers.3.post_mlp_layernorm",
    "blocks.3.hook_resid_post": "model.layers.3",
    "ln_final.hook_out": "model.norm",
    "unembed.hook_out": "lm_head",
}
HOOKED = {
    "layers.3.self_attn.q_proj": "model.layers.3.self_attn.q_proj",
    "model.layers.3.self_attn.k_proj.output": "model.layers.3.self_attn.k_proj",
    "layers.3.mlp.act_out": "model.layers.3.mlp.act",
    "embed_tokens": "model.embed_tokens",
    "model.norm.out": "model.norm",
    "lm_head_output": "lm_head",
    "layers.3.output": "model.layers.3",
}


def named(names):
    return dict(canonical_arrays({name: name for name in names}))


class TestNames:
    @pytest.mark.parametrize("names", [META, LLAMA_CPP, TRANSFORMER_LENS, HOOKED])
    def test_become_those_of_sites(self, names):
        assert named(names) == {site: name for name, site in names.items()}

    def test_one_by_one(self):
        for names in (META, TRANSFORMER_LENS, HOOKED):
            for name, site in names.items():
                assert named([name]) == {site: name}

    def test_of_sites_stay(self):
        names = [site.name for site in sites(GQA)]
        assert named(names) == {name: name for name in names}

    def test_of_many_layers(self):
        found = named(["l_out-0", "l_out-12", "blocks.105.hook_mlp_out"])
        expected = ["model.layers.0", "model.layers.12", "model.layers.105.mlp.down_proj"]
        assert list(found) == expected

    def test_that_are_unknown_stay(self):
        names = ["wq", "layers.x.attention.wq", "layers.03", "l_out-3-4", "hook_q#1", "x-1#2"]
        assert named(names) == {name: name for name in names}

    def test_of_several_tensors(self):
        """Product, sum with the bias, heads apart, RoPE: llama.cpp calls them all the same."""
        numbers = {f"{name}cur-0#{place}" for name in "QKV" for place in (2, 4, 8, 16)}
        assert named(numbers) == {
            "model.layers.0.self_attn.q_proj": "Qcur-0#8",
            "model.layers.0.self_attn.q_rope": "Qcur-0#16",
            "model.layers.0.self_attn.k_proj": "Kcur-0#8",
            "model.layers.0.self_attn.k_rope": "Kcur-0#16",
            "model.layers.0.self_attn.v_proj": "Vcur-0#16",
        }
        assert named(["Qcur-0", "Qcur-0#1"]) == {
            "model.layers.0.self_attn.q_proj": "Qcur-0",
            "model.layers.0.self_attn.q_rope": "Qcur-0#1",
        }

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                ["model.norm", "norm"],
                "'model.norm' and 'norm': both mean model.norm; expected one",
            ),
            (
                ["blocks.1.attn.hook_q", "layers.1.attention.wq"],
                "'blocks.1.attn.hook_q' and 'layers.1.attention.wq': both mean "
                "model.layers.1.self_attn.q_proj",
            ),
            (["model.norm", "model.norm.output"], "both mean model.norm"),
            (["ffn_up-0", "ffn_up_b-0"], "both mean model.layers.0.mlp.up_proj"),
            (["Vcur-0", "Vcur-0#0"], "'Vcur-0' and 'Vcur-0#0': both are number 0"),
            (
                ["Qcur-1"],
                "'Qcur-1': can mean model.layers.1.self_attn.q_proj or "
                "model.layers.1.self_attn.q_rope; expected Qcur-1#0, Qcur-1#1 and so on",
            ),
            (
                ["norm", "l_out-0", "layers.0.ffn_norm"],
                "'norm': expected names of one scheme, got names of Meta's and of llama.cpp's",
            ),
        ],
    )
    def test_refused(self, names, message):
        with pytest.raises(TraceError) as error:
            named(names)
        assert message in str(error.value)
        with pytest.raises(TraceError):
            Trace(dict.fromkeys(names))

    def test_norm_of_llama_cpp_is_no_site(self):
        assert named(["norm", "l_out-0"]) == {"norm": "norm", "model.layers.0": "l_out-0"}
        assert named(["norm", "layers.0"]) == {"model.norm": "norm", "model.layers.0": "layers.0"}

    def test_no_array_is_read(self):
        class Unread(Mapping):
            def __getitem__(self, name):
                raise AssertionError(f"{name} was read")

            def __iter__(self):
                return iter(["norm", "layers.0"])

            def __len__(self):
                return 2

        found = canonical_arrays(Unread())
        assert set(found) == {"model.norm", "model.layers.0"}
        assert len(found) == 2
        assert "model.norm" in found
        assert "norm" not in found
        with pytest.raises(AssertionError, match="norm was read"):
            found["model.norm"]


class TestTable:
    def test_has_every_site_once(self):
        configs = (CONFIGS[kind] for kind in ("norms on both sides", "qwen3", "multipliers"))
        every = {site.name for config in configs for site in sites(config)}
        layered = {name.replace("model.layers.0", "model.layers.{}") for name in every}
        rows = [row[0] for row in alias_table()]
        assert len(rows) == len(set(rows))
        assert set(rows) == {name for name in layered if "layers.1" not in name}
        assert all(len(row) == len(SCHEMES) for row in alias_table())

    def test_holds_what_was_written_by_hand(self):
        """And nothing else, but for names in old versions, with biases, in Gemma or in GLM-4."""
        rows = {row[0]: row[1:] for row in alias_table()}
        for column, names in enumerate((META, LLAMA_CPP, TRANSFORMER_LENS)):
            found = {
                name.partition("#")[0].replace("{}", "3")
                for row in rows.values()
                for name in row[column].split("|")
            }
            plain = {name.partition("#")[0] for name in names}
            others = "inp_embd ffn_gate_b-3 ffn_up_b-3 ffn_gate_par-3 sa_out-3 post_attn_norm-3"
            others += " inp_scaled post_mlp_norm-3"
            assert plain <= found <= plain | {"", *others.split()}


# Rows of heads, as a C program would write them.
def interleaved(array, width):
    """Within each head of the last axis, numbers i and i + width / 2 next to each other."""
    result = np.empty_like(array)
    for start in range(0, array.shape[-1], width):
        for i in range(width // 2):
            result[..., start + 2 * i] = array[..., start + i]
            result[..., start + 2 * i + 1] = array[..., start + width // 2 + i]
    return result


@pytest.fixture(params=["mqa", "biases", "qwen3", "norms of projections"])
def recorded(request):
    config = CONFIGS[request.param]
    model = model_of(config, random_weights(config, 0, np.float32))
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (1, 6))
    return model, record(model, ids, sites=["*"])


def passes(trace, model):
    report = check(trace, model)
    assert {result.verdict for result in report.results} == {"PASS"}
    return {result.site.name: result.difference for result in report.results}


class TestShapes:
    """A trace says the same in every shape that it may come in."""

    def test_without_batch(self, recorded):
        model, trace = recorded
        arrays = {name: array[0] for name, array in trace.arrays.items()}
        expected = passes(trace, model)
        assert passes(Trace(arrays, trace.input_ids), model) == expected
        assert passes(Trace(arrays, trace.input_ids[0]), model) == expected
        assert passes(Trace(arrays, trace.input_ids, attention_mask=np.ones(6)), model) == expected

    def test_without_ids(self, recorded):
        model, trace = recorded
        expected = passes(trace, model)
        del expected["model.embed_tokens"]
        for arrays in (trace.arrays, {name: a[0] for name, a in trace.arrays.items()}):
            found = check(Trace(arrays), model)
            assert {r.site.name: r.difference for r in found.results if r.judgement} == expected
            for name in arrays:  # each tells batch and sequence by itself
                (result,) = check(Trace({name: arrays[name]}), model).results
                assert result.verdict == "SEEN"
                assert result.shape == trace.arrays[name].shape

    def test_heads(self, recorded):
        model, trace = recorded
        width = model.config.head_dim
        arrays = {}
        for name, array in trace.arrays.items():
            role = name.rpartition(".")[2]
            if role in ("q_rope", "k_rope", "attention", "q_norm", "k_norm") and array.ndim == 4:
                array = array.reshape(*array.shape[:2], -1)
            elif role in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
                array = array.reshape(*array.shape[:2], -1, width)
            arrays[name] = array
        assert passes(Trace(arrays, trace.input_ids), model) == passes(trace, model)
        alone = {name: array[0] for name, array in arrays.items()}
        assert passes(Trace(alone, trace.input_ids), model) == passes(trace, model)

    def test_channels_before_heads(self, recorded):
        model, trace = recorded
        name = "model.layers.0.self_attn.k_proj"
        array = trace.arrays[name]
        turned = array.reshape(*array.shape[:2], model.config.head_dim, -1)
        assert turned.shape[2] != turned.shape[3]
        with pytest.raises(TraceError, match=f"{name}: expected shape"):
            check(Trace({name: turned}, trace.input_ids), model)

    def test_of_transformer_lens(self, recorded):
        """Heads apart, and scores of minus infinity where a key is hidden."""
        model, trace = recorded
        names = {s: name.replace("blocks.3", "blocks.{}") for name, s in TRANSFORMER_LENS.items()}
        arrays = {}
        for site, array in trace.arrays.items():
            number = site.split(".")[2] if ".layers." in site else ""
            name = names[site.replace(f".{number}", ".3", 1) if number else site].format(number)
            if name.endswith(("hook_q", "hook_k", "hook_v")):
                array = array.reshape(*array.shape[:2], -1, model.config.head_dim)
            elif name.endswith("hook_attn_scores"):
                array = np.where(np.tri(6, dtype=bool), array, np.float32(-np.inf))
            arrays[name] = array
        assert not set(arrays) & set(trace.arrays)
        found, expected = passes(Trace(arrays, trace.input_ids), model), passes(trace, model)
        assert found.keys() == expected.keys()
        assert all(found[name] == expected[name] for name in found if "scores" not in name)

    def test_interleaved(self, recorded):
        model, trace = recorded
        arrays = {
            name: interleaved(array, model.config.head_dim)
            if name.endswith(("q_proj", "k_proj", "q_norm", "k_norm", "q_rope", "k_rope"))
            else array
            for name, array in trace.arrays.items()
        }
        said = Trace(arrays, trace.input_ids, metadata={"rope_layout": "interleaved"})
        assert passes(said, model) == passes(trace, model)
        failed = {
            result.site.role
            for result in check(Trace(arrays, trace.input_ids), model, explain=False).results
            if result.verdict == "FAIL"
        }
        assert {"self_attn.q_proj", "self_attn.k_proj"} <= failed

    def test_last_token(self, recorded):
        model, trace = recorded
        arrays = dict(trace.arrays)
        for name in ("model.norm", "lm_head"):
            arrays[name] = arrays[name][0, -1:]
        passes(Trace(arrays, trace.input_ids), model)

    @pytest.mark.parametrize(
        ("role", "change", "shape"),
        [
            ("self_attn.q_rope", lambda a: np.swapaxes(a, 1, 2), "[1, 6, 4, 4]"),
            ("self_attn.attention", lambda a: a[..., 0], "[1, 6, 4, 4]"),
            ("self_attn.q_proj", lambda a: a.reshape(6, 1, 16), "[1, 6, 16]"),
            ("mlp.act", lambda a: a.reshape(1, 6, 2, 7), "[1, 6, 14]"),
            ("attention_residual", lambda a: a.reshape(-1), "[1, 6, 10]"),
        ],
    )
    def test_refused(self, role, change, shape):
        model = model_of(GQA, random_weights(GQA, 0, np.float32))
        trace = record(model, np.zeros((1, 6), int))
        name = f"model.layers.1.{role}"
        array = change(trace.arrays[name])
        with pytest.raises(TraceError) as error:
            check(Trace(dict(trace.arrays) | {name: array}, trace.input_ids), model)
        message = str(error.value)
        assert message.startswith(f"{name}: expected shape {shape} ")
        assert f"got {list(array.shape)}" in message

    def test_refused_layout(self):
        model = model_of(GQA, random_weights(GQA, 0, np.float32))
        arrays, ids = {"model.norm": np.ones((6, 10))}, np.zeros(6, int)
        trace = Trace(arrays, ids[None], metadata={"rope_layout": "neox"})
        with pytest.raises(TraceError, match="rope_layout: expected 'half' or 'interleaved', got"):
            check(trace, model)

    def test_refused_type(self):
        model = model_of(GQA, random_weights(GQA, 0, np.float32))
        trace = Trace({"model.norm": [[1.0]]}, np.zeros((1, 6), int))
        with pytest.raises(TraceError, match=r"model\.norm: expected an array, got list"):
            check(trace, model)


class TestSuggestions:
    def refusal(self, name):
        model = model_of(GQA, random_weights(GQA, 0, np.float32))
        with pytest.raises(TraceError) as error:
            check(Trace({name: np.ones((1, 2, 10))}), model)
        return str(error.value)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("norm-1", "a row before it is multiplied with the weight"),
            ("blocks.1.ln2.hook_normalized", "a row before it is multiplied with the weight"),
            ("blocks.1.hook_resid_pre", "what the layer before it gives"),
            ("kq-0", "scores before they are scaled"),
            ("model.layers.1.mlp", "mlp.down_proj once more"),
            ("layers.1.attention", "layers.1.attention.wo once more"),
        ],
    )
    def test_of_what_is_no_site(self, name, reason):
        assert f"{name!r} (no site: {reason})" in self.refusal(name)
        assert no_site(name) == reason

    @pytest.mark.parametrize(
        ("name", "site"),
        [
            ("model.layers.1.self_attn.q_prj", "model.layers.1.self_attn.q_proj"),
            ("model.layers.1.post_attention_norm", "model.layers.1.post_attention_layernorm"),
            ("layers.1.mlp.gateproj", "model.layers.1.mlp.gate_proj"),
        ],
    )
    def test_of_what_is_close(self, name, site):
        assert f"{name!r} (is it {site!r}?)" in self.refusal(name)
        assert no_site(name) is None
