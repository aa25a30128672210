"""Formats, transfers and the dispatcher."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers.arrays.describe import describe
from llama_layers.arrays.dispatch import portable, routes
from llama_layers.arrays.dtypes import FLOATS, accumulate_format, dtype_name, dtype_of
from llama_layers.arrays.namespaces import library, namespace
from llama_layers.arrays.tracing import is_traced
from llama_layers.arrays.transfer import from_numpy, to_numpy
from llama_layers.layers.linear import linear_2d
from llama_layers.layers.norm import normalise
from llama_layers.testing import arrays, assert_same_bits, assert_within_bound
from llama_layers.verify import linear_bound, rms_norm_bound

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, None) or name) for name in FLOATS}


@pytest.mark.parametrize("name", DTYPES)
def test_formats_are_those_of_ml_dtypes(name):
    kind, info = FLOATS[name], ml_dtypes.finfo(DTYPES[name])
    assert kind.itemsize == DTYPES[name].itemsize
    assert kind.precision == info.nmant + 1
    assert kind.unit_roundoff == float(info.eps) / 2
    assert kind.max == float(info.max)
    assert kind.smallest_normal == float(info.smallest_normal)
    assert kind.smallest_subnormal == float(info.smallest_subnormal)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_a_format_holds_what_casts_back_unchanged(name, other):
    kind = FLOATS[other]
    awkward = [kind.max, kind.smallest_subnormal, 1 + 2 * kind.unit_roundoff, -kind.smallest_normal]
    numbers = np.array(awkward, np.float64).astype(DTYPES[other])
    with np.errstate(all="ignore"):
        back = numbers.astype(DTYPES[name]).astype(DTYPES[other])
    assert FLOATS[name].holds(kind) == (back.tobytes() == numbers.tobytes())


def test_sums_are_kept_in_float32_at_least():
    sums = {name: accumulate_format(kind).name for name, kind in FLOATS.items()}
    assert sums == dict.fromkeys(FLOATS, "float32") | {"float64": "float64"}


@given(data=st.data(), name=st.sampled_from(sorted(DTYPES)))
def test_numpy_arrays_transfer_as_they_are(data, name):
    array = data.draw(arrays((2, 3), dtype=name, max_magnitude=np.inf))
    assert dtype_name(array.dtype) == name
    assert dtype_of(np, name) == array.dtype
    assert to_numpy(array) is from_numpy(array, np) is array


@given(array=arrays((2, 3), max_magnitude=np.inf))
def test_transfers_change_no_bit(backend, array):
    array[0, 0] = np.uint32(0x7FC01234).view(np.float32)  # a NaN that carries a number
    there = from_numpy(array, backend.xp, backend.device)
    assert backend.holds(there)
    assert dtype_name(there.dtype) == "float32"
    assert_same_bits(to_numpy(there), array)


def test_namespace_of_arguments(backend):
    array = backend.array(np.ones(2, np.float32))
    assert library(namespace(x=array, bias=None)) == library(backend.xp)
    assert namespace(x=None) is None


@given(data=st.data())
def test_portable_bodies_hold_the_bound_too(data):
    """The definitions themselves, on NumPy arrays, where a faster body takes their place."""
    x, weight = (data.draw(arrays((3, 8))) for _ in range(2))
    assert_within_bound(linear_2d.__wrapped__(np, x, weight, None), linear_bound(x, weight))
    normed = normalise.__wrapped__(np, x, weight[0], 1e-5)
    assert_within_bound(normed, rms_norm_bound(x, weight[0], eps=1e-5))


def test_bodies_are_asked_in_turn_and_then_the_definition():
    """Those of the arrays' library; each may decline."""

    def named(xp, x):
        return "definition"

    def by(route, number):
        return lambda xp, x: route if x > number else NotImplemented

    chain = {route: {"named": by(route, n)} for n, route in enumerate(("none", "some", "all"))}
    call = portable(named)
    with mock.patch.dict(routes("numpy"), dict(reversed(chain.items()))):
        assert [call(np, x) for x in range(4)] == ["definition", "none", "some", "all"]
        assert call(array_api_strict, 3) == "definition"
    assert call(np, 3) == "definition"


JAX_CONFIG = SimpleNamespace(jax_default_matmul_precision=None)


@pytest.mark.parametrize(
    ("name", "settings", "cupy_tf32", "said"),
    [
        ("array_api_strict", {}, "1", "no"),
        ("cupy", {}, "1", "yes"),
        ("cupy", {}, "0", "no"),
        ("torch", {"get_float32_matmul_precision": lambda: "high"}, "1", "high"),
        ("jax", {"config": JAX_CONFIG}, "1", "default"),
    ],
)
def test_a_record_says_whether_products_are_rounded_to_tf32(
    monkeypatch, name, settings, cupy_tf32, said
):
    """CuPy's documented environment variable concerns no other library."""
    library = ModuleType(name)
    vars(library).update(settings)
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setenv("CUPY_TF32", cupy_tf32)
    assert describe(library, np.zeros(1))["tf32"] == said


def test_other_libraries_arrays_are_not_traced_and_need_no_jax(monkeypatch):
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    for value in (3, np.zeros(2), array_api_strict.zeros(2)):
        assert not is_traced(value)
    assert "jax" not in sys.modules


def test_devices_are_compared_by_what_they_are():
    """A library may give another object for the same device each time."""
    first, second = (array_api_strict.Device("device1") for _ in range(2))
    assert first is not second
    x = array_api_strict.ones((1, 4), device=first)
    assert namespace(x=x, weight=array_api_strict.ones(4, device=second)) is namespace(x=x)
