"""How RoPE is stretched to contexts longer than the trained one: the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from llama_layers.config_schema import check_count, check_flag, check_positive, scaling_arguments
from llama_layers.errors import ConfigError

# For each rope_type the keys it must have and those it may have.
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": (
        (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
        (),
    ),
}


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are changed for contexts longer than the trained one.

    The attributes are the keys of config.json's ``rope_scaling``; those that a type does not read
    must be None.

    Attributes
    ----------
    rope_type : {"linear", "dynamic", "yarn", "llama3"}
        The method.
    factor : float
        How many times longer the context becomes; at least 1.
    original_max_position_embeddings : int or None
        The trained context. "llama3" must say it; "yarn" takes ``max_position_embeddings`` where
        it is None, and "dynamic" always does.
    low_freq_factor, high_freq_factor : float or None
        The band between scaled and kept frequencies of "llama3".
    beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim : float or None
        Of "yarn".
    truncate : bool or None
        Of "yarn": whether the ends of its ramp are rounded outwards to whole numbers.

    Raises
    ------
    ConfigError
        If the type is unknown, or a number is missing, extra or out of range.

    Examples
    --------
    >>> from llama_layers import RopeScaling
    >>> RopeScaling("linear", factor=2.0).factor
    2.0
    """

    rope_type: str
    factor: float = None  # type: ignore[assignment]  # every type needs it, and says so
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in _ROPE_KEYS:
            raise ConfigError(
                f"rope_type: expected one of default, {', '.join(_ROPE_KEYS)}, "
                f"got {self.rope_type!r}"
            )
        required, optional = _ROPE_KEYS[self.rope_type]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in required and value is None:
                raise ConfigError(f"rope_scaling: {self.rope_type} needs {field.name}")
            if field.name not in ("rope_type", *required, *optional) and value is not None:
                raise ConfigError(f"rope_scaling: {self.rope_type} does not read {field.name}")
            if isinstance(field.default, type(None)) and value is None:
                continue
            if field.name == "truncate":
                check_flag("truncate", value)
            elif field.name == "original_max_position_embeddings":
                check_count(field.name, value)
            elif field.name != "rope_type":
                check_positive(field.name, value)
        if self.factor < 1:
            raise ConfigError(f"factor: expected at least 1, got {self.factor!r}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ConfigError(
                f"low_freq_factor: expected less than high_freq_factor = {high!r}, got {low!r}"
            )

    @classmethod
    def from_mapping(cls, scaling: Mapping[str, Any], /) -> RopeScaling | None:
        """Read a ``rope_scaling`` object of config.json.

        Parameters
        ----------
        scaling : mapping
            Its keys, with the method in ``rope_type`` or ``type``.

        Returns
        -------
        RopeScaling or None
            None where the method is "default", plain RoPE.

        Raises
        ------
        ConfigError
            If the method is unknown, or a key is missing or extra.

        Examples
        --------
        >>> from llama_layers import RopeScaling
        >>> RopeScaling.from_mapping({"type": "linear", "factor": 4.0}).rope_type
        'linear'
        """
        arguments = scaling_arguments(scaling)
        if arguments is None:
            return None
        if arguments["rope_type"] not in _ROPE_KEYS:  # before its keys, which are unknown too
            return cls(arguments["rope_type"])
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(arguments) - known):
            raise ConfigError(f"rope_scaling: unknown {', '.join(unknown)}")
        return cls(**arguments)
