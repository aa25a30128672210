"""What tells a model family from the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """A key of config.json that says what a field of `LlamaConfig` says, in another way.

    Attributes
    ----------
    name : str
        The key.
    read, write : callable
        From the key's value to the field's, and back.
    """

    name: str
    read: Callable[[Any], Any] = _same
    write: Callable[[Any], Any] = _same


@dataclass(frozen=True, kw_only=True)
class Family:
    """The things that tell a family from the others.

    Attributes
    ----------
    architecture : str
        The name of the class.
    reads : frozenset of str
        The fields of `LlamaConfig` that this family reads and another does not.
    defaults : Mapping of str to Any
        Values of keys that a file leaves out; null is another matter.
    ignores : frozenset of str
        Keys that change the maths in another family and nothing in this one.
    built_in : Mapping of str to Any
        Values of switches in the code of the class, where they are not Llama's.
    keys : Mapping of str to Key
        Keys of a file that say a field of `LlamaConfig` in another way, by the field.
    needs : Mapping of str to Any
        Keys that the class reads, with the only value that is supported.
    modules : Mapping of str to str
        What transformers' class calls modules inside a layer that have another name here. The
        names here are Llama's, and GLM-4's for norms that Llama does not have: ``input_layernorm``
        and ``post_attention_layernorm`` come before attention and before the MLP,
        ``post_self_attn_layernorm`` and ``post_mlp_layernorm`` after them.
    qkv_bias : bool
        Whether queries, keys and values have biases whatever ``attention_bias`` says.
    output_bias : bool
        Whether ``attention_bias`` gives a bias to the output of attention, too.
    switches_window : bool
        Whether ``use_sliding_window`` and ``max_window_layers`` say which layers have the window.
    rope : {"same", "no_rope_layers", "windows", "type", "layer"}
        How a file says which layers have RoPE, and which: alike in all; by ``no_rope_layers``; only
        those with a window; by parameters for each type of layer; by ``layer_rope_theta``.
    ntk_alpha : bool
        Whether ``alpha`` in a "dynamic" scaling stands for another theta, and nothing dynamic.
    scaling_names : Mapping of str to str
        Other names that its files have for kinds of scaling.
    fused : frozenset of str
        Modules of a layer that its files have instead of several, whose rows they hold.
    interleaved : bool
        Whether the class rotates channels next to each other, so that its files have the rows of
        queries and keys in that order.
    other_keys : Mapping of str to tuple of str
        Other names that its files have for keys, each with the fields that it sets.
    stored_names : Mapping of str to str
        Names of modules in its files, where they are others than in the class: by the name in the
        class, with {} for the number of a layer.
    layer_types : callable or None
        The ``layer_types`` of a number of layers, where a file does not say.
    scales_embedding : bool
        Whether the embedding's multiplier is the root of hidden_size if a config does not say.
    multiplies_inputs : bool
        Whether ``embedding_multiplier`` multiplies vectors that come instead of ids, too.
    multiplies_logits : bool
        Whether ``logits_scaling`` multiplies the logits; it divides them elsewhere.
    rounds_before_weight : bool
        Whether the class of its norms rounds rows before it multiplies them with the weight; some
        multiply in float32, and round once.
    """

    architecture: str
    reads: frozenset[str]
    defaults: Mapping[str, Any]
    ignores: frozenset[str] = frozenset()
    built_in: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Key] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    qkv_bias: bool = False
    output_bias: bool = True
    switches_window: bool = False
    rope: str = "same"
    ntk_alpha: bool = False
    scaling_names: Mapping[str, str] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()
    interleaved: bool = False
    other_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stored_names: Mapping[str, str] = field(default_factory=dict)
    layer_types: Callable[..., list[str]] | None = None
    scales_embedding: bool = False
    multiplies_inputs: bool = False
    multiplies_logits: bool = False
    rounds_before_weight: bool = True


def last_of_several_full(layers: int, *, every: int) -> list[str]:
    """Types of layers of which each last of several attends to all tokens."""
    return [
        "full_attention" if layer % every == every - 1 else "sliding_attention"
        for layer in range(layers)
    ]
