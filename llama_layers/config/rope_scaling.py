"""How RoPE is stretched to contexts longer than the trained one: the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from llama_layers.config.checks import (
    Count,
    Factor,
    Flag,
    check_factors,
    check_fields,
    check_name,
)
from llama_layers.errors import ConfigError, shown

# For each rope_type the keys it must have and those it may have.
_KEYS: dict[str, tuple[list[str], list[str]]] = {
    "linear": (["factor"], []),
    "dynamic": (["factor"], []),
    "yarn": (
        ["factor"],
        "original_max_position_embeddings beta_fast beta_slow attention_factor mscale "
        "mscale_all_dim truncate".split(),
    ),
    "llama3": (
        "factor low_freq_factor high_freq_factor original_max_position_embeddings".split(),
        [],
    ),
    "longrope": (
        "factor short_factor long_factor original_max_position_embeddings".split(),
        ["attention_factor"],
    ),
}

# The types without a trained context.
WITHOUT_CONTEXT = ("linear", "dynamic")

Factors = Annotated[tuple[float, ...], check_factors]

# The default of a number that every type needs, so that the message can say which type lacks it.
_NEEDED: Any = None

# Keys that change the frequencies where another architecture or program reads them, with the value
# that changes nothing: HunYuan's NTK alpha, the factors of Phi's tables, ChatGLM's ratio, the
# temperature of Ministral 3, and what the first programs with YaRN read.
_NEUTRAL = {
    "partial_rotary_factor": 1,
    "alpha": 1,
    "short_factor": None,
    "long_factor": None,
    "short_mscale": None,
    "long_mscale": None,
    "rope_ratio": 1,
    "llama_4_scaling_beta": 0,
    "attn_factor": 1,
    "extrapolation_factor": 1,
}

# transformers takes a zero of these for one that is not given.
_ABSENT_IF_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "alpha")


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are changed for contexts longer than the trained one.

    The attributes are the keys of config.json's ``rope_scaling``; those that a type does not read
    must be None.

    Attributes
    ----------
    rope_type : {"linear", "dynamic", "yarn", "llama3", "longrope"}
        The method.
    factor : float
        How many times longer the context becomes.
    original_max_position_embeddings : int or None
        The trained context. "llama3" and "longrope" must say it; "yarn" takes
        ``max_position_embeddings`` where it is None, and "dynamic" always does.
    low_freq_factor, high_freq_factor : float or None
        The band between scaled and kept frequencies of "llama3".
    beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim : float or None
        The parameters of "yarn"; "longrope" has `attention_factor`, too.
    truncate : bool or None
        Whether the ends of yarn's ramp are rounded outwards to whole numbers.
    short_factor, long_factor : tuple of float or None
        What "longrope" divides the frequency of each pair of channels by: up to the trained
        context, and beyond it.

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
    factor: Factor = _NEEDED
    original_max_position_embeddings: Count | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    beta_fast: Factor | None = None
    beta_slow: Factor | None = None
    attention_factor: Factor | None = None
    mscale: Factor | None = None
    mscale_all_dim: Factor | None = None
    truncate: Flag | None = None
    short_factor: Factors | None = None
    long_factor: Factors | None = None

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            if isinstance(given := getattr(self, name), list):
                object.__setattr__(self, name, tuple(given))  # since the dataclass is frozen
        check_name("rope_type", self.rope_type, _KEYS)
        required, optional = _KEYS[self.rope_type]
        for name, value in vars(self).items():
            if name in required and value is None:
                raise ConfigError(f"rope_scaling: {self.rope_type} needs {name}")
            if name not in ("rope_type", *required, *optional) and value is not None:
                raise ConfigError(f"rope_scaling: {self.rope_type} does not read {name}")
        check_fields(self)
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ConfigError(
                f"low_freq_factor: expected less than high_freq_factor = {high!r}, got {low!r}"
            )
        if self.rope_type == "longrope" and self.original_max_position_embeddings == 1:
            raise ConfigError(
                "original_max_position_embeddings: expected more than 1 with longrope, which "
                "divides by its logarithm"
            )

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies depend on how many positions are in use."""
        return self.rope_type in ("dynamic", "longrope")

    @classmethod
    def from_mapping(cls, scaling: Mapping[str, Any], /) -> RopeScaling | None:
        """Read a ``rope_scaling`` object of config.json.

        Parameters
        ----------
        scaling : mapping
            Its keys, with the method in ``rope_type`` or ``type``. Keys that the method does not
            read are passed over, as in transformers.

        Returns
        -------
        RopeScaling or None
            None where the method is "default", plain RoPE.

        Raises
        ------
        ConfigError
            If the method is unknown, a key is missing, or one is there that changes the
            frequencies elsewhere.

        Examples
        --------
        >>> from llama_layers import RopeScaling
        >>> RopeScaling.from_mapping({"type": "linear", "factor": 4.0, "finetuned": True}).factor
        4.0
        """
        return read_scaling(scaling)[0]


def read_scaling(scaling: Mapping[str, Any]) -> tuple[RopeScaling | None, tuple[str, ...]]:
    """Read a ``rope_scaling`` object: the scaling, None for plain RoPE, and keys not read."""
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"rope_scaling: expected an object, got {shown(scaling)}")
    given = {
        key: value
        for key, value in scaling.items()
        if value is not None and not (key in _ABSENT_IF_ZERO and value == 0)
    }
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        read: set[str] = set()
        if given.get("factor", 1) != 1:
            raise ConfigError("rope_scaling: default does not read factor")
    else:
        check_name("rope_type", kind, ("default", *_KEYS))
        read = {key for keys in _KEYS[kind] for key in keys}
    unread = [key for key in given if key not in {"rope_type", "type", "rope_theta", *read}]
    for key in unread:
        if key in _NEUTRAL and given[key] != (neutral := _NEUTRAL[key]):
            expected = "nothing" if neutral is None else f"{neutral} or nothing"
            raise ConfigError(f"rope_scaling {key}: expected {expected}, got {shown(given[key])}")
        if isinstance(given[key], Mapping):
            raise ConfigError(f"rope_scaling {key}: expected no parameters for kinds of layers")
    if kind == "default":
        return None, tuple(unread)
    return RopeScaling(kind, **{key: given[key] for key in read if key in given}), tuple(unread)
