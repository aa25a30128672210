"""Which keys a query may attend to: a boolean mask, made a few rows at a time.

A whole mask has an element for each pair of positions. Rows that are made when they are needed keep
the memory of a forward pass linear in the length of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_layers.arrays.brief import brief
from llama_layers.arrays.checks import check_count, is_integer
from llama_layers.arrays.dtypes import check_bools, check_integers
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.pytrees import STATIC, traceable
from llama_layers.arrays.types import Array, Namespace


@traceable
@dataclass(frozen=True, eq=False)
class Mask:
    """Causal attention, within a window if there is one, to keys that are not padding.

    Queries and keys are counted in slots, the places of their tokens in the batch, padding
    included; not in RoPE positions.

    Attributes
    ----------
    queries : Array, shape [S], an integer dtype
        The slot of each query.
    keys : Array, shape [T], an integer dtype
        The slot of each key; -1 for a key that does not exist yet.
    window : int or None
        How many slots a query sees, its own and those before it; None for all.
    keep : Array, shape [B, T], bool, or None
        Which keys are valid tokens, not padding; None if all are.

    Raises
    ------
    TypeError
        If an array has another dtype, or comes from another library than the first.
    ValueError
        If a shape does not fit, or the window is not a positive integer.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import Mask
    >>> Mask(np.arange(3), np.arange(3), window=2).rows(0, 3)[0].astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
    """

    queries: Array
    keys: Array
    window: int | None = field(default=None, metadata=STATIC)
    keep: Array | None = None

    def __post_init__(self) -> None:
        for name in ("queries", "keys"):
            check_integers(name, array := getattr(self, name))
            if array.ndim != 1:
                raise ValueError(f"{name}: expected one axis, got shape {list(array.shape)}")
        namespace(queries=self.queries, keys=self.keys, keep=self.keep)
        if self.keep is not None:
            check_bools("keep", self.keep)
            if self.keep.ndim != 2 or self.keep.shape[1] != self.keys.shape[0]:
                raise ValueError(
                    f"keep: expected shape [B, {self.keys.shape[0]}], got {list(self.keep.shape)}"
                )
        if self.window is not None:
            object.__setattr__(self, "window", check_count("window", self.window))

    def __repr__(self) -> str:
        return brief(self)

    def rows(self, start: int, stop: int, /) -> Array:
        """Make the rows of the queries from `start` to before `stop`.

        Parameters
        ----------
        start, stop : int
            Which queries.

        Returns
        -------
        Array, shape [B, stop - start, T] or [1, stop - start, T], bool
            True where a query may attend to a key.

        Raises
        ------
        TypeError
            If `start` or `stop` is not an integer.
        """
        for name, place in (("start", start), ("stop", stop)):
            if not is_integer(place):
                raise TypeError(f"{name}: expected an integer, got {type(place).__name__}")
        xp, queries, keys = self._slots(start, stop)
        return self._within(xp, keys <= queries, queries, keys)

    def with_rule(self, allowed: Array, /) -> Array:
        """Make all rows [1 or B, S, T] by another rule than causality.

        `allowed` [S, T], [1, S, T] or [B, S, T] says which keys a query may attend to. It does not
        show keys before the window of a query, keys that do not exist yet, or padding.
        """
        xp, queries, keys = self._slots(0, self.queries.shape[0])
        return self._within(xp, allowed, queries, keys)

    def _slots(self, start: int, stop: int) -> tuple[Namespace, Array, Array]:
        """The slots of some queries, as a column, and of all keys, as a row."""
        xp = namespace(queries=self.queries, keys=self.keys, keep=self.keep)
        integer = xp.asarray(0).dtype  # signed, and wide: unsigned differences would wrap
        queries = xp.astype(xp.expand_dims(self.queries[start:stop], axis=1), integer)
        return xp, queries, xp.astype(xp.expand_dims(self.keys, axis=0), integer)

    def _within(self, xp: Namespace, allowed: Array, queries: Array, keys: Array) -> Array:
        """What a rule allows [..., rows, T] of valid keys in the window."""
        allowed = allowed & (keys >= 0)
        if self.window is not None:  # a longer one than integers count hides nothing
            reach = min(self.window, xp.iinfo(queries.dtype).max)
            allowed = allowed & (keys > queries - reach)
        if allowed.ndim == 2:
            allowed = xp.expand_dims(allowed, axis=0)
        if self.keep is not None:
            allowed = allowed & xp.expand_dims(self.keep, axis=1)
        return allowed

    def check(self, q: Array, keys: int) -> None:
        """Raise unless the mask is for the queries of q [B, S, ...] and this number of keys."""
        batch, queries = q.shape[:2]
        for name, array, shape in (
            ("mask.queries", self.queries, (queries,)),
            ("mask.keys", self.keys, (keys,)),
            ("mask.keep", self.keep, (batch, keys)),
        ):
            if array is None:
                continue
            namespace(**{"q": q, name: array})
            if tuple(array.shape) != shape:
                raise ValueError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}")


def mask_rows(xp: Namespace, mask: Mask | Array | None, start: int, stop: int) -> Array | None:
    """The rows [1 or B, rows, T] of some queries; None if there is no mask."""
    if mask is None:
        return None
    if isinstance(mask, Mask):
        return mask.rows(start, stop)
    rows = mask[..., start:stop, :]
    return rows if rows.ndim == 3 else xp.expand_dims(rows, axis=0)


def slot_range(xp: Namespace, first: int | Array, count: int, like: Array) -> Array:
    """The integers from `first`, which a compiler may trace, on the device of an array."""
    return xp.arange(count, dtype=xp.int32, device=device(like)) + first
