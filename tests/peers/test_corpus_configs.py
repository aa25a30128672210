"""Published config.json files, read as transformers reads them.

Each file of our families is accepted and equal to transformers' reading, or refused for one
of a few reasons that the file itself shows; each other file is refused by its ``model_type``.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_layers import ConfigError, LlamaConfig, inv_freq
from llama_layers.layers.rope import attention_factor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SAME = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
rms_norm_eps max_position_embeddings tie_word_embeddings hidden_act bos_token_id pad_token_id
""".split()


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


def in_transformers(path: Path, directory: Path) -> Any:
    """The config as transformers reads it, from a directory as published."""
    transformers = pytest.importorskip("transformers")
    shutil.copy(path, directory / "config.json")
    return transformers.AutoConfig.from_pretrained(directory)


def window(theirs: Any, layer: int) -> int | None:
    """How far a layer attends in transformers' model code.

    Llama's asks for no window, Mistral's for the same in all layers, Qwen2's and Ministral's by
    the type of the layer.
    """
    if theirs.model_type == "llama":
        return None
    if theirs.model_type == "mistral":
        return theirs.sliding_window
    sliding = theirs.layer_types[layer] == "sliding_attention"
    return theirs.sliding_window if sliding else None


def differences(ours: LlamaConfig, theirs: Any) -> list[str]:
    """The names of what is not the same in both."""
    torch = importlib.import_module("torch")
    name = type(theirs).__name__.removesuffix("Config")
    module = importlib.import_module(
        f"transformers.models.{theirs.model_type}.modeling_{theirs.model_type}"
    )
    with torch.device("meta"):
        attention = getattr(module, f"{name}Attention")(theirs, 0)
        mlp = getattr(module, f"{name}MLP")(theirs)
    rope = getattr(module, f"{name}RotaryEmbedding")(theirs)
    eos = list(ours.eos_token_id) if isinstance(ours.eos_token_id, tuple) else ours.eos_token_id
    same = {key: getattr(ours, key) == getattr(theirs, key) for key in SAME} | {
        "eos_token_id": eos == theirs.eos_token_id,
        "head_dim": ours.head_dim == attention.head_dim,
        "qkv_bias": ours.qkv_bias == (attention.q_proj.bias is not None),
        "o_bias": ours.o_bias == (attention.o_proj.bias is not None),
        "mlp_bias": ours.mlp_bias == (mlp.gate_proj.bias is not None),
        "scale": ours.head_dim**-0.5 == attention.scaling,
        "rope_theta": ours.rope_theta == theirs.rope_parameters["rope_theta"],
        "dtype": ours.dtype is None or f"torch.{ours.dtype}" == str(theirs.dtype),
        "windows": all(
            ours.window_of(layer) == window(theirs, layer)
            for layer in range(ours.num_hidden_layers)
        ),
        # Theirs are powers in float32: the error of an exponent grows with log(theta) < 30.
        "frequencies": np.allclose(inv_freq(ours), rope.inv_freq.numpy(), rtol=4e-6, atol=0),
        "attention_factor": np.isclose(attention_factor(ours), rope.attention_scaling, rtol=1e-12),
    }
    return [key for key, agrees in same.items() if not agrees]


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
            with pytest.raises(ConfigError, match=r"model_type.*one of llama, mistral, qwen2") as e:
                LlamaConfig.from_json(path)
            assert family is None or f"got {family!r}" in str(e.value)
            others += 1
    assert others > 50


SAID = {
    "vocab_size": 64,
    "hidden_size": 128,
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
    "swish": {"use_mrope": False, "eos_token_id": [3, 4], "bos_token_id": -1},
}


# What their class does not take: null for these, and (ours) Qwen2's switch in a Llama file.
REFUSED = {
    ("mistral", "no number of key heads"),
    ("qwen2", "no size of heads"),
    ("qwen3", "no size of heads"),
    ("llama", "window switched on"),
    ("llama", "window of no size"),
}


@pytest.mark.parametrize(
    ("family", "change"),
    [
        (family, change)
        for family in FAMILIES
        for change in CHANGES
        if (family, change) not in REFUSED
    ],
)
def test_what_is_left_out_or_not_read(family, change, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(SAID | CHANGES[change] | {"model_type": family}))
    theirs = in_transformers(path, tmp_path)
    assert differences(LlamaConfig.from_json(path), theirs) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_transformers_writes_is_read(family, tmp_path):
    """A dump of every attribute, defaults included."""
    transformers = pytest.importorskip("transformers")
    written = transformers.AutoConfig.for_model(family, num_hidden_layers=3)
    path = tmp_path / "file.json"
    path.write_text(json.dumps(written.to_dict()))
    assert differences(LlamaConfig.from_json(path), written) == []
