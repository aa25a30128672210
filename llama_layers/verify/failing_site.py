"""A site that rounding does not explain, with everything that could tell why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.config.families import module_name
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.sites import Site, sites
from llama_layers.model.llama import Llama
from llama_layers.verify.bound import Bound
from llama_layers.verify.build import layer_matrix
from llama_layers.verify.defined import where_defined
from llama_layers.verify.family_roundings import rounding_in_family
from llama_layers.verify.fit import NORMED_KEYS, ROTATED, in_pairs
from llama_layers.verify.operations import Operation
from llama_layers.verify.past import OF_PAST
from llama_layers.verify.profiles import Rounding, RoundingProfile
from llama_layers.verify.validate import Recorded

# How many times as much as is usual an array that was solved for may be off.
_UNSURE = 16.0


class Computable(Protocol):
    """Anything with a bound: an operation, or what a mistake makes of one."""

    def bound(self, formats: Rounding) -> Bound:
        """The exact result, and what rounding allows."""


@dataclass(frozen=True, eq=False)
class FailingSite:
    """A site that failed, with everything that could tell why."""

    site: Site
    operation: Operation  # what it should be
    computed: np.ndarray  # what the port has there
    formats: Rounding  # that the port computes in
    recorded: Recorded  # the port's other arrays
    model: Llama  # with the other weights
    paired: bool = False  # whether channels that RoPE rotates are next to each other in all of it
    unsure: NDArray[np.float64] | None = None  # how far off the port's array may be, if it may
    _bounds: dict[Rounding, Bound] = field(default_factory=dict, init=False, repr=False)

    @property
    def profiles(self) -> tuple[RoundingProfile, ...]:
        """Those that an engine can have here, in the order to try them."""
        family = self.config.model_type
        return tuple(rounding_in_family(profile, family) for profile in self.formats.profiles)

    @property
    def config(self) -> LlamaConfig:
        """The model's config."""
        return self.model.config

    @property
    def has_past(self) -> bool:
        """Whether it is attention that sees tokens before the first of the trace."""
        past = self.recorded.past.count(self.site.layer)
        return past > 0 and self.site.operation in OF_PAST

    def bound(self, formats: Rounding) -> Bound:
        """The bound of the operation without a mistake, computed once."""
        if formats not in self._bounds:
            self._bounds[formats] = self.widened(self.operation.bound(formats))
        return self._bounds[formats]

    def widened(self, bound: Bound, here: Any = ...) -> Bound:
        """A bound on the site's array, or on a part, that allows for how far off it may be."""
        if self.unsure is None:
            return bound
        more = self.unsure[here]
        return Bound(bound.exact, bound.limit + _UNSURE * more, bound.usual + 2 * more)

    @cached_property
    def ratio(self) -> NDArray[np.float64]:
        """The error of each of the port's elements over its limit; zeros if it has no numbers."""
        if not self.computed.any():
            return np.zeros(self.computed.shape)
        right = where_defined(self.bound(self.formats), self.site, self.recorded)
        return right.ratio(self.computed)

    def input_site(self, index: int) -> Site | None:
        """The site that one of its inputs is, by the most local route; None if it is none."""
        route = self.site.routes[0]
        known = {site.name: site for site in sites(self.config)}
        return known.get(route[index]) if route else None

    def beside(self, role: str) -> np.ndarray | None:
        """The port's array of another site in the same layer, if it was recorded."""
        name = module_name(self.config.model_type, role)
        return self.array(f"model.layers.{self.site.layer}.{name}")

    def matrix(self, role: str, layer: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """The weight and the bias of a module of the layer, or of another, as the port has them."""
        number = self.site.layer if layer is None else layer
        assert number is not None  # a role is inside a layer
        weight, bias = layer_matrix(self.model.weights.layers[number], role)
        weight, bias = to_numpy(weight), None if bias is None else to_numpy(bias)
        if self.paired and role in ROTATED:
            weight = in_pairs(weight.T, config=self.config).T
            bias = None if bias is None else in_pairs(bias, config=self.config)
        return weight, bias

    def keys_and_values(self, layer: int) -> dict[str, np.ndarray | None]:
        """What attention of a layer reads: "k" and "v", if they were recorded."""
        after = self.config.qk_norm_after_rope
        keys = module_name(self.config.model_type, NORMED_KEYS) if after else "self_attn.k_rope"
        named = {"k": keys, "v": "self_attn.v_proj"}
        return {part: self.array(f"model.layers.{layer}.{name}") for part, name in named.items()}

    def array(self, name: str) -> np.ndarray | None:
        """The port's array of a site, if it was recorded, of as many last tokens as here.

        NaN are zeros in it: NaN of one site do not explain those of another.
        """
        if name not in self.recorded.arrays:
            return None
        array = self.recorded.array(name)
        array = np.where(np.isnan(array), np.zeros_like(array), array)
        rows = self.computed.shape[1]
        return array[:, -rows:] if self.site.layer is None and rows < array.shape[1] else array

    def streams(self, shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
        """Other arrays of a shape that could be mistaken for an input, the nearest first.

        They are those of the same layer and of the one before it, and the embedding; heads lie side
        by side.
        """
        last = self.recorded.config.num_hidden_layers - 1
        layer = last if self.site.layer is None else self.site.layer
        for site in reversed(sites(self.recorded.config)):
            near = site.layer in (layer, layer - 1) or site.operation == "embedding"
            near |= site.layer is None and layer == last
            if site.pairwise or not near or site.name == self.site.name:
                continue
            array = self.array(site.name)
            # An array of zeros would explain any zeros.
            if array is not None and array.size == np.prod(shape) and array.any():
                yield site.name, array.reshape(shape)


def wide(array: Array) -> NDArray[np.float64]:
    """An array's numbers in float64."""
    return to_numpy(array).astype(np.float64)
