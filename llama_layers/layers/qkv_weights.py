"""The query, key and value projections of a layer, as one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from llama_layers.arrays.brief import brief
from llama_layers.arrays.checks import check_choice, check_count, check_same_dtype, check_shape
from llama_layers.arrays.copies import DeepCopied
from llama_layers.arrays.dtypes import float_format
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.pytrees import STATIC, traceable
from llama_layers.arrays.types import Array, Namespace
from llama_layers.errors import shown


@traceable
@dataclass(frozen=True, eq=False)
class QKVWeights(DeepCopied):
    """The query, key and value projections of one layer, stored as one matrix.

    One matrix means one GEMM: x is read once, and a GPU gets one large product instead of three
    small ones.

    Attributes
    ----------
    fused : Array, shape [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]
        Rows of the queries, then keys, then values; within each, head after head.
    num_heads : int
        Query heads.
    num_kv_heads : int
        Key heads, and also value heads: num_heads for multi-head attention, 1 for multi-query
        attention, a divisor of num_heads in between for grouped-query attention.
    bias : Array, shape [(num_heads + 2 * num_kv_heads) * head_dim], or None
        Added to the product, in the order of its rows (Qwen2 has one, Llama has none).

    Raises
    ------
    TypeError
        If an array does not hold floats, or comes from another library than the first.
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

    fused: Array
    num_heads: int = field(metadata=STATIC)
    num_kv_heads: int = field(metadata=STATIC)
    bias: Array | None = None

    def __post_init__(self) -> None:
        namespace(fused=self.fused, bias=self.bias)
        heads, kv_heads = check_heads(self.num_heads, self.num_kv_heads)
        object.__setattr__(self, "num_heads", heads)
        object.__setattr__(self, "num_kv_heads", kv_heads)
        check_shape("fused", self.fused, "out", "in")
        together = heads + 2 * kv_heads
        if self.fused.shape[0] % together or not self.fused.shape[0]:
            raise ValueError(
                f"fused: expected rows in a positive multiple of num_heads + 2 * num_kv_heads = "
                f"{shown(together)}, got {self.fused.shape[0]}"
            )
        if self.bias is not None:
            check_shape("bias", self.bias, self.fused.shape[0])

    def __repr__(self) -> str:
        return brief(self)

    @classmethod
    def from_separate(
        cls,
        q: Array,
        k: Array,
        v: Array,
        /,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        biases: Sequence[Array] | None = None,
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
            matrix of ``x @ W``. The layout of a square matrix cannot be seen from its shape.

        Returns
        -------
        QKVWeights
            With the three as views into one new array of the same dtype.

        Raises
        ------
        TypeError
            If an argument is not an array of floats, or the libraries or dtypes differ.
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
        check_choice("layout", layout, "out_in", "in_out")
        if num_kv_heads is None:
            num_kv_heads = num_heads
        num_heads, num_kv_heads = check_heads(num_heads, num_kv_heads)
        xp = namespace(q=q, k=k, v=v)
        for name, matrix in (("q", q), ("k", k), ("v", v)):
            float_format(name, matrix)
            if matrix.ndim != 2:
                raise ValueError(f"{name}: expected a matrix, got shape {list(matrix.shape)}")
        check_same_dtype(q=q, k=k, v=v)
        if layout == "in_out":
            q, k, v = q.T, k.T, v.T
        if q.shape[0] % num_heads or not q.shape[0]:
            raise ValueError(
                f"q: expected outputs in a positive multiple of num_heads = {shown(num_heads)}, "
                f"got {q.shape[0]} (layout {layout!r})"
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
    def sizes(self) -> dict[str, int]:
        """The axes of the three matrices, by the names that the arrays of a layer share."""
        return {
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            "num_heads": self.num_heads,
            "q_size": self.num_heads * self.head_dim,
            "kv_size": self.num_kv_heads * self.head_dim,
        }

    @property
    def q(self) -> Array:
        """The query rows, a view [num_heads * head_dim, hidden_size]."""
        return self.fused[: self.num_heads * self.head_dim, :]

    @property
    def k(self) -> Array:
        """The key rows, a view [num_kv_heads * head_dim, hidden_size]."""
        start = self.num_heads * self.head_dim
        return self.fused[start : start + self.num_kv_heads * self.head_dim, :]

    @property
    def v(self) -> Array:
        """The value rows, a view [num_kv_heads * head_dim, hidden_size]."""
        return self.fused[(self.num_heads + self.num_kv_heads) * self.head_dim :, :]


def check_heads(num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """Return head counts as Python's integers; raise unless the heads can be grouped."""
    heads = check_count("num_heads", num_heads)
    kv_heads = check_count("num_kv_heads", num_kv_heads)
    if heads % kv_heads:
        raise ValueError(
            f"num_kv_heads: expected a divisor of num_heads = {shown(heads)}, got {shown(kv_heads)}"
        )
    return heads, kv_heads


def _concatenated_biases(
    xp: Namespace, biases: Sequence[Array], matrices: Sequence[Array]
) -> Array:
    if not isinstance(biases, list | tuple) or len(biases) != 3:
        raise ValueError(
            f"biases: expected three arrays, for q, k and v, got "
            f"{len(biases) if isinstance(biases, list | tuple) else type(biases).__name__}"
        )
    named = {f"biases[{i}]": bias for i, bias in enumerate(biases)}
    namespace(q=matrices[0], **named)
    for (name, bias), matrix in zip(named.items(), matrices, strict=True):
        check_shape(name, bias, matrix.shape[0])
    check_same_dtype(**named)
    return xp.concat(list(biases))
