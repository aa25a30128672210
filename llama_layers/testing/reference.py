"""An assertion for test suites: a port computes what the model says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llama_layers.arrays.types import Array
from llama_layers.model.llama import Llama
from llama_layers.testing.assertions import UnusualErrorWarning
from llama_layers.verify.aliases import canonical_arrays
from llama_layers.verify.check import check
from llama_layers.verify.profiles import RoundingProfile
from llama_layers.verify.trace import Trace

Port = Trace | Mapping[str, Array] | Callable[[Any], Trace | Mapping[str, Array]]


def assert_matches_reference(
    port: Port,
    model: Llama,
    /,
    *,
    input_ids: Array | None = None,
    positions: Array | None = None,
    attention_mask: Array | None = None,
    dtype: str | None = None,
    accumulate: str | None = None,
    profile: str | RoundingProfile | None = None,
    allow: str | None = None,
    rope_layout: str | None = None,
) -> None:
    """Assert that a port computed what the model says, but for rounding.

    Parameters
    ----------
    port : mapping of str to Array, Trace, or callable
        The port's activations by name, of any library, as `llama_layers.verify.check` wants them;
        or a function that returns them when it is called with `input_ids`.
    model : Llama
        The model, with the weights that the port computed with.
    input_ids : Array of integers, shape [B, S], optional
        The tokens; a callable needs them, and so does a check of the embedding.
    positions, attention_mask : as for `llama_layers.verify.Trace`, optional
        Where the tokens stand, and which of them are not padding.
    dtype, accumulate, profile, allow, rope_layout : as for `llama_layers.verify.check`, optional
        How the port rounds, and in which order it has the numbers of a head.

    Raises
    ------
    AssertionError
        If a site diverges. The message is the report: the first wrong site, by how much, and the
        mistake that explains it.
    TraceError
        If the arrays cannot be the model's.
    TypeError, ValueError
        If an argument is of a wrong type, or nothing that was recorded could be compared.

    Warns
    -----
    UnusualErrorWarning
        If a site agrees only with an engine's further roundings, and no profile is given.

    Examples
    --------
    >>> from llama_layers import load
    >>> from llama_layers.testing import assert_matches_reference
    >>> def test_my_engine():  # doctest: +SKIP
    ...     ids = np.array([[1, 2, 3]])
    ...     assert_matches_reference(my_engine.activations, load("smollm2-135m"), input_ids=ids)
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    if callable(port):
        if input_ids is None:
            raise TypeError("input_ids: expected tokens to call the port with, got None")
        port = port(input_ids)
    if not isinstance(port, Trace):
        if not isinstance(port, Mapping):
            raise TypeError(
                f"port: expected arrays by name, a Trace, or a function that gives them, "
                f"got {type(port).__name__}"
            )
        port = Trace(canonical_arrays(port, model.config.model_type))
    tokens: dict[str, Any] = {
        "input_ids": input_ids,
        "positions": positions,
        "attention_mask": attention_mask,
    }
    given = {name: array for name, array in tokens.items() if array is not None}
    report = check(
        replace(port, **given),
        model,
        dtype=dtype,
        accumulate=accumulate,
        profile=profile,
        allow=allow,
        rope_layout=rope_layout,
    )
    if report.verdict == "NONE":
        raise ValueError(str(report))
    if not report.agrees:
        raise AssertionError(str(report))
    unnamed = [r for r in report.results if r.verdict == "WARN" and r.profile]
    if unnamed:
        first = unnamed[0]
        warnings.warn(
            f"{len(unnamed)} of {len(report.results)} sites agree only with an engine's further "
            f"roundings. The first is {first.site.name}: {first.note}. If the port does so on "
            "purpose, name the profile.",
            UnusualErrorWarning,
            stacklevel=2,
        )
