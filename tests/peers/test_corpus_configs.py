"""Published config.json files, read as transformers reads them.

Each file of our families is accepted and equal to transformers' reading, or refused for one
of a few reasons that the file itself shows; each other file is refused by its ``model_type``.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llama_layers import ConfigError, LlamaConfig
from llama_layers.config.families import FAMILIES
from tests.support.config_of_transformers import differences, in_transformers

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def published(corpus: Path) -> dict[Path, dict[str, Any]]:
    """The parsed files."""
    read = {path: json.loads(path.read_text()) for path in sorted((corpus / "config").iterdir())}
    assert len(read) > 100
    return {path: content for path, content in read.items() if isinstance(content, dict)}


def reason(content: dict[str, Any]) -> str | None:
    """What message a file of our families is refused with, by what it shows."""
    heads = " ".join(content.get("architectures", ()))
    if "draft_vocab_size" in content or "Eagle" in heads or "Draft" in heads:
        return "expected a whole model, got a draft head"
    if "quantization_config" in content:
        return "quantised weights"
    if not content.keys() & {"max_position_embeddings", "max_sequence_length"}:
        return "missing max_position_embeddings"
    return None


def test_files_of_our_families(published, tmp_path):
    found: Counter[str] = Counter()
    for path, content in published.items():
        if content.get("model_type") not in FAMILIES:
            continue
        if (expected := reason(content)) is not None:
            with pytest.raises(ConfigError, match=expected):
                LlamaConfig.from_json(path)
            found[expected] += 1
            continue
        theirs = in_transformers(path, tmp_path)
        assert differences(LlamaConfig.from_json(path), theirs) == [], path.name
        found["equal"] += 1
    assert found["equal"] > 30
    assert len(found) > 2


def test_files_of_other_architectures(published):
    others = 0
    for path, content in published.items():
        if (family := content.get("model_type")) not in FAMILIES:
            with pytest.raises(ConfigError, match=r"model_type.*one of llama, ") as e:
                LlamaConfig.from_json(path)
            assert family is None or f"got {family!r}" in str(e.value)
            others += 1
    assert others > 50


def test_each_other_causal_model_has_its_reason():
    module = importlib.import_module("transformers.models.auto.modeling_auto")
    transformers = importlib.import_module("transformers")
    others = set(module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAMILIES)
    others -= {"gemma4_assistant"}
    assert len(others) > 100
    for family in sorted(others):
        content = transformers.AutoConfig.for_model(family).to_dict()
        with pytest.raises(ConfigError, match=r", which has .*: not supported$"):
            LlamaConfig.from_json(content | {"model_type": family})


SAID = {
    "vocab_size": 64,
    "hidden_size": 1024,
    "intermediate_size": 96,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no number of key heads": {"num_key_value_heads": None},
    "no size of heads": {"head_dim": None},
    "window": {"sliding_window": 7},
    "window switched off": {"sliding_window": 7, "use_sliding_window": False},
    "window switched on": {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2},
    "window of no size": {"sliding_window": None, "use_sliding_window": True},
    "finetuned": {"rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True}},
    "yarn of the context": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0}},
    "yarn of another": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 64,
    },
    "llama3 of the context": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
    "two types": {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 4.0}},
    "a short context": {"rope_scaling": {"type": "linear", "factor": 0.5, "beta_fast": 3}},
    "dynamic": {
        "rope_scaling": {
            "type": "dynamic",
            "factor": 2.0,
            "original_max_position_embeddings": 16,
        }
    },
    "empty": {"rope_scaling": {}, "rope_theta": 5e5},
    "false": {"rope_scaling": False, "rope_theta": 5e5},
    "nested": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2]}
    },
    "theta alone": {"rope_theta": 5e5},
    "empty parameters": {"rope_parameters": {}},
    "a scaling and other parameters": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
    },
    "a ramp between": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
    "a ramp of null": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": None}},
    "alpha of 0": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "alpha": 0}},
    "swish": {"use_mrope": False, "eos_token_id": [3, 4], "bos_token_id": -1},
}
GEMMAS = "gemma2 gemma3_text vaultgemma"
MULTIPLIED = "granite granite_swa hyperclovax"
# Changes that only some families read, with their names.
OF_SOME: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": (
        f"llama smollm3 exaone helium internlm3 iquestcoder seed_oss {MULTIPLIED}",
        {"attention_bias": True, "mlp_bias": True},
    ),
    "biases of attention": (
        f"qwen3 glm glm4 olmo2 olmo3 hunyuan_v1_dense gemma {GEMMAS}",
        {"attention_bias": True},
    ),
    "multipliers": (
        MULTIPLIED,
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.125,
            "residual_multiplier": 0.25,
            "logits_scaling": 8,
        },
    ),
    "no multiplier of attention": ("hyperclovax", {"attention_multiplier": None}),
    "norms before only": ("hyperclovax", {"use_post_norm": False}),
    "caps": (GEMMAS, {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}),
    "no caps": (GEMMAS, {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "scalar": (GEMMAS, {"query_pre_attn_scalar": 144}),
    "name of the activation": ("gemma", {"hidden_act": "gelu"}),
    "every second": (f"exaone4 {GEMMAS}", {"sliding_window": 7, "sliding_window_pattern": 2}),
    "types": (
        f"ministral cwm olmo3 granite_swa exaone4 {GEMMAS}",
        {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"] * 15},
    ),
    "types and letters": (
        "exaone4",
        {"layer_types": ["full_attention"] * 30, "sliding_window_pattern": "LLLG"},
    ),
    "two bases": ("gemma3_text", {"rope_theta": 5e5, "rope_local_base_freq": 300.0}),
    "a base and a scaling": (
        "gemma3_text olmo3 granite_swa exaone4",
        {"rope_theta": 3e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "bases by type": (
        "gemma3_text olmo3",
        {
            "rope_parameters": {
                "full_attention": {"type": "linear", "rope_theta": 5e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
    ),
    "a base of one type": (
        "gemma3_text olmo3",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 300.0}}},
    ),
    "a scaling over parameters": (
        "gemma3_text olmo3",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 300.0}},
        },
    ),
    "a ramp between, beside the types": (
        "gemma3_text olmo3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "factor": 4.0},
                "truncate": False,
            }
        },
    ),
    "a context inside and outside": (
        "gemma3_text olmo3",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "original_max_position_embeddings": 32,
        },
    ),
    "a context inside only": (
        "phi3",
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 16,
                "long_factor": [2.0] * 16,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "bases by layer": ("granite_swa", {"layer_rope_theta": [0, 300.0, 5e5] * 10}),
    "layers without RoPE": ("smollm3", {"no_rope_layers": [0, 1, 1] * 10}),
    "each third without RoPE": ("smollm3", {"no_rope_layer_interval": 3}),
    "alpha": (
        "hunyuan_v1_dense",
        {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    ),
    "a part": ("phi3 glm glm4", {"partial_rotary_factor": 0.25}),
}
# What some classes do not do without, or not with.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "helium": {"num_attention_heads": 20},
    "ministral": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
}


def pairs(*rows: tuple[str, str]) -> set[tuple[str, str]]:
    """Each family of a row with the row's change."""
    return {(family, change) for change, families in rows for family in families.split()}


# What transformers itself does not take: null for these, and scalings of another kind than Phi-3's.
NOT_THEIRS = pairs(
    (
        "no number of key heads",
        f"mistral ministral ministral3 cwm helium glm glm4 exaone4 gemma {GEMMAS}",
    ),
    (
        "no size of heads",
        "qwen2 qwen3 ministral ministral3 cwm helium smollm3 phi3 glm glm4 olmo2 olmo3 exaone4 "
        f"hunyuan_v1_dense granite granite_swa gemma {GEMMAS}",
    ),
    ("false", "gemma3_text olmo3"),
    *((change, "phi3") for change in CHANGES if CHANGES[change].get("rope_scaling")),
)
# What we refuse: Qwen2's switch in a file of another family, windows of no size, two bases, and
# words that a class with parameters of RoPE for each type of layer silently passes over.
SWITCHED = "mistral ministral qwen2 qwen3 smollm3"
REFUSED = pairs(
    ("window switched on", " ".join(set(FAMILIES) - {*SWITCHED.split(), "cwm"})),
    ("window of no size", " ".join(set(FAMILIES) - set(SWITCHED.split()))),
    ("nested", "gemma3_text olmo3"),
    ("finetuned", "gemma3_text olmo3"),
    ("yarn of another", "gemma3_text olmo3"),
    ("a short context", "gemma3_text olmo3"),
    ("dynamic", "gemma3_text olmo3"),
    ("a scaling and other parameters", "gemma3_text olmo3"),
    ("a ramp between", "gemma3_text olmo3"),
)
CASES = {(family, change) for family in FAMILIES for change in CHANGES} | pairs(
    *((change, families) for change, (families, _) in OF_SOME.items())
)


def content(family: str, change: str) -> dict[str, Any]:
    """A made file of a family."""
    said = OF_SOME[change][1] if change in OF_SOME else CHANGES[change]
    return SAID | OF_FAMILY.get(family, {}) | said | {"model_type": family}


@pytest.mark.parametrize(("family", "change"), sorted(CASES - NOT_THEIRS - REFUSED))
def test_what_is_left_out_or_not_read(family, change, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content(family, change)))
    theirs = in_transformers(path, tmp_path)
    assert differences(LlamaConfig.from_json(path), theirs) == []


def test_what_is_refused():
    assert REFUSED < CASES
    for family, change in sorted(REFUSED):
        with pytest.raises(ConfigError, match=r"does not read|missing|expected (one|objects)"):
            LlamaConfig.from_json(content(family, change))


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_transformers_writes_is_read(family, tmp_path):
    """A dump of every attribute, defaults included."""
    transformers = pytest.importorskip("transformers")
    of_family = OF_FAMILY.get(family, {})
    written = transformers.AutoConfig.for_model(family, num_hidden_layers=3, **of_family)
    path = tmp_path / "file.json"
    path.write_text(json.dumps(written.to_dict()))
    assert differences(LlamaConfig.from_json(path), written) == []
