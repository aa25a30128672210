"""Sites whose inputs were not recorded: recomputed since the last ones that were."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.backends.dtypes import dtype_of
from llama_layers.backends.transfer import to_numpy
from llama_layers.embedding import embed
from llama_layers.layer import decoder_layer
from llama_layers.llama import Llama
from llama_layers.norm import rms_norm
from llama_layers.projection import linear
from llama_layers.rope import rope_table
from llama_layers.tap import inside
from llama_layers.verify.distance import distance
from llama_layers.verify.sites import Site, sites
from llama_layers.verify.validate import Recorded


class Inherited:
    """Recomputations through unrecorded sites, in float64 and in the port's dtype.

    A pass computes every site of a layer, and goes on from each with the port's own array where
    that was recorded. Layers are asked for from the first to the last; one is kept.
    """

    def __init__(self, recorded: Recorded, model: Llama) -> None:
        self._recorded = recorded
        self._model = model
        self._routes = {site.name: site.routes[-1] for site in sites(model.config)}
        self._passes = {"float64": _Pass(recorded, model, "float64")}

    def at(
        self, site: Site, dtype: str
    ) -> tuple[NDArray[np.float64] | None, float | None, tuple[str, ...]]:
        """The exact array, how far our own run in a dtype is from it, and what both start from."""
        sources = self._sources(site)
        if site.pairwise or ("input_ids" in sources and self._recorded.input_ids is None):
            return None, None, ()
        rows = self._recorded.arrays[site.name].shape[1]
        exact = self._passes["float64"].site(site)[:, -rows:]
        own = self._passes.setdefault(dtype, _Pass(self._recorded, self._model, dtype)).site(site)
        return exact, distance(exact, own[:, -rows:]), sources

    def _sources(self, site: Site) -> tuple[str, ...]:
        """The nearest recorded arrays that a site depends on, in the order of a forward pass."""
        known = {"input_ids", *self._recorded.arrays}
        seen: set[str] = set()
        waiting = list(self._routes[site.name]) or ["input_ids"]
        while waiting:
            name = waiting.pop()
            if name not in seen:  # a stream has many ways through the layers
                seen.add(name)
                if name not in known:
                    waiting += self._routes[name] or ["input_ids"]
        found = seen & known
        return tuple(name for name in ("input_ids", *self._routes) if name in found)


class _Pass:
    """A forward pass in one dtype, a layer at a time, with the port's arrays put in."""

    def __init__(self, recorded: Recorded, model: Llama, dtype: str) -> None:
        self._recorded = recorded
        self._model = model
        self._dtype = dtype_of(np, dtype)
        self._layer = -1  # the last one that was computed
        self._output: Any = None  # the residual stream after it
        self._computed: dict[str, NDArray[Any]] = {}

    def site(self, site: Site) -> NDArray[Any]:
        """What a site is, computed from the arrays before it."""
        last = self._model.config.num_hidden_layers - 1
        if site.name not in self._computed:
            self._computed = {}
            if site.name == "model.embed_tokens":
                self._embed()
            elif site.layer is not None:
                self._run(site.layer)
            else:
                self._head(self._stream_after(last))
        return self._computed[site.name]

    def _put_in(self, name: str, array: Any) -> Any:
        """Keep what was computed, and go on with what the port has."""
        self._computed[name] = array
        if name in self._recorded.arrays:
            return self._recorded.array(name).astype(self._dtype)
        return array

    def _stream_after(self, layer: int) -> Any:
        """The residual stream after a layer; -1 is before the first."""
        name = f"model.layers.{layer}" if layer >= 0 else "model.embed_tokens"
        if name in self._recorded.arrays:
            return self._recorded.array(name).astype(self._dtype)
        if layer < 0:
            return self._embed()
        if self._layer != layer:
            self._run(layer)
        return self._output

    def _embed(self) -> Any:
        table = to_numpy(self._model.weights.embed_tokens)
        rows = embed(self._recorded.input_ids, table).astype(self._dtype)
        return self._put_in("model.embed_tokens", rows)

    def _run(self, layer: int) -> None:
        config, recorded = self._model.config, self._recorded
        x = self._stream_after(layer - 1)
        name = f"model.layers.{layer}"
        tap = inside(self._put_in, name)
        output = decoder_layer(
            x,
            _in_format(self._model.weights.layers[layer], self._dtype),
            config=config,
            rope=rope_table(recorded.positions, config, like=x),
            mask=recorded.allowed(config.window_of(layer)),
            tap=tap,
        )
        self._output = self._put_in(name, output)
        self._layer = layer

    def _head(self, x: Any) -> None:
        weights, eps = self._model.weights, self._model.config.rms_norm_eps
        norm = _in_format(weights.norm, self._dtype)
        x = rms_norm(x, norm, eps=eps)
        recorded = self._recorded.arrays.get("model.norm")
        if recorded is not None:
            x = x[:, -recorded.shape[1] :]
        x = self._put_in("model.norm", x)
        self._put_in("lm_head", linear(x, _in_format(weights.lm_head, self._dtype)))


def _in_format(weights: Any, dtype: Any) -> Any:
    """Weights, or a dataclass of them, as NumPy arrays that sums for a dtype hold exactly."""
    if is_dataclass(weights) and not isinstance(weights, type):
        parts = {f.name: _in_format(getattr(weights, f.name), dtype) for f in fields(weights)}
        return replace(weights, **parts)
    if not hasattr(weights, "dtype"):
        return weights
    array = to_numpy(weights)
    if dtype == np.float64 or array.dtype == np.float64:
        return array.astype(np.float64 if dtype == np.float64 else np.float32)
    return array
