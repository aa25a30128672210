"""The operations of a layer, each with its formula over tracked numbers.

An operation is a dataclass of what it is computed from. ``operation.read(how)`` is a view of it:
the same fields as tracked numbers, in the formats and with the roundings of a `Rounding`.
``operation.formula`` is a function of that view. ``operation.bound(how)`` evaluates it, rounds it
into the result's format, and gives the exact result and what rounding allows.

A mistake is a copy with another field, ``replace(operation, eps=0.0)``, or another formula on the
same view, which has a bound without an analysis of its own:

>>> import numpy as np
>>> from llama_layers.verify.operations import Norm
>>> from llama_layers.verify.profiles import Rounding
>>> norm = Norm(np.float32([[3, 4]]), np.float32([1, 1]), eps=1.0)
>>> outside = lambda n: n.x / ((n.x * n.x).mean().sqrt() + n.eps) * n.weight
>>> norm.evaluate(outside, Rounding("float32", "float32")).exact.round(3)
array([[0.661, 0.882]])

A formula names the steps that a rounding profile may round, ``row.step("norm_before_weight")``:
nothing happens where it does not.

The views, in which x, weight and so on are tracked where nothing else is said:

- `Embedding`: `Rows`, the chosen ones, multiplied.
- `Norm`: ``x``, ``weight`` with the offset in it, and ``eps``, a number.
- `Linear`: a `Product`, with arrays for ``matmul(x, weight, bias)``.
- `Rope`: a `Rotation`.
- `Copy`: ``x``.
- `Gate`: ``gate``, ``up``, and ``act``, a name.
- `Residual`: ``x``, and ``added``, multiplied.
- `Logits`: ``products``, of the head's matrix, ``scaling``, a number, and ``cap``, or None.
- `Logprobs`: a `Choice`; see there.
- `Scores`, `Softmax`, `Probabilities`, `WeightedSum` and `Attention`: `Heads`, the query heads of
  one key head at a time. Their formulas differ in what they make of ``heads.scores()`` and in
  ``heads.weigh(...)``, which leaves probabilities as they are where they are the result:
  ``lambda heads: heads.weigh(heads.scores().where(heads.allowed, 0.0))`` weighs with the scores
  themselves, in each of the three operations that normalise them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, Literal

import numpy as np

from llama_layers.arrays.dtypes import float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.rope import attention_factor
from llama_layers.verify.attention import (
    Attention,
    Heads,
    Probabilities,
    Scores,
    Softmax,
    WeightedSum,
)
from llama_layers.verify.log_softmax import Logprobs
from llama_layers.verify.operation import Numbers, Operation, Stored
from llama_layers.verify.pointwise import ACTS, divided, gated, soft_capped
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.ranks import AddedParts
from llama_layers.verify.rotation import Rotation, rope_phases
from llama_layers.verify.rules import matmul
from llama_layers.verify.tracked import Tracked, read

__all__ = [
    "Attention",
    "Copy",
    "Embedding",
    "Gate",
    "Heads",
    "Linear",
    "Logits",
    "Logprobs",
    "Norm",
    "Operation",
    "Probabilities",
    "Residual",
    "Rope",
    "Scores",
    "Softmax",
    "WeightedSum",
]


@dataclass(frozen=True, eq=False)
class Embedding(Operation["Rows"], Generic[Stored]):
    """Rows of a table [N, H], times a factor."""

    inputs = ("table",)
    steps = ("written_in",)
    ids: Stored
    table: Stored
    factor: float = 1.0

    def read(self, how: Rounding) -> Rows:
        """The rows that are chosen, which are exact."""
        float_format("table", self.table)
        table, ids = to_numpy(self.table), to_numpy(self.ids)
        if table.ndim != 2:
            raise ValueError(f"table: expected shape [N, H], got {list(table.shape)}")
        if not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"ids: expected an integer dtype, got {ids.dtype}")
        if ids.size and not (ids.min() >= 0 and ids.max() < len(table)):
            raise ValueError(
                f"ids: expected numbers from 0 to {len(table) - 1}, got {ids.min()} to {ids.max()}"
            )
        rows = read("table", table[ids], how, recorded=False)
        return Rows(rows if self.factor == 1 else rows * self.factor)

    @staticmethod
    def formula(view: Rows) -> Tracked:
        """The rows themselves."""
        return view.rows


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a table that an embedding copies, times its factor."""

    rows: Tracked


@dataclass(frozen=True, eq=False)
class Norm(Operation["Norm[Tracked]"], Generic[Numbers]):
    """RMSNorm of x [..., H], with an offset that is added to the weight.

    x may be a sum of parts, as which it was recorded.
    """

    by_token = True
    inputs = ("x", "weight")
    steps = ("norm_before_weight", "reduce", "written_in")
    x: Numbers
    weight: Numbers
    eps: float
    offset: float = 0.0
    parts: AddedParts | None = None

    def check(self) -> None:
        """Raise ValueError unless there is a weight for each channel."""
        if len(self.x.shape) < 1 or self.weight.shape != self.x.shape[-1:]:
            raise ValueError(
                f"weight: expected shape [H] for x [..., H], got {list(self.weight.shape)} "
                f"for x {list(self.x.shape)}"
            )

    def read(self, how: Rounding) -> Norm[Tracked]:
        """The view: x as the ranks went on with it, and the offset in the weight."""
        view = super().read(how)
        view = replace(view, x=_as_added(view.x, self.parts))
        return replace(view, weight=view.weight + self.offset, offset=0.0) if self.offset else view

    @property
    def scale(self) -> np.ndarray:
        """The weight with the offset in it, in float64."""
        return np.asarray(self.weight, np.float64) + self.offset

    @staticmethod
    def formula(norm: Norm[Tracked]) -> Tracked:
        """Divide x by the root of its mean square and eps, and multiply with the weight."""
        row = norm.x * ((norm.x * norm.x).mean() + norm.eps).rsqrt()
        return row.step("norm_before_weight") * norm.weight


@dataclass(frozen=True, eq=False)
class Linear(Operation["Product"], Generic[Stored]):
    """A product of x [..., K] with a matrix [N, K], and a bias [N].

    It is `summed` where ranks that share the work add their parts of it.
    """

    by_token = True
    inputs = ("x", "weight")
    steps = ("reduce",)
    x: Stored
    weight: Stored
    bias: Stored | None = None
    summed: bool = False

    def read(self, how: Rounding) -> Product:
        """The view: x as tracked numbers, the matrix and the bias as they are."""
        x, weight = read("x", self.x, how), self.weight
        float_format("weight", weight)
        if len(x.shape) < 1 or len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"weight: expected shape [N, K] for x [..., K], got {list(weight.shape)} "
                f"for x {list(x.shape)}"
            )
        if self.bias is not None and tuple(self.bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"bias: expected shape [{weight.shape[0]}], got {list(self.bias.shape)}"
            )
        bias = None if self.bias is None else to_numpy(self.bias)
        return Product(x, to_numpy(weight), bias, self.summed)

    @staticmethod
    def formula(product: Product) -> Tracked:
        """The products of x with each row of the matrix."""
        return matmul(product.x, product.weight, product.bias, summed=product.summed)


@dataclass(frozen=True, eq=False)
class Product:
    """What a product with a matrix is made of."""

    x: Tracked
    weight: np.ndarray
    bias: np.ndarray | None
    summed: bool = False


@dataclass(frozen=True, eq=False)
class Rope(Operation[Rotation], Generic[Stored]):
    """Rotary position embedding of x [B, S, heads, D] at positions [S] or [B, S].

    The positions are those of the whole call, since "dynamic" and "longrope" scaling depend on
    the largest. Where RoPE differs from layer to layer, the config is that of one layer.
    Queries are multiplied with their `temperature`, of the shape of the positions, if there is one.
    """

    inputs = ("x",)
    steps = ("phases", "rope_table", "rope_arithmetic", "written_in")
    x: Stored
    positions: Stored
    config: LlamaConfig
    layout: Literal["half", "interleaved"] = "half"
    temperature: np.ndarray | None = None

    def read(self, how: Rounding) -> Rotation:
        """The view: x as tracked numbers, and by how much they are rotated."""
        x, positions = read("x", self.x, how), to_numpy(self.positions)
        if len(x.shape) != 4 or x.shape[3] != self.config.head_dim:
            raise ValueError(
                f"x: expected shape [B, S, heads, {self.config.head_dim}], got {list(x.shape)}"
            )
        if not np.issubdtype(positions.dtype, np.integer):
            raise TypeError(f"positions: expected an integer dtype, got {positions.dtype}")
        batch, length = x.shape[:2]
        if positions.shape not in ((length,), (1, length), (batch, length)):
            raise ValueError(
                f"positions: expected shape [{length}] or [{batch}, {length}], "
                f"got {list(positions.shape)}"
            )
        if self.layout not in ("half", "interleaved"):
            raise ValueError(f"layout: expected 'half' or 'interleaved', got {self.layout!r}")
        phases, off = rope_phases(positions, self.config, how.phases.unit_roundoff)
        factor = attention_factor(self.config)
        return Rotation(x, phases, off, factor, self.layout, self.temperature)

    @staticmethod
    def formula(rotation: Rotation) -> Tracked:
        """Each pair of channels, rotated by its phase."""
        a, b = rotation.pairs
        cos, sin = rotation.table
        return rotation.joined(rotation.plus(a * cos, -b * sin), rotation.plus(b * cos, a * sin))


@dataclass(frozen=True, eq=False)
class Copy(Operation["Copy[Tracked]"], Generic[Numbers]):
    """Queries or keys x [B, S, heads, D] of a layer that has no RoPE, as they are."""

    inputs = ("x",)
    x: Numbers

    @staticmethod
    def formula(copied: Copy[Tracked]) -> Tracked:
        """The same."""
        return copied.x


@dataclass(frozen=True, eq=False)
class Gate(Operation["Gate[Tracked]"], Generic[Numbers]):
    """The gated product, act(gate) times up, where act is silu or gelu_pytorch_tanh."""

    by_token = True
    inputs = ("gate", "up")
    steps = ("sigmoid", "silu", "gelu")
    gate: Numbers
    up: Numbers
    act: str = "silu"

    def check(self) -> None:
        """Raise ValueError unless both have one shape."""
        _check_same("up", self.up, "gate", self.gate)

    @staticmethod
    def formula(product: Gate[Tracked]) -> Tracked:
        """Multiply act(gate) with up."""
        return gated(product.gate, product.up, ACTS[product.act])


@dataclass(frozen=True, eq=False)
class Residual(Operation["Residual[Tracked]"], Generic[Numbers]):
    """The residual stream and a multiple of what a block computes.

    What is added may be a sum of parts, as which it was recorded.
    """

    by_token = True
    inputs = ("x", "added")
    steps = ("multiplied", "reduce")
    x: Numbers
    added: Numbers
    multiplier: float = 1.0
    parts: AddedParts | None = None

    def check(self) -> None:
        """Raise ValueError unless both have one shape."""
        _check_same("added", self.added, "x", self.x)

    def read(self, how: Rounding) -> Residual[Tracked]:
        """The view: what is added, as the ranks went on with it, is multiplied already."""
        view, multiplier = super().read(how), self.multiplier
        added = _as_added(view.added, self.parts)
        if multiplier != 1:
            added = (added * multiplier).step("multiplied")
        return replace(view, added=added, multiplier=1.0)

    @staticmethod
    def formula(residual: Residual[Tracked]) -> Tracked:
        """Their sum."""
        return residual.x + residual.added


def _as_added(x: Tracked, parts: AddedParts | None) -> Tracked:
    """A sum of parts, as ranks may have added them."""
    if parts is None:
        return x
    off = parts.off(x.how).reshape(x.shape)
    return x.with_errors(x.errors(lambda e: e + off))


@dataclass(frozen=True, eq=False)
class Logits(Operation["Logits[Tracked]"], Generic[Numbers]):
    """The logits of what the head gives: divided by a scaling, and capped."""

    inputs = ("products",)
    steps = ("capped",)
    products: Numbers
    scaling: float = 1.0
    cap: float | None = None

    @staticmethod
    def formula(logits: Logits[Tracked]) -> Tracked:
        """Divide by the scaling, and cap."""
        scaled = divided(logits.products, logits.scaling)
        return scaled if logits.cap is None else soft_capped(scaled, logits.cap, "capped")


def _check_same(name: str, array: Array | Tracked, other: str, like: Array | Tracked) -> None:
    if array.shape != like.shape:
        raise ValueError(
            f"{name}: expected shape {list(like.shape)} of {other}, got {list(array.shape)}"
        )
