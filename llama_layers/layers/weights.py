"""The classes that hold the arrays of a layer.

Every matrix is stored [out, in], the way checkpoints hold it, so that a file maps into memory as
it is. No layout is faster where it counts: NumPy multiplies ``(W @ x.T).T`` at the speed of
``x @ W`` on an [in, out] matrix, and cuBLAS reads ``W.T`` through a flag, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from llama_layers.arrays.brief import brief
from llama_layers.arrays.checks import check_shape
from llama_layers.arrays.copies import DeepCopied
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.pytrees import STATIC, traceable
from llama_layers.arrays.types import Array
from llama_layers.config.families import tensor_name
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.group import Group
from llama_layers.layers.qkv_weights import QKVWeights
from llama_layers.layers.tensors import ARRAYS, Names, array_shape, axis_sizes

__all__ = ["AttentionWeights", "LayerWeights", "MLPWeights", "QKVWeights"]


@traceable
@dataclass(frozen=True, eq=False)
class AttentionWeights(DeepCopied):
    """The projections of an attention block.

    Attributes
    ----------
    qkv : QKVWeights
        Into queries, keys and values.
    o_proj : Array, shape [hidden_size, num_heads * head_dim]
        Out of the heads.
    o_bias : Array, shape [hidden_size], or None
        Added to the output of `o_proj`.
    q_norm, k_norm : Array or None
        Weights of the norms of queries and keys: [head_dim] where each head is normalised by
        itself, [num_heads * head_dim] and [num_kv_heads * head_dim] where the projection is.
    sinks : Array, shape [num_heads], or None
        What joins the scores of each query head in the softmax, and weighs no value.
    group : Group or None
        Where set, the heads are those of one rank, and the output is summed over the ranks.

    Raises
    ------
    TypeError
        If `qkv` is not a QKVWeights, or an array does not hold floats, or comes from another
        library than the first.
    ValueError
        If the shapes do not fit each other.
    """

    qkv: QKVWeights
    o_proj: Array
    o_bias: Array | None = None
    q_norm: Array | None = None
    k_norm: Array | None = None
    sinks: Array | None = None
    group: Group | None = field(default=None, metadata=STATIC)

    def __post_init__(self) -> None:
        _check_types(self, qkv=QKVWeights)
        _check_arrays(self, "self_attn.", self.qkv.sizes)

    def __repr__(self) -> str:
        return brief(self)


@traceable
@dataclass(frozen=True, eq=False)
class MLPWeights(DeepCopied):
    """The projections of a gated MLP.

    Attributes
    ----------
    gate_proj, up_proj : Array, shape [intermediate_size, hidden_size]
        Into the gate and into what it gates.
    down_proj : Array, shape [hidden_size, intermediate_size]
        Back to the hidden size.
    gate_bias, up_bias, down_bias : Array or None
        One number for each output of the matrix of that name.
    group : Group or None
        Where set, the channels are those of one rank, and the output is summed over the ranks.

    Raises
    ------
    TypeError
        If an array does not hold floats, or comes from another library than the first.
    ValueError
        If the shapes do not fit each other.
    """

    gate_proj: Array
    up_proj: Array
    down_proj: Array
    gate_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None
    group: Group | None = field(default=None, metadata=STATIC)

    def __post_init__(self) -> None:
        _check_arrays(self, "mlp.", {})

    def __repr__(self) -> str:
        return brief(self)


@traceable
@dataclass(frozen=True, eq=False)
class LayerWeights(DeepCopied):
    """The parameters of one decoder layer.

    Attributes
    ----------
    input_layernorm, post_attention_layernorm : Array, shape [hidden_size], or None
        Weights of the norms before attention and before the MLP, where the config has them there.
    self_attn : AttentionWeights
        The attention block.
    mlp : MLPWeights
        The MLP.
    post_self_attn_layernorm, post_mlp_layernorm : Array, shape [hidden_size], or None
        Weights of the norms after attention and after the MLP, where the config has them there.

    Raises
    ------
    TypeError
        If a part is of another type, or an array does not hold floats or comes from another
        library than the first.
    ValueError
        If the shapes do not fit each other.
    """

    input_layernorm: Array | None
    self_attn: AttentionWeights
    post_attention_layernorm: Array | None
    mlp: MLPWeights
    post_self_attn_layernorm: Array | None = None
    post_mlp_layernorm: Array | None = None

    def __post_init__(self) -> None:
        _check_types(self, self_attn=AttentionWeights, mlp=MLPWeights)
        _check_arrays(self, "", self.self_attn.qkv.sizes)

    def __repr__(self) -> str:
        return brief(self)

    def named(self, model_type: str = "llama") -> dict[str, Array]:
        """Every tensor of the layer under its name in Hugging Face's model, below the layer.

        Parameters
        ----------
        model_type : str, optional
            The family whose names they are; some call a norm otherwise than Llama.

        Returns
        -------
        dict of str to Array
            Queries, keys and values as views into the one array that holds them.

        Examples
        --------
        >>> import numpy as np
        >>> from llama_layers import AttentionWeights, LayerWeights, MLPWeights, QKVWeights
        >>> attention = AttentionWeights(QKVWeights(np.ones((16, 8)), 2, 1), np.ones((8, 8)))
        >>> mlp = MLPWeights(np.ones((12, 8)), np.ones((12, 8)), np.ones((8, 12)))
        >>> named = LayerWeights(np.ones(8), attention, np.ones(8), mlp).named()
        >>> named["self_attn.k_proj.weight"].shape
        (4, 8)
        """
        sizes = self.self_attn.qkv.sizes
        found = {}
        for path, array in self.arrays().items():
            if array is None:
                continue
            if len(ARRAYS[path]) == 1:
                found[tensor_name(model_type, ARRAYS[path][0].name)] = array
                continue
            stop = 0
            for tensor in ARRAYS[path]:
                start, stop = stop, stop + sizes[tensor.axes.split()[0]]
                found[tensor_name(model_type, tensor.name)] = array[start:stop, ...]
        return found

    def arrays(self) -> dict[str, Array | None]:
        """Every array of the layer, as it is held, under the path of its attribute.

        Returns
        -------
        dict of str to Array or None
            In the order of use, each matrix before its bias; None for a bias that does not exist.
        """
        return _arrays(self, "")

    def norms(self) -> dict[str, Array]:
        """The weights of the norms of the residual stream and of what is added to it.

        Returns
        -------
        dict of str to Array
            Under the names of their attributes.
        """
        return {name: a for name, a in self.arrays().items() if "." not in name and a is not None}

    def mapped(self, change: Callable[[Any], Array]) -> LayerWeights:
        """The layer with each of its arrays changed.

        Parameters
        ----------
        change : callable
            ``change(array) -> array``, of the same shape.

        Returns
        -------
        LayerWeights
            Of the new arrays.
        """
        arrays = self.arrays()
        changed = {path: None if a is None else change(a) for path, a in arrays.items()}
        qkv, group = self.self_attn.qkv, self.self_attn.group
        return _assembled(changed, qkv.num_heads, qkv.num_kv_heads, group)


def read_layer(
    read: Callable[[Names], Array], config: LlamaConfig, group: Group | None
) -> LayerWeights:
    """A layer from a function that gives tensors, by their names below it, as one array."""
    arrays = {
        path: read(tuple(tensor_name(config.model_type, tensor.name) for tensor in tensors))
        if (switch := tensors[0].switch) is None or getattr(config, switch)
        else None
        for path, tensors in ARRAYS.items()
    }
    return _assembled(arrays, config.num_attention_heads, config.num_key_value_heads, group)


def layer_problem(layer: LayerWeights, config: LlamaConfig) -> str | None:
    """Say what in a layer is not as a config says; None if all is."""
    if not isinstance(layer, LayerWeights):
        return f": expected LayerWeights, got {type(layer).__name__}"
    qkv = layer.self_attn.qkv
    for name, found, expected in (
        ("num_heads", qkv.num_heads, config.num_attention_heads),
        ("num_kv_heads", qkv.num_kv_heads, config.num_key_value_heads),
    ):
        if found != expected:
            return f".self_attn.qkv: expected {name} = {expected}, as config says, got {found}"
    sizes = axis_sizes(config)
    for path, array in layer.arrays().items():
        switch, shape = ARRAYS[path][0].switch, list(array_shape(path, sizes))
        if array is not None and list(array.shape) != shape:
            return f".{path}: expected shape {shape}, as config says, got {list(array.shape)}"
        if switch is not None and (array is not None) != getattr(config, switch):
            if array is None:
                return f".{path}: expected shape {shape}, as config says, got None"
            return f".{path}: expected None, as config says, got shape {shape}"
    return None


def layer_fits(layer: LayerWeights, config: LlamaConfig) -> bool:
    """Whether a layer has the heads and, as of now, the shapes that a config says."""
    return layer_problem(layer, config) is None


def known_arrays(layer: LayerWeights, switches: Collection[str]) -> list[Array | None] | None:
    """A layer's arrays, in order, for a kernel that knows some switches of the config.

    None if the layer has an array that the kernel would not use, or is one rank's part.
    """
    if layer.self_attn.group is not None or layer.mlp.group is not None:
        return None
    known = []
    for path, array in layer.arrays().items():
        switch = ARRAYS[path][0].switch
        if switch is None or switch in switches:
            known.append(array)
        elif array is not None:
            return None
    return known


def _assembled(
    arrays: Mapping[str, Array | None], num_heads: int, num_kv_heads: int, group: Group | None
) -> LayerWeights:
    """A layer of arrays by path: its parts from the innermost to the outermost."""
    values: dict[str, Any] = {
        **arrays,
        "self_attn.qkv.num_heads": num_heads,
        "self_attn.qkv.num_kv_heads": num_kv_heads,
        "self_attn.group": group,
        "mlp.group": group,
    }
    parts: dict[str, Callable[..., Any]] = {
        "self_attn.qkv.": QKVWeights,
        "self_attn.": AttentionWeights,
        "mlp.": MLPWeights,
    }
    for prefix, kind in parts.items():
        names = [path.removeprefix(prefix) for path in values if path.startswith(prefix)]
        values[prefix.rstrip(".")] = kind(**{name: values.pop(prefix + name) for name in names})
    return LayerWeights(**values)


def _arrays(part: object, prefix: str) -> dict[str, Any]:
    """The arrays of a part of a layer, which begins with a prefix, by their paths inside it."""
    inside = [path.removeprefix(prefix) for path in ARRAYS if path.startswith(prefix)]
    return {path: attrgetter(path)(part) for path in inside}


def _check_types(part: object, **kinds: type) -> None:
    for name, kind in kinds.items():
        if not isinstance(found := getattr(part, name), kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(found).__name__}")


def _check_arrays(part: object, prefix: str, sizes: Mapping[str, int]) -> None:
    """Raise unless the arrays of a part fit each other; sizes that are not known yet follow."""
    arrays, known = _arrays(part, prefix), dict(sizes)
    namespace(**arrays)
    for name, array in arrays.items():
        tensors = ARRAYS[prefix + name]
        if array is None and tensors[0].switch is not None:
            continue
        check_shape(name, array, *array_shape(prefix + name, known))
        if len(tensors) == 1:
            known.update(zip(tensors[0].axes.split(), map(int, array.shape), strict=True))
