"""The table of sites: rows that only some models have."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from llama_layers import LlamaConfig, forward
from llama_layers.verify import record, sites
from llama_layers.verify.aliases import canonical_arrays
from tests.support.random_models import CONFIGS, model_of, random_weights

CONFIG = replace(LlamaConfig.smollm2_135m(), num_hidden_layers=2)


@pytest.fixture
def with_a_switch(monkeypatch):
    """A norm of the query heads, as if the switch mlp_bias brought it."""
    module = sys.modules[sites.__module__]
    rows = module._LAYER.splitlines()
    at = next(i for i, row in enumerate(rows) if row.startswith("self_attn.q_rope"))
    rows[at : at + 1] = [
        "mlp_bias? self_attn.q_norm  norm  B S heads D  self_attn.q_proj",
        "self_attn.q_rope  rope  B S heads D  self_attn.q_norm",
    ]
    monkeypatch.setattr(module, "_LAYER", "\n".join(rows))
    module._of_model.cache_clear()
    yield
    module._of_model.cache_clear()


def test_a_row_that_is_switched_off_is_passed_over(with_a_switch):
    found = {site.name: site for site in sites(CONFIG)}
    assert not any("q_norm" in name for name in found)
    rope = found["model.layers.1.self_attn.q_rope"]
    assert rope.routes == (("model.layers.1.self_attn.q_proj",),)


def test_a_row_that_is_switched_on_stands_between(with_a_switch):
    found = {site.name: site for site in sites(replace(CONFIG, mlp_bias=True))}
    norm = found["model.layers.1.self_attn.q_norm"]
    assert (norm.operation, norm.shape) == ("norm", ("B", "S", 9, 64))
    assert norm.routes == (("model.layers.1.self_attn.q_proj",),)
    rope = found["model.layers.1.self_attn.q_rope"]
    assert rope.routes == (("model.layers.1.self_attn.q_norm",),)


OLMO_2 = {  # by the name in transformers, what it is
    "post_attention_layernorm": "post_self_attn_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}


def test_a_family_has_names_of_its_own():
    inside = {s.inside: s.role for s in sites(CONFIGS["olmo2"]) if s.layer == 1}
    assert {name: role for name, role in inside.items() if name != role} == OLMO_2
    assert "input_layernorm" not in inside


def test_a_role_names_a_site_unless_another_has_that_name():
    """OLMo 2 has no norm of the name ``post_mlp_layernorm``, and no other of that role."""
    model = model_of(CONFIGS["olmo2"], random_weights(CONFIGS["olmo2"], 0, np.float32))
    ids, own = np.array([[3, 1]]), "model.layers.1.post_feedforward_layernorm"
    trace = record(model, ids, sites=["post_mlp_layernorm"], layers=[1])
    assert list(trace.arrays) == [own]
    seen = []
    tap = {"post_mlp_layernorm": lambda name, y: seen.append(name) or y}
    forward(model, ids, tap=tap)
    assert seen == [own.replace("1", "0"), own]
    ambiguous = record(model, ids, sites=["post_attention_layernorm"], layers=[1])
    (role,) = {site.role for site in sites(model.config) if site.name in ambiguous.arrays}
    assert role == "post_self_attn_layernorm"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("layers.1.post_feedforward_layernorm.output", "post_feedforward_layernorm"),
        ("blk.1.x", None),
        ("attn_post_norm-1", "post_attention_layernorm"),
        ("ffn_post_norm-1", "post_feedforward_layernorm"),
        ("model.layers.1.post_attention_layernorm", "post_attention_layernorm"),
    ],
)
def test_other_projects_names_are_those_of_the_family(given, name):
    found = list(canonical_arrays({given: None}, "olmo2"))
    assert found == [given if name is None else f"model.layers.1.{name}"]
    gemma = list(canonical_arrays({"ffn_norm-1": None}, "gemma2"))
    assert gemma == ["model.layers.1.pre_feedforward_layernorm"]
