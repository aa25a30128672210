"""The tokens before those of a trace, which attention sees through a cache.

A trace of a decode step, or of any later tokens alone, has their keys after RoPE and their values
under names of their own, or comes with another trace that has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import TraceError
from llama_layers.layers.sites import Site
from llama_layers.verify.fit import OF_CACHE, in_halves
from llama_layers.verify.stored import StoredArray, info_of, stored

KEY, VALUE = OF_CACHE.values()
# Operations that read keys or values of earlier tokens.
OF_PAST = ("scores", "softmax", "attention")


@dataclass(frozen=True, eq=False)
class Past:
    """Keys and values of earlier tokens.

    Attributes
    ----------
    arrays : mapping of str to StoredArray
        By name, each [B, P, kv_heads, D]. P may differ from layer to layer: the last P tokens.
    keep : ndarray of bool or None
        Which of the tokens are not padding, [B, P] with the largest P; all if it is None.
    begins : int
        The position of the first token of the trace, if there should be tokens before; or 0.
    seen : mapping of int to int
        How many earlier tokens recorded scores or probabilities of a layer have, beside the arrays.
    """

    arrays: Mapping[str, StoredArray] = field(default_factory=dict)
    keep: NDArray[np.bool_] | None = None
    begins: int = 0
    seen: Mapping[int, int] = field(default_factory=dict)

    def count(self, layer: int | None) -> int:
        """How many tokens before the first a layer sees."""
        if layer is None:
            return 0
        found = self.arrays.get(_name(layer, KEY))
        return self.seen.get(layer, 0) if found is None else found.info().shape[1]

    def lacks(self, layer: int | None) -> bool:
        """Whether a layer's keys and values of earlier tokens are missing."""
        return (
            layer is not None
            and bool(self.begins or self.seen.get(layer))
            and _name(layer, KEY) not in self.arrays
        )

    def needed(self, site: Site, route: tuple[str, ...]) -> bool:
        """Whether a site is computed by a route from what is missing."""
        reads = len(route) > 1  # and not scores alone
        return site.operation in OF_PAST and reads and self.lacks(site.layer)

    def joined(self, layer: int, role: str, array: np.ndarray) -> np.ndarray:
        """Keys or values with those of earlier tokens before them."""
        found = self.arrays.get(_name(layer, role))
        return array if found is None else np.concatenate([to_numpy(found.read()), array], axis=1)

    def of_layers(self, layers: set[int | None]) -> dict[str, StoredArray]:
        """The arrays of some layers."""
        return {n: array for n, array in self.arrays.items() if int(n.split(".")[2]) in layers}

    @property
    def note(self) -> str:
        """What to do about what is missing, as a sentence."""
        begins = f"its first token has position {self.begins}, and " if self.begins else ""
        return (
            f"not judged: {begins}the keys and values of the past are missing; record them as "
            f"{KEY} and {VALUE}, or check with a trace of the past (--past)"
        )


def _name(layer: int, role: str) -> str:
    return f"model.layers.{layer}.{role}"


def past_names(config: LlamaConfig) -> Iterator[str]:
    """Yield the names of keys and values of earlier tokens."""
    for layer in range(config.num_hidden_layers):
        yield _name(layer, KEY)
        yield _name(layer, VALUE)


def past_of(
    arrays: Mapping[str, Array], config: LlamaConfig, batch: int, layout: str
) -> dict[str, StoredArray]:
    """Return the keys and values of earlier tokens in a trace, each [B, P, kv_heads, D]."""
    found = {
        name: _fitted(name, stored(arrays, name), config, batch, layout)
        for name in past_names(config)
        if name in arrays
    }
    for name, array in found.items():
        other = name.replace(KEY, VALUE) if name.endswith(KEY) else name.replace(VALUE, KEY)
        if other not in found:
            raise TraceError(f"{other}: expected it beside {name}, got none")
        if array.info().shape != found[other].info().shape:
            raise TraceError(
                f"{other}: expected shape {list(array.info().shape)} of {name}, got "
                f"{list(found[other].info().shape)}"
            )
    return found


def check_no_gap(past: NDArray[np.int64], positions: Array | None) -> None:
    """Raise TraceError if earlier tokens do not end where those of a trace begin."""
    if positions is None:
        return
    last, begins = int(past.max()), int(to_numpy(positions)[..., 0].max())
    if last != begins - 1:
        raise TraceError(
            f"past: expected tokens up to position {begins - 1}, since the trace begins at "
            f"{begins}, got some up to {last}"
        )


def keys_seen(arrays: Mapping[str, Array], known: Mapping[str, Site], count: int) -> dict[int, int]:
    """Return how many earlier keys recorded scores or probabilities of layers have."""
    found: dict[int, int] = {}
    for name in arrays:
        layer, shape = known[name].layer, info_of(arrays, name).shape
        if known[name].pairwise and layer is not None and len(shape) > 1 and shape[-2] == count:
            found[layer] = max(found.get(layer, 0), shape[-1] - count)
    return {layer: before for layer, before in found.items() if before > 0}


def _fitted(
    name: str, array: StoredArray, config: LlamaConfig, batch: int, layout: str
) -> StoredArray:
    heads, width = config.num_key_value_heads, config.head_dim
    given = array.info()
    shape = given.shape
    if batch == 1 and (shape[1:] == (heads, width) or len(shape) == 2):
        shape = (1, *shape)
    if shape[2:] == (heads * width,):
        shape = (*shape[:2], heads, width)
    if len(shape) != 4 or shape[0] != batch or shape[2:] != (heads, width):
        swapped = shape[:2] == (batch, heads) and len(shape) == 4 and shape[3] == width
        raise TraceError(
            f"{name}: expected shape [{batch}, tokens, {heads}, {width}], got {list(given.shape)}"
            + (": transpose axes 1 and 2, heads and tokens" if swapped else "")
        )
    if given.dtype not in FLOATS:
        raise TraceError(
            f"{name}: expected one of the dtypes {', '.join(FLOATS)}, got {given.dtype}"
        )
    pairs = config if layout == "interleaved" and name.endswith(KEY) else None
    return array.changed(shape, partial(_fit, shape, pairs))


def _fit(shape: tuple[int, ...], interleaved: LlamaConfig | None, given: Array) -> np.ndarray:
    array = to_numpy(given).reshape(shape)
    return array if interleaved is None else in_halves(array, interleaved)
