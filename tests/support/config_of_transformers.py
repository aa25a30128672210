"""A config.json as transformers reads it, for a comparison with ours."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from llama_layers import LlamaConfig, inv_freq
from llama_layers.layers.rope import attention_factor

# Families of which transformers has a config, and the class of Llama.
LLAMAS = ("exaone", "internlm3", "iquestcoder")
SAME = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
rms_norm_eps max_position_embeddings tie_word_embeddings bos_token_id pad_token_id
""".split()
# Switches of a few families, with what they are where a class does not have them.
SWITCHES = {
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "llama_4_scaling_beta": 0.0,
}


class Rope(NamedTuple):
    """What rotates queries and keys of a layer."""

    frequencies: np.ndarray
    factor: float


def in_transformers(path: Path, directory: Path) -> Any:
    """The config as transformers reads it, from a directory as published."""
    transformers = pytest.importorskip("transformers")
    shutil.copy(path, directory / "config.json")
    return transformers.AutoConfig.from_pretrained(directory)


def differences(ours: LlamaConfig, theirs: Any) -> list[str]:
    """The names of what is not the same in both."""
    attention, mlp = modules(theirs)
    layers = range(ours.num_hidden_layers)
    eos = list(ours.eos_token_id) if isinstance(ours.eos_token_id, tuple) else ours.eos_token_id
    same = {key: getattr(ours, key) == getattr(theirs, key) for key in SAME} | {
        key: getattr(ours, key) == switch(theirs, key) for key in SWITCHES
    }
    same |= {
        "hidden_act": ours.hidden_act == activation(theirs),
        "eos_token_id": eos == theirs.eos_token_id,
        "head_dim": ours.head_dim == attention.head_dim,
        "qkv_bias": ours.qkv_bias == (joined(attention, "q", "qkv").bias is not None),
        "o_bias": ours.o_bias == (attention.o_proj.bias is not None),
        "mlp_bias": ours.mlp_bias == (joined(mlp, "gate", "gate_up").bias is not None),
        "scale": math.isclose(ours.attention_scale, attention.scaling, rel_tol=1e-15),
        "embedding_multiplier": ours.embedding_multiplier == embedding_multiplier(theirs),
        "norm_placement": (ours.norm_placement == "both") == norms_twice(theirs),
        "dtype": ours.dtype is None or f"torch.{ours.dtype}" == str(theirs.dtype),
        "windows": all(ours.window_of(layer) == window(theirs, layer) for layer in layers),
        "rope": same_rope(ours, theirs),
    }
    return [key for key, agrees in same.items() if not agrees]


def modelling(theirs: Any) -> tuple[Any, str]:
    """The module with the code of a family's model, and the start of the names of its classes."""
    if theirs.model_type in LLAMAS:
        return importlib.import_module("transformers.models.llama.modeling_llama"), "Llama"
    module = type(theirs).__module__.replace("configuration_", "modeling_")
    return importlib.import_module(module), type(theirs).__name__.removesuffix("Config")


def modules(theirs: Any) -> tuple[Any, Any]:
    """Attention and the MLP of the first layer, without numbers."""
    module, name = modelling(theirs)
    name = name.removesuffix("Text")
    with importlib.import_module("torch").device("meta"):
        return getattr(module, f"{name}Attention")(theirs, 0), getattr(module, f"{name}MLP")(theirs)


def joined(module: Any, *names: str) -> Any:
    """A projection, under the name that it has by itself or together with others."""
    return next(found for name in names if (found := getattr(module, f"{name}_proj", None)))


def activation(theirs: Any) -> str:
    """The activation of the MLP, of which some classes have another name."""
    found = getattr(theirs, "hidden_activation", None) or theirs.hidden_act
    return "silu" if found == "swish" else found


def switch(theirs: Any, key: str) -> Any:
    """A switch of a few families."""
    if key == "llama_4_scaling_beta":
        return (theirs.rope_parameters or {}).get(key, SWITCHES[key])
    if theirs.model_type == "gemma3_text" and key == "attn_logit_softcapping":
        return None  # its attention does not use it
    return getattr(theirs, key, SWITCHES[key])


def embedding_multiplier(theirs: Any) -> float:
    """What the rows of the embedding are multiplied by; in Gemma its code says so."""
    if "gemma" in theirs.model_type:
        return theirs.hidden_size**0.5
    return getattr(theirs, "embedding_multiplier", 1.0)


def norms_twice(theirs: Any) -> bool:
    """Whether attention and the MLP have norms before and after them."""
    if theirs.model_type == "hyperclovax":
        return theirs.use_post_norm
    return theirs.model_type in ("gemma2", "gemma3_text", "glm4")


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


def same_rope(ours: LlamaConfig, theirs: Any) -> bool:
    """Whether each layer rotates alike; layers that share both are compared once."""
    of_layers = map(ours.rope_of, range(ours.num_hidden_layers))
    every = list(zip(of_layers, ropes(theirs), strict=True))
    different = {(own, id(rope)): (own, rope) for own, rope in every}.values()
    return all(itertools.starmap(same_kind, different))


def same_kind(ours: LlamaConfig | None, theirs: Rope | None) -> bool:
    """Whether one layer rotates alike.

    Their frequencies are powers in float32: the error of an exponent grows with log(theta) < 30.
    """
    if ours is None or theirs is None:
        return ours is theirs
    return np.allclose(inv_freq(ours), theirs.frequencies, rtol=4e-6, atol=0) and math.isclose(
        attention_factor(ours), theirs.factor, rel_tol=1e-12
    )


def ropes(theirs: Any) -> list[Rope | None]:
    """RoPE of each layer; None where it has none."""
    module, name = modelling(theirs)
    make = getattr(module, f"{name.removesuffix('Text')}RotaryEmbedding")
    family, layers = theirs.model_type, range(theirs.num_hidden_layers)
    if family in ("gemma3_text", "olmo3"):
        rope = make(theirs)
        return [by_type(rope, theirs.layer_types[layer]) for layer in layers]
    if family == "granite_swa":
        of_theta = cache(lambda theta: alone(make(with_theta(theirs, theta))) if theta else None)
        return [of_theta(theirs.layer_rope_theta[layer]) for layer in layers]
    rope = alone(make(theirs))
    if family == "smollm3":
        return [rope if theirs.no_rope_layers[layer] else None for layer in layers]
    if family == "exaone4" and theirs.sliding_window is not None:
        return [rope if window(theirs, layer) else None for layer in layers]
    return [rope for _ in layers]


def alone(rope: Any) -> Rope:
    return Rope(rope.inv_freq.numpy(), rope.attention_scaling)


def by_type(rope: Any, kind: str) -> Rope:
    frequencies = getattr(rope, f"{kind}_inv_freq").numpy()
    return Rope(frequencies, getattr(rope, f"{kind}_attention_scaling"))


def with_theta(theirs: Any, theta: float) -> Any:
    other = copy.copy(theirs)
    other.rope_parameters = {**theirs.rope_parameters, "rope_theta": theta}
    return other
