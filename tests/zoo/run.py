"""Each mistake and each variant checked: what was found, and whether its name is fair."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

import tests.zoo.mistakes  # noqa: F401  # registers them
from llama_layers.verify import Report, Trace, check
from tests.zoo.models import checked
from tests.zoo.names import judged
from tests.zoo.port import DTYPES
from tests.zoo.registry import MISTAKES, Mistake
from tests.zoo.variants import VARIANTS, Variant

VIEWS = ("float32", "bfloat16", "float16", "layer outputs", "logits")
"""What is recorded: all sites in a format, or in float32 only some."""
# Causes are looked for however long it takes, so that a busy machine finds what others find.
import_module("llama_layers.verify.check").SECONDS = 600.0  # type: ignore[attr-defined]
# An error is beyond rounding if some element is off by more than two last places of its format, or
# by some hundred in float32, where sums of products may lose so much.
_BEYOND = {"float32": 2e-5, "bfloat16": 2 * 2.0**-7, "float16": 2 * 2.0**-10}
# What rounding may add up to through all layers in float32, with room.
_ACCUMULATED = 1e-3
# One of how many mistakes is tried, where that is not all: causes at sites whose inputs were not
# recorded take seconds to look for.
_ONE_OF = {"float16": 4, "layer outputs": 4, "logits": 8}
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Found:
    """What check said of a mistake in one view."""

    mistake: str
    view: str
    expected: str
    first: str
    """The first site that fails; empty if none does."""
    names: tuple[str, ...]
    grade: str
    """"right", "near", "none" or "wrong" for the name; "missed" if no site fails."""
    seconds: float
    place: str = ""

    @property
    def at_right_site(self) -> bool:
        return self.first == self.expected


def arrays_of(mistake: Mistake, dtype: str) -> tuple[Arrays, Arrays, Any]:
    """The arrays of a run without the mistake and of one with it, and the port."""
    right = mistake.setting.port(dtype).run()
    port = mistake.setting.port(dtype)
    mistake.plant(port)
    with np.errstate(all="ignore"):
        wrong = port.run()
    if mistake.dump is not None:
        mistake.dump(wrong)
    return right, wrong, port


def change(right: Arrays, wrong: Arrays, site: str) -> float:
    """The largest relative difference of an element at a site; infinite with NaN or Inf.

    An element below the root mean square counts as large as that.
    """
    a, b = (arrays[site].astype(np.float64) for arrays in (right, wrong))
    far = (np.abs(a - b) / np.maximum(np.abs(a), np.sqrt((a * a).mean()))).max()
    return float(far) if np.isfinite(far) else np.inf


def findings(mistake: Mistake, views: tuple[str, ...] = VIEWS) -> Iterator[Found]:
    """What check says in each view in which the mistake is beyond rounding."""
    made: dict[str, tuple[Arrays, Arrays, Any]] = {}
    for view in views:
        dtype = view if view in DTYPES else "float32"
        if list(MISTAKES).index(mistake.name) % _ONE_OF.get(view, 1):
            continue
        if dtype not in made:
            made[dtype] = arrays_of(mistake, dtype)
        right, wrong, port = made[dtype]
        seen = _seen(view, wrong)
        if view in DTYPES:
            expected = mistake.first
            if change(right, wrong, expected) < _BEYOND[dtype]:
                continue
        else:
            beyond = (site for site in seen if change(right, wrong, site) > _ACCUMULATED)
            expected = next(beyond, "")
            if not expected:
                continue
        start = time.process_time()
        report = check(port.trace(seen, {}), checked(mistake.setting.model, dtype))
        yield _found(mistake, view, expected, report, time.process_time() - start)


def _seen(view: str, arrays: Arrays) -> Arrays:
    if view == "logits":
        return {"lm_head": arrays["lm_head"]}
    if view == "layer outputs":
        names = [name for name in arrays if name.startswith("model.layers.")]
        return {name: arrays[name] for name in names if name.count(".") == 2}
    return arrays


def _found(mistake: Mistake, view: str, expected: str, report: Report, seconds: float) -> Found:
    failing = next((r for r in report.results if r.verdict in ("FAIL", "DIFFERS")), None)
    if failing is None:
        return Found(mistake.name, view, expected, "", (), "missed", seconds)
    names = tuple(cause.name for cause in failing.explanations)
    place = str(getattr(failing, "place", "") or "")
    grade = judged(mistake.name, names)
    return Found(mistake.name, view, expected, failing.site.name, names, grade, seconds, place)


def alarms(variant: Variant) -> list[str]:
    """The sites at which check takes a correct variant for wrong, with the verdicts."""
    port = variant.setting.port(variant.dtype)
    variant.plant(port)
    with np.errstate(all="ignore"):
        arrays = port.run()
    if variant.dumped is not None:
        arrays = {name: a.astype(DTYPES[variant.dumped]) for name, a in arrays.items()}
    trace: Trace = port.trace(arrays, variant.metadata)
    declared = variant.dtype if variant.dumped is not None else None
    model = checked(variant.setting.model, variant.dtype)
    report = check(trace, model, profile=variant.profile, dtype=declared)
    return [f"{r.site.name}: {r.verdict}" for r in report.results
            if r.verdict in ("FAIL", "DIFFERS")]  # fmt: skip


def every(only: str = "") -> tuple[Mistake, ...]:
    """The mistakes whose names hold a text."""
    return tuple(m for name, m in MISTAKES.items() if only in name)


def variants(only: str = "") -> tuple[Variant, ...]:
    """The variants whose names hold a text."""
    return tuple(v for v in VARIANTS if only in v.name)
