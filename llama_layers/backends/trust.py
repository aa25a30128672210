"""Whether a body may serve on this machine: only one that was seen to be right.

The first time that a body is to serve, it is held to the bound of its definition, on small inputs,
and the verdict is remembered for this machine. ``LLAMA_LAYERS_VERIFY=0`` in the environment trusts
all of them unseen.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from llama_layers.arrays import dispatch
from llama_layers.arrays.dispatch import Offer
from llama_layers.arrays.switches import switched_off
from llama_layers.backends import machine
from llama_layers.backends.verdicts import Verdict, Verdicts
from llama_layers.errors import BackendError, one_line

# What says something of the caller's memory or settings, and nothing of a body.
OF_THE_CALLER = (MemoryError, FloatingPointError, Warning)

_PACKAGE = Path(__file__).parents[1]
_lock = threading.RLock()


def _renew() -> None:
    """A forked child has no thread that would ever give the lock back."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def trusted(offer: Offer) -> bool:
    """Whether a body may serve; found out once in a process, and if need be by trying it."""
    with _lock:
        if (known := dispatch.settled.get(offer.body)) is not None:
            return known
        verdict = None if _unwatched(offer) else _found(offer)
        use = dispatch.settled[offer.body] = verdict is None or verdict.passed
        if verdict is not None and not use:
            _warn(offer, str(verdict.problem))
        return use


def bypassed(offer: Offer, error: Exception) -> bool:
    """Whether the next body serves after an error of this one, from now on."""
    if _unwatched(offer) or isinstance(error, OF_THE_CALLER):
        return False
    with _lock:
        if dispatch.settled.get(offer.body):
            dispatch.settled[offer.body] = False
            _warn(offer, said(error))
    return True


def said(error: BaseException) -> str:
    """An error as the reason of a verdict."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return one_line(f"{type(error).__name__}: {first}" if first else type(error).__name__)


def _unwatched(offer: Offer) -> bool:
    """jax has no other body, and no definition, that could serve its arrays."""
    return switched_off("LLAMA_LAYERS_VERIFY") is not None or offer.library == "jax"


def _found(offer: Offer) -> Verdict:
    verdicts = _verdicts(offer.library)
    ours = _is_ours(offer)
    verdict = verdicts.get(offer) if ours else None
    if verdict is None:
        if offer.library == "cupy" and machine.captures():
            raise BackendError(
                f"{offer} was not tried on this GPU yet, and cannot be while a stream captures: "
                "run it once before"
            )
        _announce(offer)
        verdict, lasts = tried(offer)
        if lasts and ours:
            verdicts.put(offer, verdict)
    return verdict


def tried(offer: Offer) -> tuple[Verdict, bool]:
    """The verdict on a body, and whether it would be the same another time."""
    checks: Any = importlib.import_module("llama_layers.verify.bodies")
    try:
        verdict: Verdict = checks.verdict_on(offer)
    except Exception as error:  # a kernel that does not compile raises what its compiler has
        return Verdict(None, said(error)), not isinstance(error, MemoryError | OSError)
    return verdict, True


def remember(offer: Offer, verdict: Verdict) -> None:
    """Take a verdict that was found anew for the one of this machine."""
    with _lock:
        if _is_ours(offer):
            _verdicts(offer.library).put(offer, verdict)
        dispatch.settled[offer.body] = verdict.passed


def _is_ours(offer: Offer) -> bool:
    """Whether a body is of our sources, on which verdicts depend, and not put in by a caller."""
    code = getattr(offer.body, "__code__", None)
    return code is not None and Path(code.co_filename).is_relative_to(_PACKAGE)


@cache
def _verdicts(library: str) -> Verdicts:
    """What is remembered, read once in a process."""
    return Verdicts(library)


def _announce(offer: Offer) -> None:
    """Say what takes long, where somebody may be looking on."""
    slow = offer.route not in ("NumPy", "CuPy")
    if slow and (sys.stderr.isatty() or "ipykernel" in sys.modules):
        print(f"llama_layers: trying {offer} on this machine, once ...", file=sys.stderr)


def _warn(offer: Offer, problem: str) -> None:
    warnings.warn(
        f"{offer} is not used on {machine.short(offer.library)}: {problem}. Slower code serves; "
        "`llama-layers info --verify` tries again.",
        RuntimeWarning,
        stacklevel=2,
    )
