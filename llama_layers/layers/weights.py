"""A checkpoint's parameters, as frozen dataclasses of arrays.

Every matrix is stored [out, in], the way checkpoints hold it, so that a file maps into memory as
it is. No layout is faster where it counts: NumPy multiplies ``(W @ x.T).T`` at the speed of
``x @ W`` on an [in, out] matrix, and cuBLAS reads ``W.T`` through a flag, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.shapes import check_shape
from llama_layers.layers.qkv_weights import QKVWeights

__all__ = ["AttentionWeights", "LayerWeights", "LlamaWeights", "MLPWeights", "QKVWeights"]

_LAYER_ARRAYS = (
    "input_layernorm",
    "self_attn.qkv.fused",
    "self_attn.qkv.bias",
    "self_attn.o_proj",
    "self_attn.o_bias",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.gate_bias",
    "mlp.up_proj",
    "mlp.up_bias",
    "mlp.down_proj",
    "mlp.down_bias",
)


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The projections of an attention block.

    Attributes
    ----------
    qkv : QKVWeights
        Into queries, keys and values.
    o_proj : Array, shape [hidden_size, num_heads * head_dim]
        Out of the heads.
    o_bias : Array, shape [hidden_size], or None
        Added to the output of `o_proj`.

    Raises
    ------
    TypeError
        If `qkv` is not a QKVWeights, or an array is not one of floats, or comes from another
        library than the first.
    ValueError
        If the shapes do not fit each other.
    """

    qkv: QKVWeights
    o_proj: Any
    o_bias: Any | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.qkv, QKVWeights):
            raise TypeError(f"qkv: expected QKVWeights, got {type(self.qkv).__name__}")
        namespace(qkv=self.qkv.fused, o_proj=self.o_proj, o_bias=self.o_bias)
        hidden = self.qkv.hidden_size
        check_shape("o_proj", self.o_proj, hidden, self.qkv.num_heads * self.qkv.head_dim)
        if self.o_bias is not None:
            check_shape("o_bias", self.o_bias, hidden)


@dataclass(frozen=True, eq=False)
class MLPWeights:
    """The projections of a gated MLP.

    Attributes
    ----------
    gate_proj, up_proj : Array, shape [intermediate_size, hidden_size]
        Into the gate and into what it gates.
    down_proj : Array, shape [hidden_size, intermediate_size]
        Back to the hidden size.
    gate_bias, up_bias, down_bias : Array or None
        One number for each output of the matrix of that name.

    Raises
    ------
    TypeError
        If an array is not one of floats, or comes from another library than the first.
    ValueError
        If the shapes do not fit each other.
    """

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    gate_bias: Any | None = None
    up_bias: Any | None = None
    down_bias: Any | None = None

    def __post_init__(self) -> None:
        namespace(**vars(self))
        check_shape("gate_proj", self.gate_proj, "intermediate_size", "hidden_size")
        inner, hidden = self.gate_proj.shape
        check_shape("up_proj", self.up_proj, inner, hidden)
        check_shape("down_proj", self.down_proj, hidden, inner)
        for name, size in (("gate_bias", inner), ("up_bias", inner), ("down_bias", hidden)):
            if (bias := getattr(self, name)) is not None:
                check_shape(name, bias, size)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The parameters of one decoder layer.

    Attributes
    ----------
    input_layernorm, post_attention_layernorm : Array, shape [hidden_size]
        Weights of the norms before attention and before the MLP.
    self_attn : AttentionWeights
        The attention block.
    mlp : MLPWeights
        The MLP.

    Raises
    ------
    TypeError
        If a part is of another type, or an array is not one of floats or comes from another
        library than the first.
    ValueError
        If the shapes do not fit each other.
    """

    input_layernorm: Any
    self_attn: AttentionWeights
    post_attention_layernorm: Any
    mlp: MLPWeights

    def __post_init__(self) -> None:
        for name, kind in (("self_attn", AttentionWeights), ("mlp", MLPWeights)):
            if not isinstance(part := getattr(self, name), kind):
                raise TypeError(f"{name}: expected {kind.__name__}, got {type(part).__name__}")
        norms = {
            "input_layernorm": self.input_layernorm,
            "post_attention_layernorm": self.post_attention_layernorm,
        }
        namespace(self_attn=self.self_attn.o_proj, mlp=self.mlp.gate_proj, **norms)
        hidden = self.self_attn.qkv.hidden_size
        for name, array in norms.items():
            check_shape(name, array, hidden)
        check_shape("mlp.gate_proj", self.mlp.gate_proj, "intermediate_size", hidden)

    def named(self) -> dict[str, Any]:
        """Every array under the path of its attribute; None for a bias that is not there.

        Returns
        -------
        dict of str to Array or None
            In the order of use, each matrix before its bias.
        """
        return {path: attrgetter(path)(self) for path in _LAYER_ARRAYS}


@dataclass(frozen=True, eq=False)
class LlamaWeights:
    """The parameters of a model.

    Attributes
    ----------
    embed_tokens : Array, shape [vocab_size, hidden_size]
        One row for each token id.
    layers : sequence of LayerWeights
        From the first layer to the last.
    norm : Array, shape [hidden_size]
        Weight of the norm after the last layer.
    lm_head : Array, shape [vocab_size, hidden_size]
        Into logits; the very array of `embed_tokens` where the config ties the two.

    Raises
    ------
    TypeError
        If `layers` is not a sequence of LayerWeights, or an array is not one of floats or comes
        from another library than the first.
    ValueError
        If the shapes do not fit each other. Layers that a sequence of another kind than list and
        tuple makes when they are asked for are checked when they are used.
    """

    embed_tokens: Any
    layers: Sequence[LayerWeights]
    norm: Any
    lm_head: Any

    def __post_init__(self) -> None:
        namespace(embed_tokens=self.embed_tokens, norm=self.norm, lm_head=self.lm_head)
        check_shape("embed_tokens", self.embed_tokens, "vocab_size", "hidden_size")
        vocabulary, hidden = self.embed_tokens.shape
        check_shape("norm", self.norm, hidden)
        check_shape("lm_head", self.lm_head, vocabulary, hidden)
        if not isinstance(self.layers, Sequence):
            raise TypeError(
                f"layers: expected a sequence of LayerWeights, got {type(self.layers).__name__}"
            )
        for index, layer in enumerate(self.layers if isinstance(self.layers, list | tuple) else ()):
            name = f"layers[{index}]"
            if not isinstance(layer, LayerWeights):
                raise TypeError(f"{name}: expected LayerWeights, got {type(layer).__name__}")
            first = {f"{name}.input_layernorm": layer.input_layernorm}
            namespace(embed_tokens=self.embed_tokens, **first)
            check_shape(*first, *first.values(), hidden)
