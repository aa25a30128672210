"""Sites whose inputs were not recorded: recomputed since the last ones that were."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import dtype_of
from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers.decoder import decoder_layer
from llama_layers.layers.linear import linear
from llama_layers.layers.norm import rms_norm
from llama_layers.layers.rope import rope_table
from llama_layers.layers.tap import Tap, inside, untouched
from llama_layers.model.embedding import embed
from llama_layers.model.llama import Llama
from llama_layers.verify.distance import distance
from llama_layers.verify.sites import Site, sites
from llama_layers.verify.stored import info_of
from llama_layers.verify.validate import Recorded


@dataclass(frozen=True, eq=False)
class Run:
    """A forward pass from what was recorded; or from that with a mistake made on the way.

    Attributes
    ----------
    recorded : Recorded
        The port's arrays, which take the place of what is computed.
    model : Llama
        What computes the others.
    tap : callable
        Called with each array that a pass goes on with, after the port's has taken its place.
    causal : bool
        Whether attention hides later tokens.
    """

    recorded: Recorded
    model: Llama
    tap: Tap = untouched
    causal: bool = True


class Inherited:
    """Recomputations through unrecorded sites, in float64 and in the port's dtype.

    A pass computes every site of a layer, and goes on from each with the port's own array where
    that was recorded. Layers are asked for from the first to the last; one is kept.
    """

    def __init__(self, recorded: Recorded, model: Llama) -> None:
        self._recorded = recorded
        self._model = model
        self._routes = {site.name: site.routes[-1] for site in sites(model.config)}
        self.run = Run(recorded, model)
        self._passes = {"float64": _Pass(self.run, "float64")}

    def at(
        self, site: Site, dtype: str
    ) -> tuple[NDArray[np.float64] | None, float | None, tuple[str, ...]]:
        """The exact array, how far our own run in a dtype is from it, and what both start from."""
        sources = self._sources(site)
        if site.pairwise or not self._are_known(sources):
            return None, None, ()
        rows = info_of(self._recorded.arrays, site.name).shape[1]
        exact = self._passes["float64"].site(site)[:, -rows:]
        own = self._passes.setdefault(dtype, _Pass(self.run, dtype)).site(site)
        return exact, distance(exact, own[:, -rows:]), sources

    def filled(self, site: Site) -> Recorded:
        """The trace, with what the exact pass goes on with where the port recorded nothing."""
        exact = self._passes["float64"]
        exact.site(site)
        used = exact.used
        if self._recorded.input_ids is None:
            used = {n: a for n, a in used.items() if self._are_known(self._unrecorded(n)[1])}
        both: Any = ChainMap(self._recorded.arrays, used)  # type: ignore[arg-type]  # is read
        return replace(self._recorded, arrays=both)

    def between(self, site: Site) -> tuple[int, ...]:
        """The layers that a recomputation of a site runs, whole or in part."""
        seen = self._unrecorded(site.name)[0] | {site.name}
        found = (other.layer for other in sites(self._model.config) if other.name in seen)
        return tuple(sorted({layer for layer in found if layer is not None}))

    def places(self, site: Site) -> list[Site]:
        """The sites that lead to one from recorded ones, itself the last; if they are few."""
        if len(self.between(site)) > 1:
            return [site]
        names = self._unrecorded(site.name)[0] | {site.name}
        same = (other for other in sites(self.run.model.config) if other.layer == site.layer)
        return [other if other.name != site.name else site for other in same if other.name in names]

    def _sources(self, site: Site) -> tuple[str, ...]:
        """The nearest recorded arrays that a site depends on, in the order of a forward pass."""
        found = self._unrecorded(site.name)[1]
        return tuple(name for name in ("input_ids", *self._routes) if name in found)

    def _are_known(self, sources: Collection[str]) -> bool:
        return "input_ids" not in sources or self._recorded.input_ids is not None

    def _unrecorded(self, site: str) -> tuple[set[str], set[str]]:
        """The arrays between a site and the nearest recorded ones, and those."""
        known = {"input_ids", *self._recorded.arrays}
        seen: set[str] = set()
        waiting = list(self._routes[site]) or ["input_ids"]
        while waiting:
            name = waiting.pop()
            if name not in seen:  # a stream has many ways through the layers
                seen.add(name)
                if name not in known:
                    waiting += self._routes[name] or ["input_ids"]
        return seen - known, seen & known


def computed(run: Run, dtype: str, site: Site) -> NDArray[Any]:
    """What a site is in a run, in a dtype."""
    return _Pass(run, dtype).site(site)


class _Pass:
    """A run in one dtype, a layer at a time, with the port's arrays put in."""

    def __init__(self, run: Run, dtype: str) -> None:
        self._recorded = run.recorded
        self._model = run.model
        self._tap = run.tap
        self._causal = run.causal
        self._dtype = dtype_of(np, dtype)
        self._layer = -1  # the last one that was computed
        self._output: Any = None  # the residual stream after it
        self._computed: dict[str, NDArray[Any]] = {}  # since the last layer began
        self.used: dict[str, NDArray[Any]] = {}
        """The arrays that the pass went on with since the last layer began."""

    @np.errstate(invalid="ignore", over="ignore")  # the port may have NaN or Inf
    def site(self, site: Site) -> NDArray[Any]:
        """What a site is, computed from the arrays before it."""
        last = self._model.config.num_hidden_layers - 1
        if site.name not in self._computed:
            self._computed, self.used = {}, {}
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
            array = self._recorded.array(name).astype(self._dtype)
        self.used[name] = self._tap(name, array)
        return self.used[name]

    def _stream_after(self, layer: int) -> Any:
        """The residual stream after a layer; -1 is before the first."""
        name = f"model.layers.{layer}" if layer >= 0 else "model.embed_tokens"
        if name in self._recorded.arrays:
            return self._recorded.array(name).astype(self._dtype)
        if layer < 0:
            return self._embed()
        if self._layer != layer:
            self._run(layer)
        self.used[name] = self._output
        return self._output

    def _embed(self) -> Any:
        table = to_numpy(self._model.weights.embed_tokens)
        if self._recorded.input_ids is None:  # nothing that is asked for depends on the rows
            shape = (self._recorded.batch, self._recorded.count, table.shape[1])
            return np.full(shape, np.nan, self._dtype)
        rows = to_numpy(embed(self._recorded.input_ids, table)).astype(self._dtype)
        return self._put_in("model.embed_tokens", rows)

    def _run(self, layer: int) -> None:
        config, recorded = self._model.config, self._recorded
        x = self._stream_after(layer - 1)
        name = f"model.layers.{layer}"
        output = decoder_layer(
            x,
            self._model.weights.layers[layer].mapped(lambda a: _in_format(a, self._dtype)),
            config=config,
            rope=rope_table(recorded.positions, config, like=x),
            mask=self._mask(layer),
            tap=inside(self._put_in, name),
        )
        self._output = self._put_in(name, output)
        self._layer = layer

    def _mask(self, layer: int) -> NDArray[np.bool_]:
        recorded = self._recorded
        if self._causal:
            return recorded.allowed(self._model.config.window_of(layer))
        keep = np.ones((1, recorded.count), bool) if recorded.keep is None else recorded.keep
        return np.repeat(keep[:, None, :], recorded.count, axis=1)

    def _head(self, x: Any) -> None:
        weights, eps = self._model.weights, self._model.config.rms_norm_eps
        norm = _in_format(weights.norm, self._dtype)
        x = rms_norm(x, norm, eps=eps)
        recorded = self._recorded.arrays.get("model.norm")
        if recorded is not None:
            x = x[:, -recorded.shape[1] :]
        x = self._put_in("model.norm", x)
        self._put_in("lm_head", linear(x, _in_format(weights.lm_head, self._dtype)))


def _in_format(array: Any, dtype: Any) -> NDArray[Any]:
    """A weight as a NumPy array that sums for a dtype hold exactly."""
    array = to_numpy(array)
    if dtype == np.float64 or array.dtype == np.float64:
        return np.asarray(array, np.float64 if dtype == np.float64 else np.float32)
    return np.asarray(array)
