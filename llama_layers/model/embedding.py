"""From token ids to the first hidden states."""

from __future__ import annotations

import math

import numpy as np

from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import check_array, check_integers, dtype_name, dtype_of
from llama_layers.arrays.namespaces import is_tensor, namespace
from llama_layers.arrays.tracing import is_traced
from llama_layers.arrays.types import Array, Namespace
from llama_layers.config.llama_config import LlamaConfig


def embed(input_ids: Array, table: Array, /) -> Array:
    """Look up the embedding of each token.

    Parameters
    ----------
    input_ids : Array, shape [B, S], an integer dtype
        Token ids.
    table : Array, shape [vocab_size, hidden_size]
        One row for each id, from the same library and device.

    Returns
    -------
    Array, shape [B, S, hidden_size], the dtype of table
        The rows, bit for bit. NaN for an id out of range that `jax.jit` or `torch.compile` traces,
        since nobody can refuse it.

    Raises
    ------
    TypeError
        If an argument is not an array, the ids are not integers, or the libraries differ.
    ValueError
        If a shape does not fit, or an id is negative or not below vocab_size.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import embed
    >>> embed(np.array([[2, 0]]), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    array([[[5., 6.],
            [1., 2.]]])
    """
    xp = namespace(input_ids=input_ids, table=table)
    check_integers("input_ids", input_ids)
    check_array("table", table)
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected shape [B, S], got {list(input_ids.shape)}")
    if table.ndim != 2:
        raise ValueError(
            f"table: expected shape [vocab_size, hidden_size], got {list(table.shape)}"
        )
    ids = xp.reshape(input_ids, (math.prod(input_ids.shape),))
    rows = _traced_rows(xp, table, ids) if is_traced(ids) else _rows(xp, table, ids)
    return xp.reshape(rows, (*input_ids.shape, table.shape[1]))


def _rows(xp: Namespace, table: Array, ids: Array) -> Array:
    """The rows of some ids [N]; an error if one is out of range."""
    if is_tensor(ids):  # torch indexes with 32 and 64 bits only
        ids = xp.astype(ids, xp.int64, copy=False)
    if ids.shape[0] and not bool((xp.min(ids) >= 0) & (xp.max(ids) < table.shape[0])):
        raise ValueError(
            f"input_ids: expected ids from 0 to {table.shape[0] - 1}, got "
            f"{int(xp.min(ids))} to {int(xp.max(ids))}"
        )
    return xp.take(table, ids, axis=0)


def _traced_rows(xp: Namespace, table: Array, ids: Array) -> Array:
    """The rows of ids [N] whose numbers are not known yet; NaN where one is out of range."""
    ids = xp.astype(ids, xp.asarray(0).dtype)  # wide enough to count the rows
    valid = (ids >= 0) & (ids < table.shape[0])
    rows = xp.take(table, xp.where(valid, ids, xp.zeros_like(ids)), axis=0)
    return xp.where(xp.expand_dims(valid, axis=1), rows, xp.nan)


def embedding_factor(config: LlamaConfig, table: Array) -> float:
    """The number that rows of the embedding are multiplied by."""
    factor = config.embedding_multiplier
    if not config.embedding_multiplier_rounded:
        return factor
    return float(np.asarray(factor, dtype_of(np, dtype_name(table.dtype))))


@portable
def activations(xp: Namespace, x: Array) -> Array:
    """Embeddings in the dtype of the activations: the checkpoint's, unless a backend widens it."""
    return x
