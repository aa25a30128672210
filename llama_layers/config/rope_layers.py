"""RoPE of each layer: which has it, with which theta, and whether it is scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from llama_layers.config.rope_scaling import WITHOUT_CONTEXT, RopeScaling
from llama_layers.errors import ConfigError

Config = TypeVar("Config", bound="RopeOfLayers")


class RopeKind(NamedTuple):
    """What RoPE of one layer may have other than that of another."""

    theta: float
    scaled: bool


class RopeOfLayers:
    """What the fields of a config say of RoPE, layer by layer."""

    num_hidden_layers: int
    head_dim: int
    rope_theta: float
    rope_scaling: Any
    layer_rope_theta: tuple[float, ...] | None
    sliding_rope_scaling: bool
    partial_rotary_factor: float
    llama_4_scaling_beta: float
    llama_4_scaling_context: int | None
    layer_types: tuple[str, ...] | None
    sliding_window: int | None

    rope_kinds: tuple[RopeKind | None, ...]
    """For each layer the kind of its RoPE; None where it has none."""
    _with_rope: Mapping[RopeKind, Any]
    """For each of these kinds the config all of whose layers have it; none if all are alike."""

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head RoPE rotates; the first ones."""
        return int(self.head_dim * self.partial_rotary_factor)

    def rope_of(self: Config, layer: int, /) -> Config | None:
        """The config by which a layer rotates queries and keys; None where it does not.

        Parameters
        ----------
        layer : int
            Which layer.

        Returns
        -------
        LlamaConfig or None
            With the layer's theta as ``rope_theta`` and its scaling as ``rope_scaling``, for
            `rope_table` and `inv_freq`.

        Examples
        --------
        >>> from llama_layers import LlamaConfig
        >>> LlamaConfig.llama2_7b().rope_of(3).rope_theta
        10000.0
        """
        kind = self.rope_kinds[layer]
        return None if kind is None else self.with_rope(kind)

    def with_rope(self: Config, kind: RopeKind, /) -> Config:
        """The config all of whose layers have RoPE of one kind."""
        found: Config = self._with_rope.get(kind, self)
        return found

    def _kind_of(self, layer: int) -> RopeKind | None:
        """The kind of a layer's RoPE; None where it has none."""
        theta = self.rope_theta if self.layer_rope_theta is None else self.layer_rope_theta[layer]
        if not theta:
            return None
        types = self.layer_types
        sliding = (
            self.sliding_window is not None
            if types is None
            else (types[layer] == "sliding_attention")
        )
        scaled = self.rope_scaling is not None and (self.sliding_rope_scaling or not sliding)
        return RopeKind(theta, scaled)


def ropes_of(config: RopeOfLayers) -> dict[str, Any]:
    """The attributes in which a config keeps what each forward pass asks of RoPE."""
    kinds = tuple(map(config._kind_of, range(config.num_hidden_layers)))
    made: Any = config
    alike = config.layer_rope_theta is None and config.sliding_rope_scaling
    configs = {
        kind: replace(
            made,
            rope_theta=kind.theta,
            rope_scaling=config.rope_scaling if kind.scaled else None,
            layer_rope_theta=None,
            sliding_rope_scaling=True,
        )
        for kind in set(kinds)
        if kind is not None and not alike
    }
    return {"rope_kinds": kinds, "_with_rope": configs}


def check_rope(config: RopeOfLayers) -> None:
    """Raise ConfigError if fields of RoPE that are right by themselves cannot go together."""
    if config.head_dim % 2:
        raise ConfigError(
            f"head_dim: expected an even number (RoPE rotates pairs), got {config.head_dim}"
        )
    if config.rotary_dim % 2 or not config.rotary_dim:
        raise ConfigError(
            f"partial_rotary_factor: expected a part of head_dim = {config.head_dim} that is an "
            f"even number of channels (RoPE rotates pairs), got {config.partial_rotary_factor!r}"
        )
    thetas = config.layer_rope_theta
    if thetas is not None and len(thetas) != config.num_hidden_layers:
        raise ConfigError(
            f"layer_rope_theta: expected {config.num_hidden_layers} entries, one for each layer, "
            f"got {len(thetas)}"
        )
    scaling: RopeScaling | None = config.rope_scaling
    if scaling is None:
        return
    if config.llama_4_scaling_context is not None and scaling.rope_type not in WITHOUT_CONTEXT:
        raise ConfigError(
            f"llama_4_scaling_context: expected None with {scaling.rope_type}, which has a context "
            f"of its own, got {config.llama_4_scaling_context}"
        )
    if scaling.rope_type == "yarn" and 1 in (config.rope_theta, *(thetas or ())):
        raise ConfigError(
            "rope_theta: expected another number than 1 with yarn, which divides by its logarithm"
        )
    for name in ("short_factor", "long_factor"):
        factors = getattr(scaling, name)
        if factors is not None and len(factors) != config.rotary_dim // 2:
            raise ConfigError(
                f"{name}: expected {config.rotary_dim // 2} numbers, one for each pair of channels "
                f"that RoPE rotates, got {len(factors)}"
            )
