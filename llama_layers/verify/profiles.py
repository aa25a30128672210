"""The formats that an engine computes in, and the roundings that it makes on purpose."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from llama_layers.arrays.checks import check_count
from llama_layers.arrays.dtypes import FLOATS, FloatFormat, accumulate_format, float_format
from llama_layers.arrays.types import Array
from llama_layers.errors import shown


def _step(words: str, default: Any = False) -> Any:
    """A field of a profile, and what an engine rounds there, to a format in braces."""
    return field(default=default, metadata={"words": words})


def _check_format(name: str, value: object) -> None:
    """Raise ValueError if a value is a word, and not the name of a format."""
    if isinstance(value, str) and value not in FLOATS:
        raise ValueError(f"{name}: expected one of {', '.join(FLOATS)}, got {value!r}")


@dataclass(frozen=True)
class RoundingProfile:
    """The roundings of an engine beyond the contract of this package.

    The contract: the phases of RoPE in float64, every other step in the format of the sums, one
    rounding into the format of the result. "The dtype" below is that of the result.

    Attributes
    ----------
    name : str
        The engine.
    norm_before_weight : bool or str
        RMSNorm rounds the normalised row to the dtype before it multiplies with the weight.
    phases : str or None
        The format in which RoPE multiplies positions and frequencies; None for float64.
    rope_table : bool or str
        Cosines and sines are rounded to the dtype.
    rope_arithmetic : bool or str
        The products and the sum of RoPE are each rounded to the dtype.
    scores : bool or str
        The scores of attention are rounded to the dtype, before and after they are scaled, and
        after each step of a soft cap.
    probabilities : bool or str
        The probabilities of attention are rounded to the dtype.
    sigmoid : bool or str
        The exponential, the sum and the quotient of silu(gate)'s sigmoid are each rounded to the
        dtype.
    silu : bool or str
        silu(gate) is rounded to the dtype before it multiplies.
    gelu : bool or str
        gelu(gate) is read from a table: the gate is rounded to the dtype, and so is the result.
    multiplied : bool or str
        What a block adds to the residual stream is rounded to the dtype where it is multiplied by
        ``residual_multiplier``.
    capped : bool or str
        The steps of a soft cap of the logits are each rounded to the dtype.
    kv_cache : str or None
        The format that attention rounds queries, keys and values to where it reads them; None for
        the dtype.
    scaled_queries : bool
        Queries are multiplied by the scale of the scores before they are rounded to `kv_cache`.
    cache : str or None
        The format that keys and values are rounded to where a cache stores them; None for the
        dtype. Queries are what they are.
    weighted_sums : str or None
        The format that attention keeps its sums of weighted values in; None for that of all sums.
        With it a profile allows much, and counts only where it is named.
    written_in : str or None
        The format that norms, RoPE and multiplied embeddings are computed in even where sums have
        more digits; None for that of sums.
    softmax_in : str or None
        The same of a softmax that is an operation of its own.
    flushes : bool
        Subnormal numbers are read as zero.
    excess_precision : bool
        Inputs are rounded to the dtype where they are written out, but the engine goes on with what
        they were before, in the format of the sums. Weights and tables are what they are.
    root_ulps : float
        The error of a reciprocal root, in units in the last place. A root and a division that are
        each rounded correctly are within 1.
    exp_ulps : float
        The error of exponentials and hyperbolic tangents, in units in the last place.
    trig_ulps : float
        The error of cosines and sines, in units in the last place.
    block : int
        The fewest keys after which attention rescales what it has summed.
    ranks : int
        How many ranks share the work (tensor parallelism): each has a partial sum of what
        ``o_proj`` and ``down_proj`` give.
    reduce : str or None
        The format that ranks round partial sums to, and add them in; None for that of all sums.
    """

    name: str
    norm_before_weight: bool | str = _step("the normalised row to {} before the weight")
    phases: str | None = _step("phases to {}", None)
    rope_table: bool | str = _step("cosines and sines to {}")
    rope_arithmetic: bool | str = _step("each product to {}")
    scores: bool | str = _step("scores to {}")
    probabilities: bool | str = _step("probabilities to {}")
    sigmoid: bool | str = _step("each step of the sigmoid to {}")
    silu: bool | str = _step("silu(gate) to {}")
    gelu: bool | str = _step("gate and gelu(gate) to {}")
    multiplied: bool | str = _step("what is multiplied to {}")
    capped: bool | str = _step("each step of a cap to {}")
    kv_cache: str | None = _step("queries, keys and values to {}", None)
    scaled_queries: bool = _step("queries after they are scaled")
    cache: str | None = _step("cached keys and values to {}", None)
    weighted_sums: str | None = _step("weighted sums to {}", None)
    written_in: str | None = _step("its input and each step to {}", None)
    softmax_in: str | None = _step("the softmax to {}", None)
    flushes: bool = _step("subnormal numbers to zero")
    excess_precision: bool = _step("inputs only where they are written out")
    root_ulps: float = 1.0
    exp_ulps: float = 4.0
    trig_ulps: float = 1.0
    block: int = 16
    ranks: int = 1
    reduce: str | None = _step("partial sums of ranks to {}", None)

    def __post_init__(self) -> None:
        check_count("block", self.block)
        check_count("ranks", self.ranks)
        for step in fields(self):
            if step.name != "name":
                _check_format(step.name, getattr(self, step.name))

    def rounds(self, steps: Collection[str]) -> tuple[object, ...]:
        """All that it does in an operation that has some steps: profiles that agree are alike."""
        elsewhere = _WORDS.keys() - {*steps, *_IN_EVERY_OPERATION}
        return tuple(v for n, v in vars(self).items() if n not in elsewhere and n != "name")

    def habits(self, steps: Iterable[str], dtype: str | None) -> str:
        """Say which roundings some steps make; `dtype` is None where it holds the sums."""
        said = []
        for name in (*steps, *_IN_EVERY_OPERATION):
            does: bool | str | None = getattr(self, name)
            form = does if isinstance(does, str) else dtype
            if does and (form or name in _IN_EVERY_OPERATION):
                said.append(_WORDS[name].format(form))
        return ", ".join(said)


_WORDS = {step.name: step.metadata["words"] for step in fields(RoundingProfile) if step.metadata}
_WRITTEN = ("written_in", "softmax_in")
_IN_EVERY_OPERATION = ("flushes", "excess_precision")

CONTRACT = RoundingProfile("contract")
# What jax computes from plain code: the result of each operation is rounded.
_XLA = RoundingProfile(
    "XLA",
    scores=True,
    probabilities=True,
    sigmoid=True,
    silu=True,
    multiplied=True,
    capped=True,
    flushes=True,
)
_SDPA = RoundingProfile(
    "transformers with sdpa",
    norm_before_weight=True,
    phases="float32",
    rope_table=True,
    rope_arithmetic=True,
    probabilities=True,
    silu=True,
    multiplied=True,
    capped=True,
    written_in="float32",
)
_LLAMA_CPP = RoundingProfile("llama.cpp", phases="float32", gelu="float16", kv_cache="float16")
# By what a trace says if `record_llama_cpp` made it.
LLAMA_CPP = {
    "scaled_queries": replace(
        _LLAMA_CPP, name="llama.cpp with scaled queries", scaled_queries=True
    ),
    "flash_attention": replace(
        _LLAMA_CPP, name="llama.cpp with flash attention", weighted_sums="float16"
    ),
}
PROFILES = {
    profile.name: profile
    for profile in (  # what explains with fewer roundings comes first
        RoundingProfile("float32 phases", phases="float32"),
        _SDPA,
        replace(_SDPA, name="transformers", scores=True, softmax_in="float32"),
        _LLAMA_CPP,
        *LLAMA_CPP.values(),
        _XLA,
        replace(_XLA, name="XLA with excess precision", excess_precision=True),
    )
}


# An engine whose ranks add partial sums: "transformers, tensor parallel, 2 ranks, float32 reduce".
PARALLEL = "tensor parallel, "
_PARALLEL = re.compile(rf"(?:(.+), )?{PARALLEL}([1-9]\d{{0,5}}) ranks?, (\w+) reduce")


def profile_named(profile: str | RoundingProfile) -> RoundingProfile:
    """The profile of a name; a ValueError if there is none."""
    if isinstance(profile, RoundingProfile):
        return profile
    if not isinstance(profile, str):
        raise TypeError(
            f"profile: expected a name or a RoundingProfile, got {type(profile).__name__}"
        )
    found = _PARALLEL.fullmatch(profile)
    if found and found[3] in FLOATS and not _PARALLEL.fullmatch(found[1] or ""):
        engine = CONTRACT if found[1] is None else profile_named(found[1])
        return replace(engine, name=profile, ranks=int(found[2]), reduce=found[3])
    if profile not in PROFILES:
        raise ValueError(
            f"profile: expected one of {', '.join(PROFILES)}, or one such as 'tensor parallel, "
            f"2 ranks, bfloat16 reduce', got {profile!r}"
        )
    return PROFILES[profile]


@dataclass(frozen=True)
class Rounding:
    """The formats in which an engine computes, and the roundings that it makes.

    Attributes
    ----------
    dtype : str
        The format of the result.
    accumulate : str
        The format of sums and of everything between the inputs and the result.
    profile : RoundingProfile
        The roundings beside these.
    inputs : str or None
        The format of the narrowest input, where it was recorded; None if there is none.
    """

    dtype: str
    accumulate: str
    profile: RoundingProfile = CONTRACT
    inputs: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        array: Array,
        /,
        *,
        dtype: str | None = None,
        accumulate: str | None = None,
        inputs: str | None = None,
        profile: str | RoundingProfile = CONTRACT,
        **steps: Any,
    ) -> Rounding:
        """Collect the formats and roundings of the computation of an array.

        Parameters
        ----------
        name : str
            The array's name in messages.
        array : Array
            An input, of a float dtype.
        dtype : {"float16", "bfloat16", "float32", "float64"}, optional
            The format of the result; that of `array` if not given.
        accumulate : str, optional
            The format of sums and of everything before the result; float32, or float64 for float64
            arrays, if not given.
        inputs : str, optional
            The format that inputs were rounded to where they were stored, though the engine
            computed from what they were before, in the format of the sums. A format that has all
            digits of those changes nothing.
        profile : str or RoundingProfile, optional
            An engine's further roundings.
        **steps : object
            Fields of the profile that are to be others: ``flushes=True``, ``silu="bfloat16"``. A
            step that is True is rounded to the result's format.

        Returns
        -------
        Rounding
            The formats, all of them known.

        Raises
        ------
        TypeError
            If the array holds no floats, or a profile has no such field.
        ValueError
            If a format or a profile is unknown, or `block` or `ranks` is not a positive integer.
        """
        stored = float_format(name, array)
        fields_of_profiles = {f.name for f in fields(RoundingProfile)} - {"name"}
        if unknown := sorted(steps.keys() - fields_of_profiles):
            raise TypeError(f"{unknown[0]}: no such keyword of a bound or field of a profile")
        formats = {"dtype": dtype, "accumulate": accumulate, "inputs": inputs}
        for argument, value in formats.items():
            if not isinstance(value, str | None):
                raise TypeError(f"{argument}: expected the name of a dtype, got {shown(value)}")
            _check_format(argument, value)
        if inputs is not None:
            steps = {"excess_precision": True, **steps}
        known = replace(profile_named(profile), **steps)
        sums = accumulate or accumulate_format(stored).name
        return cls(dtype or stored.name, sums, known, inputs)

    @property
    def profiles(self) -> tuple[RoundingProfile, ...]:
        """The profiles that an engine with these formats can have, in the order to try them.

        A cache is narrower than the results that it keeps, and no one narrows float64 on purpose;
        nothing is kept in more digits than it was recorded in unless the sums have more. Narrow
        sums and scaled queries excuse too much to be tried.
        """
        digits = 0 if self.dtype == "float64" else self.out.precision
        return tuple(
            profile
            for profile in PROFILES.values()
            if profile not in LLAMA_CPP.values()
            and (profile.kv_cache is None or FLOATS[profile.kv_cache].precision < digits)
            and (self._sums_have_more_digits or not profile.excess_precision)
        )

    @property
    def unrounded_inputs(self) -> str | None:
        """The format of the inputs, if the engine went on with what they were before it."""
        excess = self.profile.excess_precision and self._sums_have_more_digits
        return self.inputs if excess else None

    @property
    def _sums_have_more_digits(self) -> bool:
        """Whether sums have more digits than an input was recorded in."""
        narrowest = FLOATS[self.inputs or self.accumulate]
        return narrowest.precision < FLOATS[self.accumulate].precision

    def inside(self, steps: Collection[str]) -> Rounding:
        """The formats in an operation that has some steps: an engine may write it in fewer bits."""
        forms = (self.step(name) for name in _WRITTEN if name in steps)
        narrow = [f.name for f in forms if f is not None and f.precision < self.sums.precision]
        return replace(self, accumulate=narrow[0]) if narrow else self

    def habits(self, steps: Sequence[str]) -> str:
        """Say which roundings of the profile some steps make here."""
        inside = self.inside(steps)
        steps = [s for s in steps if s not in _WRITTEN or inside is not self]
        return self.profile.habits(steps, self.narrower)

    @property
    def narrower(self) -> str | None:
        """The result's format, if it does not hold what sums are kept in."""
        return None if FLOATS[self.dtype].holds(FLOATS[self.accumulate]) else self.dtype

    @property
    def out(self) -> FloatFormat:
        """The format of the result."""
        return FLOATS[self.dtype]

    @property
    def sums(self) -> FloatFormat:
        """The format of sums."""
        return FLOATS[self.accumulate]

    @property
    def phases(self) -> FloatFormat:
        """The format that phases are computed in."""
        return FLOATS[self.profile.phases or "float64"]

    @property
    def unit(self) -> float:
        """The relative error of one rounding in the sums' format, and of `exact`'s in float64."""
        return self.sums.unit_roundoff + FLOATS["float64"].unit_roundoff

    @property
    def own(self) -> float:
        """The factor by which errors in the sums' format grow, since `exact` errs in float64."""
        return self.unit / self.sums.unit_roundoff

    @property
    def lost(self) -> float:
        """The largest error of an operation whose result is below the smallest normal number."""
        sums = self.sums
        return sums.smallest_normal if self.profile.flushes else sums.smallest_subnormal

    def step(self, name: str) -> FloatFormat | None:
        """The format of the step of that name in the profile, if it is rounded."""
        rounds: bool | str | None = getattr(self.profile, name)
        return FLOATS[self.dtype if rounds is True else rounds] if rounds else None

    @property
    def before(self) -> FloatFormat | None:
        """The format that inputs were rounded to after the engine had read them."""
        form = self.unrounded_inputs
        return None if form is None or FLOATS[form].holds(self.sums) else FLOATS[form]
