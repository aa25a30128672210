"""The site table, executed: what a site is, recomputed through sites that were not recorded.

Each step is the operation that the table names, computed by the layers' own function. A mistake on
the way is another operation at some of the sites.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import dtype_of
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.layers.attention import attention
from llama_layers.layers.linear import linear
from llama_layers.layers.mlp import GATES
from llama_layers.layers.norm import rms_norm
from llama_layers.layers.rope import apply_rope, rope_table
from llama_layers.layers.scaling import added, multiplied, soft_capped
from llama_layers.layers.sites import Site, sites
from llama_layers.model.embedding import embed
from llama_layers.model.llama import Llama
from llama_layers.verify.bound import Bound
from llama_layers.verify.build import operation_of
from llama_layers.verify.failing_site import Computable
from llama_layers.verify.operations import (
    Attention,
    Embedding,
    Gate,
    Linear,
    Logits,
    Logprobs,
    Norm,
    Operation,
    Residual,
    Rope,
)
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.validate import Recorded

# What is computed at a site, from its right operation and the arrays that are known by then.
Change = Callable[[Site, Operation, Recorded], Computable]


@dataclass(frozen=True)
class Gap:
    """What lies between a site and the nearest arrays that are known.

    Attributes
    ----------
    sites : tuple of Site
        Those to compute, in the order of a forward pass; the site itself is the last.
    sources : tuple of str
        The known arrays that they are computed from, in the same order.
    """

    sites: tuple[Site, ...]
    sources: tuple[str, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are computed, whole or in part."""
        return tuple(sorted({site.layer for site in self.sites if site.layer is not None}))


def same(site: Site, operation: Operation, known: Recorded) -> Operation:
    """Change nothing."""
    return operation


@dataclass(frozen=True, eq=False)
class AtTokens:
    """An operation with a mistake at some tokens, [B, S], and without it at the others."""

    made: Computable
    right: Operation
    tokens: NDArray[np.bool_]

    def bound(self, how: Rounding) -> Bound:
        """The exact result, and what rounding allows."""
        made, right = self.made.bound(how), self.right.bound(how)
        pairs = ((getattr(each, n) for each in (made, right)) for n in ("exact", "limit", "usual"))
        return Bound(*(self.joined(*pair) for pair in pairs))

    def joined(self, made: np.ndarray, right: np.ndarray) -> np.ndarray:
        """One array at these tokens, the other elsewhere."""
        if made.shape != right.shape or made.shape[:2] != self.tokens.shape:
            return made
        return np.where(self.tokens.reshape(*made.shape[:2], *(1,) * (made.ndim - 2)), made, right)


class Recomputation:
    """A walk over the site table, in one dtype.

    It goes on from the port's own array wherever that was recorded, and keeps what it computed of
    one layer at a time. Ask for sites in the order of a forward pass.

    Parameters
    ----------
    recorded : Recorded
        The port's arrays.
    model : Llama
        The model that the others are computed with.
    dtype : str
        The dtype of every array.
    change : callable
        Gives the operation to compute at a site, where a mistake makes it another.
    """

    def __init__(
        self, recorded: Recorded, model: Llama, dtype: str = "float64", change: Change = same
    ) -> None:
        self._recorded = recorded
        self._model = model
        self._dtype = dtype_of(np, dtype)
        self._change = change
        self._sites = {site.name: site for site in sites(model.config)}
        self._computed: dict[str, np.ndarray] = {}
        arrays = ChainMap(recorded.arrays, self._computed)  # type: ignore[arg-type]
        self._known = replace(recorded, arrays=arrays)
        self._layer: int | None = None  # that the computed arrays belong to

    def gap(self, site: Site) -> Gap:
        """What has to be computed for a site, from the recorded arrays on."""
        return self._gap(site, self._recorded.arrays)

    def knows(self, site: Site) -> bool:
        """Whether a site can be recomputed."""
        given = self._recorded.input_ids is not None or "input_ids" not in self.gap(site).sources
        return given and not site.pairwise and not (self.lacks_past(site) and self._seen(site))

    def lacks_past(self, site: Site) -> bool:
        """Whether a site is recomputed through attention whose keys of the past are missing."""
        past = self._recorded.past
        return any(past.needed(step, step.routes[-1]) for step in self.gap(site).sites)

    def _seen(self, site: Site) -> bool:
        """Whether recorded probabilities show that there was a past."""
        return any(self._recorded.past.count(step.layer) for step in self.gap(site).sites)

    @np.errstate(all="ignore")  # the port may have NaN or Inf
    def array(self, site: Site) -> np.ndarray:
        """Compute a site from the arrays before it."""
        known = self._known
        for step in self._gap(site, known.arrays).sites:
            if step.layer != self._layer:
                self._begin(step.layer)
            operation = operation_of(step, step.routes[-1], known, self._model)
            self._computed[step.name] = computed(self._change(step, operation, known), self._dtype)
        return self._computed[site.name]

    def _begin(self, layer: int | None) -> None:
        """Forget what no site of a layer is computed from."""
        stream = f"model.layers.{layer - 1}" if layer else "model.embed_tokens"
        if layer is None:
            stream = f"model.layers.{self._model.config.num_hidden_layers - 1}"
        for name in self._computed.keys() - {stream}:
            del self._computed[name]
        self._layer = layer

    def _gap(self, site: Site, known: Mapping[str, Array]) -> Gap:
        found: set[str] = set()
        waiting = [site.name]
        while waiting:
            name = waiting.pop()
            if name not in found:  # a stream has many ways through the layers
                found.add(name)
                if name == site.name or (name not in known and name != "input_ids"):
                    waiting += self._sites[name].routes[-1] or ["input_ids"]
        sources = {n for n in found if n == "input_ids" or (n in known and n != site.name)}
        return Gap(
            tuple(step for name, step in self._sites.items() if name in found - sources),
            tuple(name for name in ("input_ids", *self._sites) if name in sources),
        )


def computed(operation: Computable, dtype: np.dtype) -> np.ndarray:
    """Compute an operation in a dtype; in float64 that is its exact result."""

    def x(array: Array) -> np.ndarray:
        return to_numpy(array).astype(dtype, copy=False)

    def w(array: Array) -> np.ndarray:
        """Weights are wider than a narrow dtype: they are what they are in the sums."""
        if dtype == np.float64 or array.dtype == np.float64:
            return np.asarray(array, np.float64 if dtype == np.float64 else np.float32)
        return np.asarray(array)

    match operation:
        case AtTokens():
            return operation.joined(
                *(computed(y, dtype) for y in (operation.made, operation.right))
            )
        case Embedding():
            return multiplied(x(embed(operation.ids, operation.table)), operation.factor)
        case Norm():
            eps, offset = operation.eps, operation.offset
            return rms_norm(x(operation.x), w(operation.weight), eps=eps, offset=offset)
        case Linear():
            bias = None if operation.bias is None else w(operation.bias)
            return linear(x(operation.x), w(operation.weight), bias)
        case Rope():
            rows = x(operation.x)
            table = rope_table(operation.positions, operation.config, like=rows)
            width = operation.config.rotary_dim
            rotated = apply_rope(rows, *table, layout=operation.layout, rotary_dim=width)
            if operation.temperature is None:
                return rotated
            return (rotated * operation.temperature[..., None, None]).astype(rows.dtype)
        case Attention() if operation.mask is not None and operation.mask.dtype == bool:
            q, k, v = x(operation.q), x(operation.k), x(operation.v)
            scale, cap, sinks = operation.scale, operation.cap, operation.sinks
            sinks = None if sinks is None else w(sinks)
            return attention(q, k, v, mask=operation.mask, scale=scale, softcap=cap, sinks=sinks)
        case Gate():
            return x(GATES[operation.act](x(operation.gate), x(operation.up)))
        case Residual():
            return added(x(operation.x), x(operation.added), operation.multiplier)
        case Logits():
            logits = multiplied(x(operation.products), 1 / operation.scaling)
            return x(logits if operation.cap is None else soft_capped(logits, operation.cap))
        case Logprobs():
            return x(operation.computed(x(operation.logits)))
    return x(operation.bound(Rounding("float64", "float64")).exact)
