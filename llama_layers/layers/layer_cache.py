"""One layer's keys and values of earlier tokens."""

from __future__ import annotations

from llama_layers.arrays.types import Array
from llama_layers.layers.cache import KVCache


class LayerCache:
    """One layer's view of a `KVCache`, which it replaces with each append.

    Parameters
    ----------
    cache : KVCache
        The cache as it is before the layer: already extended by the new tokens, with
        `KVCache.extend`, once for all layers.
    layer : int
        Which layer.

    Raises
    ------
    TypeError
        If `cache` is not a KVCache.
    ValueError
        If it has no such layer.
    """

    def __init__(self, cache: KVCache, layer: int) -> None:
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")
        cache.check_layer(layer)
        self.cache = cache
        self.layer = layer

    def append(self, k: Array, v: Array, /) -> tuple[Array, Array]:
        """Write new keys and values, and return all that are visible now."""
        self.cache = self.cache.append(self.layer, k, v)
        return (
            self.cache.visible(self.cache.keys[self.layer]),
            self.cache.visible(self.cache.values[self.layer]),
        )
