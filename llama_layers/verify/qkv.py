"""What there is to see in the Q, K and V of some hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers.linear import QKV, qkv_projection
from llama_layers.layers.weights import QKVWeights
from llama_layers.verify.bounds import Bound, linear_bound
from llama_layers.verify.judge import Judgement, judge
from llama_layers.verify.report.plain import plain

# Two elements differ when they are further apart than this.
DIFFERENCE = 1e-6


@dataclass(frozen=True)
class Summary:
    """An array in a few numbers, and how it stands to its bound.

    Attributes
    ----------
    shape : tuple of int
        Of the array.
    dtype : str
        Of its elements.
    smallest, largest, mean : float
        Over the finite elements; not a number if there is none.
    first : tuple of float
        The first five elements.
    nonfinite : int
        How many elements are NaN or Inf.
    judgement : Judgement
        The worst error over its bound.
    """

    shape: tuple[int, ...]
    dtype: str
    smallest: float
    largest: float
    mean: float
    first: tuple[float, ...]
    nonfinite: int
    judgement: Judgement


@dataclass(frozen=True)
class Difference:
    """How many of the elements of two arrays differ.

    Attributes
    ----------
    differing : int
        Elements further apart than 1e-6.
    of : int
        Elements compared.
    """

    differing: int
    of: int


@dataclass(frozen=True)
class QKVReport:
    """A Q/K/V projection, examined.

    Attributes
    ----------
    q, k, v : Summary
        The three results.
    q_k : Difference
        Each query head against the key head that it attends to.
    k_v : Difference
        Keys against values.
    same_bits : bool
        Whether a second run gave the same bits.
    """

    q: Summary
    k: Summary
    v: Summary
    q_k: Difference
    k_v: Difference
    same_bits: bool

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values; NaN and Inf become strings.

        Returns
        -------
        dict
            One entry for each attribute, with the verdict beside each ratio.
        """
        content = plain(self)
        for name in ("q", "k", "v"):
            content[name]["judgement"]["verdict"] = getattr(self, name).judgement.verdict
        return dict(content)


def examine_qkv(x: Any, w: QKVWeights, /) -> tuple[QKV, QKVReport]:
    """Project hidden states, and report on the result.

    Parameters
    ----------
    x : Array, shape [B, S, hidden_size]
        Normalised hidden states.
    w : QKVWeights
        The projection, from the same library and device.

    Returns
    -------
    qkv : QKV
        The result of `llama_layers.qkv_projection`.
    report : QKVReport
        Shapes, ranges, differences, repeatability, and the worst error against a recomputation
        in float64.

    Raises
    ------
    TypeError, ValueError
        As `llama_layers.qkv_projection` does.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import QKVWeights
    >>> from llama_layers.verify import examine_qkv
    >>> w = QKVWeights(np.eye(12, 4, dtype=np.float32), num_heads=2, num_kv_heads=2)
    >>> _, report = examine_qkv(np.ones((1, 1, 4), np.float32), w)
    >>> report.same_bits, report.q_k
    (True, Difference(differing=4, of=4))
    """
    qkv = qkv_projection(x, w)
    again = qkv_projection(x, w)
    bound = linear_bound(x, w.fused, w.bias)
    q, k, v = (to_numpy(array) for array in qkv)
    end_of_q = w.num_heads * w.head_dim
    end_of_k = end_of_q + w.num_kv_heads * w.head_dim
    report = QKVReport(
        q=summarise(q, _columns(bound, slice(0, end_of_q), q.shape)),
        k=summarise(k, _columns(bound, slice(end_of_q, end_of_k), k.shape)),
        v=summarise(v, _columns(bound, slice(end_of_k, None), v.shape)),
        q_k=_difference(q, np.repeat(k, w.num_heads // w.num_kv_heads, axis=2)),
        k_v=_difference(k, v),
        same_bits=all(
            first.tobytes() == to_numpy(second).tobytes()
            for first, second in zip((q, k, v), again, strict=True)
        ),
    )
    return qkv, report


def summarise(array: Any, bound: Bound, /) -> Summary:
    """Describe an array and hold it against its bound.

    Parameters
    ----------
    array : Array
        Of any library and float dtype.
    bound : Bound
        Of its shape.

    Returns
    -------
    Summary
        Its shape, dtype, range, mean, first elements, and worst error over the bound.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import linear_bound, summarise
    >>> x = np.ones((1, 2), np.float32)
    >>> summarise(x, linear_bound(x, np.eye(2, dtype=np.float32))).mean
    1.0
    """
    numbers = to_numpy(array).astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    return Summary(
        shape=numbers.shape,
        dtype=dtype_name(array.dtype),
        smallest=float(finite.min()) if finite.size else float("nan"),
        largest=float(finite.max()) if finite.size else float("nan"),
        mean=float(finite.mean()) if finite.size else float("nan"),
        first=tuple(float(number) for number in numbers.ravel()[:5]),
        nonfinite=numbers.size - finite.size,
        judgement=judge(array, bound),
    )


def _columns(bound: Bound, columns: slice, shape: tuple[int, ...]) -> Bound:
    """The bound of some of a projection's outputs, split into heads."""
    return Bound(
        bound.exact[..., columns].reshape(shape),
        bound.limit[..., columns].reshape(shape),
        bound.usual[..., columns].reshape(shape),
    )


def _difference(a: NDArray[Any], b: NDArray[Any]) -> Difference:
    with np.errstate(invalid="ignore"):  # Inf - Inf: not a number, and so a difference
        apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return Difference(int(np.count_nonzero(~(apart <= DIFFERENCE))), apart.size)
