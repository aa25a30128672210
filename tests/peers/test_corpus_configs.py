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
from llama_layers.config.families import FAMILIES as SUPPORTED
from llama_layers.layers.rope import attention_factor

pytestmark = pytest.mark.peer

# Families of which transformers has a config, and the class of Llama.
LLAMAS = ("exaone", "internlm3", "iquestcoder")
FAMILIES = (
    *"llama mistral qwen2 qwen3 ministral cwm ernie4_5 helium seed_oss".split(),
    *"smollm3 ministral3 glm phi3".split(),
    *LLAMAS,
)
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
    if not hasattr(type(theirs), "sliding_window"):
        return None
    if theirs.model_type in ("mistral", "ministral3", "phi3"):
        return theirs.sliding_window
    sliding = theirs.layer_types[layer] == "sliding_attention"
    return theirs.sliding_window if sliding else None


def joined(module: Any, *names: str) -> Any:
    """A projection, under the name that it has by itself or together with others."""
    return next(found for name in names if (found := getattr(module, f"{name}_proj", None)))


def differences(ours: LlamaConfig, theirs: Any) -> list[str]:
    """The names of what is not the same in both."""
    torch = importlib.import_module("torch")
    name, family = type(theirs).__name__.removesuffix("Config"), theirs.model_type
    if family in LLAMAS:
        name, family = "Llama", "llama"
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    with torch.device("meta"):
        attention = getattr(module, f"{name}Attention")(theirs, 0)
        mlp = getattr(module, f"{name}MLP")(theirs)
    rope = getattr(module, f"{name}RotaryEmbedding")(theirs)
    eos = list(ours.eos_token_id) if isinstance(ours.eos_token_id, tuple) else ours.eos_token_id
    same = {key: getattr(ours, key) == getattr(theirs, key) for key in SAME} | {
        "eos_token_id": eos == theirs.eos_token_id,
        "head_dim": ours.head_dim == attention.head_dim,
        "qkv_bias": ours.qkv_bias == (joined(attention, "q", "qkv").bias is not None),
        "o_bias": ours.o_bias == (attention.o_proj.bias is not None),
        "mlp_bias": ours.mlp_bias == (joined(mlp, "gate", "gate_up").bias is not None),
        "scale": np.isclose(ours.head_dim**-0.5, attention.scaling, rtol=1e-15),
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
        if (family := content.get("model_type")) not in SUPPORTED:
            with pytest.raises(ConfigError, match=r"model_type.*one of llama, ") as e:
                LlamaConfig.from_json(path)
            assert family is None or f"got {family!r}" in str(e.value)
            others += 1
    assert others > 50


# Families whose switches are there, or come.
def test_each_other_causal_model_has_its_reason():
    module = importlib.import_module("transformers.models.auto.modeling_auto")
    transformers = importlib.import_module("transformers")
    others = set(module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(SUPPORTED)
    others -= {"gemma4_assistant"}
    assert len(others) > 100
    for family in sorted(others):
        content = transformers.AutoConfig.for_model(family).to_dict()
        with pytest.raises(ConfigError, match=r", which has .*: not supported$"):
            LlamaConfig.from_json(content | {"model_type": family})


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


# What some classes do not do without, or not with.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "helium": {"num_attention_heads": 20},
    "ministral": {"head_dim": 4},
}
WITHOUT_WINDOW = ("llama", "ernie4_5", "glm", "helium", "seed_oss", *LLAMAS)
WITHOUT_SWITCH = (*WITHOUT_WINDOW, "ministral3", "phi3")
# What their class does not take: null for these, and (ours) Qwen2's switch in a Llama file, windows
# of no size, two bases, and scalings of another kind than Phi-3's.
REFUSED = {
    ("mistral", "no number of key heads"),
    ("ministral", "no number of key heads"),
    ("cwm", "no number of key heads"),
    ("helium", "no number of key heads"),
    ("qwen2", "no size of heads"),
    ("qwen3", "no size of heads"),
    ("ministral", "no size of heads"),
    ("cwm", "no size of heads"),
    ("helium", "no size of heads"),
    *(("ministral3", f"no {what}") for what in ("number of key heads", "size of heads")),
    *(("glm", f"no {what}") for what in ("number of key heads", "size of heads")),
    ("smollm3", "no size of heads"),
    ("phi3", "no size of heads"),
    ("cwm", "window of no size"),
    ("cwm", "empty"),
    ("cwm", "false"),
    ("ministral3", "empty"),
    ("ministral3", "false"),
    *(("phi3", change) for change in CHANGES if "rope_scaling" in CHANGES[change]),
    *((family, "window switched on") for family in WITHOUT_SWITCH),
    *((family, "window of no size") for family in WITHOUT_SWITCH),
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
    path.write_text(
        json.dumps(SAID | OF_FAMILY.get(family, {}) | CHANGES[change] | {"model_type": family})
    )
    theirs = in_transformers(path, tmp_path)
    assert differences(LlamaConfig.from_json(path), theirs) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_transformers_writes_is_read(family, tmp_path):
    """A dump of every attribute, defaults included."""
    transformers = pytest.importorskip("transformers")
    of_family = OF_FAMILY.get(family, {})
    written = transformers.AutoConfig.for_model(family, num_hidden_layers=3, **of_family)
    path = tmp_path / "file.json"
    path.write_text(json.dumps(written.to_dict()))
    assert differences(LlamaConfig.from_json(path), written) == []
