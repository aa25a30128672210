"""`record_transformers` with a cache, with dropout, and with several dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from llama_layers import Llama
from llama_layers.verify import check
from llama_layers.verify.recorders import record_transformers
from tests.peers.test_recorders import FAMILIES, IDS, model_in

pytestmark = pytest.mark.peer


class TestPast:
    """Tokens after those of a cache."""

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_recorded_and_judged(self, family, attention):
        model = model_in(family, attention)
        ours = Llama.from_state_dict(model.state_dict(), model.config)
        with torch.no_grad():
            cache = model(IDS[:, :4], use_cache=True).past_key_values
        trace = record_transformers(model, IDS[:, 4:], cache=cache)
        assert cache.get_seq_length() == 4
        report = check(trace, ours)
        assert {r.verdict for r in report.results} <= {"PASS", "WARN"}, report.first
        assert len(report.results) == len(record_transformers(model, IDS).arrays)
        # Keys of the past are those of the run of all tokens.
        whole = record_transformers(model, IDS)
        for name in (name for name in trace.arrays if name.endswith("past_key")):
            past = trace.arrays[name]
            keys = whole.arrays[name.replace("past_key", "k_rope")][:, 4 - past.shape[1] : 4]
            np.testing.assert_allclose(past, keys, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_padded(self, family):
        model = model_in(family)
        ours = Llama.from_state_dict(model.state_dict(), model.config)
        mask = torch.ones_like(IDS)
        mask[1, :2] = 0
        with torch.no_grad():
            cache = model(IDS[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
        trace = record_transformers(model, IDS[:, 4:], attention_mask=mask, cache=cache)
        report = check(trace, ours)
        assert {r.verdict for r in report.results} <= {"PASS", "WARN"}, report.first

    def test_other_caches_are_refused(self):
        model = model_in("Llama")
        static = transformers.StaticCache(config=model.config, max_cache_len=16)
        with pytest.raises(ValueError, match="cache: expected a DynamicCache, got StaticCache"):
            record_transformers(model, IDS, cache=static)


class TestDropout:
    """The model runs in its own mode."""

    @pytest.mark.filterwarnings("ignore:.*training mode")
    def test_shows(self):
        model = model_in("Llama", attention_dropout=0.5).train()
        ours = Llama.from_state_dict(model.state_dict(), model.config)
        report = check(record_transformers(model, IDS), ours)
        assert report.first.site.role == "self_attn.attention"
        assert model.training

    def test_warned_of_once(self):
        model = model_in("Llama", attention_dropout=0.5).train()
        with pytest.warns(UserWarning, match=r"attention_dropout \(0\.5\)") as found:
            record_transformers(model, IDS)
        assert len(found) == 1
        assert "call model.eval() before recording" in str(found[0].message)

    @pytest.mark.parametrize("change", [{"attention_dropout": 0.0}, {"attention_dropout": 0.5}])
    def test_not_warned_of(self, change, recwarn):
        model = model_in("Llama", **change)  # in evaluation mode
        if not change["attention_dropout"]:
            model.train()
        record_transformers(model, IDS)
        assert not [w for w in recwarn if "dropout" in str(w.message)]


def test_a_dtype_is_stated_only_if_all_arrays_have_it():
    model = model_in("Llama", dtype=torch.bfloat16)
    assert record_transformers(model, IDS).metadata["dtype"] == "bfloat16"
    model.lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    trace = record_transformers(model, IDS)
    assert "dtype" not in trace.metadata
    assert trace.arrays["lm_head"].dtype == np.float32
