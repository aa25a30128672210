"""What the stand-in for CuPy has, CuPy has, with the same parameters; it imports without a GPU.

What calls do is not compared: that takes a GPU.
"""

from __future__ import annotations

import inspect
import re

import pytest

from tests.support import cupy_stand_in as stand_in

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.peer

# Of the tests', beside what CuPy has.
OWN = {
    "SEED", "MARGIN", "NAN",
    "Memory.check_margins", "Memory.numbers",
    "Stream.all", "Stream.current", "Stream.eager", "Stream.enqueue", "Stream.run_until",
    "Graph.work", "Graph.launches",
    "PinnedMemoryPointer.mem",
    "RawKernel.kinds", "RawKernel.name",
}  # fmt: skip
CUDA = stand_in.cuda.__dict__.keys() - {"runtime", "compiler"}


NAMESPACE = {"device"}  # which array_api_compat gives the functions of CuPy's


def parameters(function):
    """Names of parameters in order, of Python's functions and of Cython's; [] if nothing says."""
    try:
        found = list(inspect.signature(function).parameters)
    except ValueError:
        found = []
    if found not in ([], ["self"], ["self", "args", "kwargs"]):
        return found
    line = (function.__doc__ or "").strip().partition("\n")[0]
    if (written := re.match(r"[\w.]+\((.*?)\)( ->.*)?$", line)) is None:
        return []
    each = (part.partition("=")[0].split() for part in written[1].split(","))
    return [words[-1].lstrip("*") for words in each if words]


def pairs():
    """Names of functions and classes of the stand-in, and what CuPy has under them."""
    for name in ("asarray", "ascontiguousarray", "asnumpy", "empty"):
        yield name, getattr(stand_in, name), getattr(cupy, name)
    for name in sorted(CUDA):
        yield name, getattr(stand_in.cuda, name), getattr(cupy.cuda, name)
    yield "MemoryPool", stand_in.MemoryPool, type(cupy.get_default_memory_pool())
    for name in ("RawModule", "RawKernel", "ndarray"):
        yield name, getattr(stand_in, name), getattr(cupy, name)
    for name in dir(stand_in.runtime):
        if not name.startswith("_"):
            yield (
                f"runtime.{name}",
                getattr(stand_in.runtime, name),
                getattr(cupy.cuda.runtime, name),
            )


PAIRS = {name: (own, real) for name, own, real in pairs()}


@pytest.mark.parametrize("name", PAIRS)
def test_parameters(name):
    own, real = PAIRS[name]
    members = [(name, own, real)]
    if isinstance(own, type):
        members = [
            (f"{name}.{member}", getattr(own, member), getattr(real, member))
            for member in own.__dict__
            if f"{name}.{member}" not in OWN
            and (member in ("__init__", "__call__") or not member.startswith("_"))
        ]
    for what, ours, theirs in members:
        if callable(ours) and (known := parameters(theirs)) and "kwargs" not in known:
            given = [p for p in parameters(ours) if p not in NAMESPACE]
            assert [p for p in known if p in given] == given, what


def test_what_is_used_of_runtime():
    assert cupy.cuda.runtime.is_hip is False
    assert issubclass(cupy.cuda.compiler.CompileException, Exception)
