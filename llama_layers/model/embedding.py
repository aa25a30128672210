"""From token ids to the first hidden states."""

from __future__ import annotations

import math

from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import check_array, check_integers
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.tracing import known_false
from llama_layers.arrays.types import Array, Namespace


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
        The rows, bit for bit.

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
    size = math.prod(input_ids.shape)
    if size and known_false((xp.min(input_ids) >= 0) & (xp.max(input_ids) < table.shape[0])):
        raise ValueError(
            f"input_ids: expected ids from 0 to {table.shape[0] - 1}, got "
            f"{int(xp.min(input_ids))} to {int(xp.max(input_ids))}"
        )
    rows = xp.take(table, xp.reshape(input_ids, (size,)), axis=0)
    return xp.reshape(rows, (*input_ids.shape, table.shape[1]))


@portable
def activations(xp: Namespace, x: Array) -> Array:
    """Embeddings in the dtype of the activations: the checkpoint's, unless a backend widens it."""
    return x
