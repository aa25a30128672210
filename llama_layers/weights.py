"""A checkpoint's parameters, as frozen dataclasses of arrays.

Every matrix is stored [out, in], the way checkpoints hold it, so that a file maps into memory as
it is. No layout is faster where it counts: NumPy multiplies ``(W @ x.T).T`` at the speed of
``x @ W`` on an [in, out] matrix, and cuBLAS reads ``W.T`` through a flag, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama_layers.backends.dtypes import dtype_name, float_format
from llama_layers.backends.namespaces import namespace
from llama_layers.scalars import check_count


@dataclass(frozen=True, eq=False)
class QKVWeights:
    """The query, key and value projections of one layer, stored as one matrix.

    One matrix means one GEMM: x is read once, and a GPU gets one large product in place of three
    small ones.

    Attributes
    ----------
    fused : Array, shape [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]
        Rows of the queries, then keys, then values; within each, head after head.
    num_heads : int
        Query heads.
    num_kv_heads : int
        Key heads, and as many value heads: num_heads for multi-head attention, 1 for multi-query,
        a divisor of num_heads in between for grouped-query.
    bias : Array, shape [(num_heads + 2 * num_kv_heads) * head_dim], or None
        Added to the product, in the order of its rows (Qwen2 has it, Llama has not).

    Raises
    ------
    TypeError
        If an array is none, holds no floats, or comes from another library than the first.
    ValueError
        If the shapes do not fit the head counts or each other.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import QKVWeights
    >>> w = QKVWeights(np.zeros((64, 24), np.float32), num_heads=2, num_kv_heads=1)
    >>> w.head_dim, w.q.shape, w.k.shape
    (16, (32, 24), (16, 24))
    """

    fused: Any
    num_heads: int
    num_kv_heads: int
    bias: Any | None = None

    def __post_init__(self) -> None:
        namespace(fused=self.fused, bias=self.bias)
        check_heads(self.num_heads, self.num_kv_heads)
        _check_shape("fused", self.fused, "out", "in")
        heads = self.num_heads + 2 * self.num_kv_heads
        if self.fused.shape[0] % heads or not self.fused.shape[0]:
            raise ValueError(
                f"fused: expected rows in a positive multiple of num_heads + 2 * num_kv_heads = "
                f"{heads}, got {self.fused.shape[0]}"
            )
        if self.bias is not None:
            _check_shape("bias", self.bias, self.fused.shape[0])

    @classmethod
    def from_separate(
        cls,
        q: Any,
        k: Any,
        v: Any,
        /,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        biases: Sequence[Any] | None = None,
        layout: Literal["out_in", "in_out"] = "out_in",
    ) -> QKVWeights:
        """Fuse three matrices into one, copying them.

        Parameters
        ----------
        q : Array, shape [num_heads * head_dim, hidden_size] in layout "out_in"
            The query projection.
        k : Array, shape [num_kv_heads * head_dim, hidden_size] in layout "out_in"
            The key projection.
        v : Array, shape as k
            The value projection.
        num_heads : int
            Query heads.
        num_kv_heads : int, optional
            Key and value heads; `num_heads` if not given.
        biases : sequence of three Arrays, optional
            One number for each output of `q`, `k` and `v`.
        layout : {"out_in", "in_out"}
            "out_in" is how checkpoints and ``torch.nn.Linear`` store a matrix; "in_out" is the
            matrix of ``x @ W``. Square matrices do not tell which they are, so say it.

        Returns
        -------
        QKVWeights
            With the three as views into one new array of the same dtype.

        Raises
        ------
        TypeError
            If an argument is no array, holds no floats, or differs in library or dtype.
        ValueError
            If shapes, head counts and layout do not fit together.

        Examples
        --------
        >>> import numpy as np
        >>> from llama_layers import QKVWeights
        >>> wq, wk, wv = (np.full((8, 8), c, np.float32) for c in (0.1, 0.2, 0.3))
        >>> QKVWeights.from_separate(wq, wk, wv, num_heads=2, layout="in_out").fused.shape
        (24, 8)
        """
        if layout not in ("out_in", "in_out"):
            raise ValueError(f"layout: expected 'out_in' or 'in_out', got {layout!r}")
        if num_kv_heads is None:
            num_kv_heads = num_heads
        check_heads(num_heads, num_kv_heads)
        xp = namespace(q=q, k=k, v=v)
        for name, matrix in (("q", q), ("k", k), ("v", v)):
            float_format(name, matrix)
            if matrix.ndim != 2:
                raise ValueError(f"{name}: expected a matrix, got shape {list(matrix.shape)}")
        _same_dtype(q=q, k=k, v=v)
        if layout == "in_out":
            q, k, v = q.T, k.T, v.T
        if q.shape[0] % num_heads or not q.shape[0]:
            raise ValueError(
                f"q: expected outputs in a positive multiple of num_heads = {num_heads}, got "
                f"{q.shape[0]} (layout {layout!r})"
            )
        expected = (q.shape[0] // num_heads * num_kv_heads, q.shape[1])
        for name, matrix in (("k", k), ("v", v)):
            if tuple(matrix.shape) != expected:
                shape, got = list(expected), list(matrix.shape)
                if layout == "in_out":
                    shape, got = shape[::-1], got[::-1]
                raise ValueError(
                    f"{name}: expected shape {shape} for q of {num_heads} heads and "
                    f"num_kv_heads = {num_kv_heads} (layout {layout!r}), got {got}"
                )
        bias = None
        if biases is not None:
            bias = _concatenated_biases(xp, biases, (q, k, v))
        return cls(xp.concat([q, k, v], axis=0), num_heads, num_kv_heads, bias)

    @property
    def head_dim(self) -> int:
        """Outputs of one head."""
        return int(self.fused.shape[0]) // (self.num_heads + 2 * self.num_kv_heads)

    @property
    def hidden_size(self) -> int:
        """Inputs of the projection."""
        return int(self.fused.shape[1])

    @property
    def q(self) -> Any:
        """The query rows, a view [num_heads * head_dim, hidden_size]."""
        return self.fused[: self.num_heads * self.head_dim, :]

    @property
    def k(self) -> Any:
        """The key rows, a view [num_kv_heads * head_dim, hidden_size]."""
        start = self.num_heads * self.head_dim
        return self.fused[start : start + self.num_kv_heads * self.head_dim, :]

    @property
    def v(self) -> Any:
        """The value rows, a view [num_kv_heads * head_dim, hidden_size]."""
        return self.fused[(self.num_heads + self.num_kv_heads) * self.head_dim :, :]


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
        If `qkv` is no QKVWeights, or an array is none, holds no floats, or comes from another
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
        _check_shape("o_proj", self.o_proj, hidden, self.qkv.num_heads * self.qkv.head_dim)
        if self.o_bias is not None:
            _check_shape("o_bias", self.o_bias, hidden)


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
        If an array is none, holds no floats, or comes from another library than the first.
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
        _check_shape("gate_proj", self.gate_proj, "intermediate_size", "hidden_size")
        inner, hidden = self.gate_proj.shape
        _check_shape("up_proj", self.up_proj, inner, hidden)
        _check_shape("down_proj", self.down_proj, hidden, inner)
        for name, size in (("gate_bias", inner), ("up_bias", inner), ("down_bias", hidden)):
            if (bias := getattr(self, name)) is not None:
                _check_shape(name, bias, size)


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
    """

    input_layernorm: Any
    self_attn: AttentionWeights
    post_attention_layernorm: Any
    mlp: MLPWeights


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
    """

    embed_tokens: Any
    layers: Sequence[LayerWeights]
    norm: Any
    lm_head: Any


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Refuse head counts that cannot be grouped."""
    check_count("num_heads", num_heads)
    check_count("num_kv_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}"
        )


def _check_shape(name: str, array: Any, *expected: int | str) -> None:
    """Refuse what holds no floats or is of another shape; a name stands for any number."""
    float_format(name, array)
    if array.ndim != len(expected) or any(
        not isinstance(size, str) and size != found
        for size, found in zip(expected, array.shape, strict=True)
    ):
        shape = ", ".join(map(str, expected))
        raise ValueError(f"{name}: expected shape [{shape}], got {list(array.shape)}")


def _same_dtype(**arrays: Any) -> None:
    (first, array), *others = arrays.items()
    for name, other in others:
        if other.dtype != array.dtype:
            raise TypeError(
                f"{name}: expected the dtype of {first}, {dtype_name(array.dtype)}, "
                f"got {dtype_name(other.dtype)}"
            )


def _concatenated_biases(xp: Any, biases: Sequence[Any], matrices: Sequence[Any]) -> Any:
    if len(biases) != 3:
        raise ValueError(f"biases: expected three arrays, for q, k and v, got {len(biases)}")
    named = {f"biases[{i}]": bias for i, bias in enumerate(biases)}
    namespace(q=matrices[0], **named)
    for (name, bias), matrix in zip(named.items(), matrices, strict=True):
        _check_shape(name, bias, matrix.shape[0])
    _same_dtype(**named)
    return xp.concat(list(biases))
