"""The compiled products of few tokens: bounds, a fixed order of summation, and what is compiled."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import oracle
from tests.support.compiled_route import compiled_first

pytest.importorskip("numba", reason="needs the extra fast")
pytest.importorskip("threadpoolctl", reason="needs the extra fast")

import llama_layers
from llama_layers.backends.numba import linear as fast_linear
from llama_layers.backends.numba import sizes
from llama_layers.layers.linear import linear_2d as dispatched
from llama_layers.testing import arrays, assert_same_bits, assert_within_bound
from llama_layers.verify import Bound, linear_bound

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def compiled(x, weight, bias=None, team=1):
    """x @ weight.T + bias in a number of threads, by the kernel and nothing else."""
    with (
        mock.patch.object(fast_linear, "num_threads", return_value=team),
        mock.patch.object(fast_linear, "SMALL", 0),
        mock.patch.object(fast_linear, "ONE_THREAD", 0),
        np.errstate(all="ignore"),
    ):
        assert fast_linear.linear_2d.takes(np, x, weight, bias)
        return fast_linear.linear_2d(np, x, weight, bias)


@st.composite
def products(draw):
    """x [M, K], a weight [N, K] that may begin anywhere in memory, a bias [N] or None."""
    kind = draw(st.sampled_from(sorted(DTYPES)))
    tokens = draw(st.integers(1, sizes.MAX_DECODE_TOKENS))
    rows, count = draw(st.integers(sizes.ROWS, 21)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal((tokens, count), dtype=np.float32) * 2.0 ** draw(st.integers(-9, 9))
    place = draw(st.integers(0, 17))
    memory = rng.standard_normal(place + rows * count).astype(DTYPES[kind])
    weight = memory[place:].reshape(rows, count)
    bias = draw(st.none() | arrays((rows,), dtype=kind, max_magnitude=8.0))
    return x.astype(np.float32), weight, bias


@given(products(), st.integers(1, 4))
def test_a_product_is_within_the_bound_of_naive_loops(problem, team):
    x, weight, bias = problem
    bound = linear_bound(x, weight, bias)
    exact = oracle.linear(x, weight, bias)
    assert_within_bound(compiled(x, weight, bias, team), Bound(exact, bound.limit, bound.usual))


@given(products(), st.integers(1, 4), st.data())
def test_a_row_does_not_depend_on_the_others_or_on_threads(problem, team, data):
    x, weight, bias = problem
    token = data.draw(st.integers(0, len(x) - 1))
    whole = compiled(x, weight, bias, team)
    assert_same_bits(whole[token : token + 1], compiled(x[token : token + 1], weight, bias))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row_and_token(dtype, value):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((5, 37), dtype=np.float32), rng.standard_normal((9, 37))
    weight = weight.astype(DTYPES[dtype])
    clean = compiled(x, weight)
    x[3, 36] = value
    weight[8, 2] = value
    y = compiled(x, weight)
    wrong = np.zeros((5, 9), bool)
    wrong[3], wrong[:, 8] = True, True
    assert not np.isfinite(y[wrong]).any()
    assert_same_bits(y[~wrong], clean[~wrong])


def test_sixteen_bit_inputs_are_rounded_once():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 40)).astype(ml_dtypes.bfloat16)
    weight = rng.standard_normal((8, 40)).astype(ml_dtypes.bfloat16)
    y = compiled(x, weight)
    assert y.dtype == x.dtype
    assert_within_bound(y, linear_bound(x, weight))


@pytest.mark.parametrize(
    ("shape", "change"),
    [
        ((17, 8), lambda x, w: (x, w)),
        ((17, 8), lambda x, w: (x.astype(np.float64), w)),
        ((0, 8), lambda x, w: (x, w)),
        ((2, 8), lambda x, w: (x, w[:3])),
        ((2, 8), lambda x, w: (x, np.asfortranarray(w))),
        ((2, 8), lambda x, w: (x.astype(np.float64), w)),
        ((2, 8), lambda x, w: (x.astype(np.float64), w.astype(np.float64))),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_blas(shape, change, monkeypatch):
    monkeypatch.setattr(fast_linear, "SMALL", 0)
    rng = np.random.default_rng(0)
    turned = np.roll(np.eye(8, dtype=np.float32), 1, axis=1)
    x, weight = change(rng.standard_normal(shape, dtype=np.float32), turned)
    with compiled_first():
        y = dispatched(np, x, weight, None)
    assert_same_bits(y, np.roll(x, -1, axis=1)[:, : len(weight)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_many_tokens_and_narrow_weights(x_dtype, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sizes.MAX_DECODE_TOKENS + 1, 40)).astype(DTYPES[x_dtype])
    weight = rng.standard_normal((9, 40)).astype(DTYPES[dtype])
    bias = rng.standard_normal(9).astype(DTYPES[dtype])
    with compiled_first():
        y = dispatched(np, x, weight, bias)
    assert y.dtype == x.dtype
    assert_within_bound(y, linear_bound(x, weight, bias, flushes=True))


def test_small_products_do_not_load_numba():
    code = """
import sys, numpy
from llama_layers import linear
assert (linear(numpy.eye(8, dtype="f4"), 2 * numpy.eye(8, dtype="f4")) == 2 * numpy.eye(8)).all()
assert "llama_layers.backends.numba" in sys.modules
assert "numba" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"LLAMA_LAYERS_FAST": "1"}
    )


def test_kernels_are_compiled_anew_if_any_source_has_changed(tmp_path):
    """Though neither the size nor the time of the file tells: nor may Python keep what it read."""
    from llama_layers.backends.numba.kernels import jit

    package = Path(llama_layers.__file__).parent
    shutil.copytree(
        package, tmp_path / "llama_layers", ignore=shutil.ignore_patterns("*.nb[ci]", "*.pyc")
    )
    source = tmp_path / Path(jit.__file__).relative_to(package.parent).with_name("llvm.py")
    code = """
import ml_dtypes, numpy
from llama_layers.backends.numba.linear import linear_2d
ones = numpy.ones((4, 1), ml_dtypes.bfloat16)
print(linear_2d(numpy, ones[:1].astype("f4"), ones, None)[0, 0])
"""
    environment = os.environ | {
        "LLAMA_LAYERS_FAST": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    found = []
    for shift in (16, 15):
        text, times = source.read_text(), (source.stat().st_atime, source.stat().st_mtime)
        source.write_text(text.replace("[16] * bits", f"[{shift}] * bits"))
        os.utime(source, times)
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True,
            env=environment,
        )  # fmt: skip
        found.append(float(run.stdout))
    assert found[0] == 1
    assert found[1] != 1


def test_exponentials():
    """Within a unit and a half in the last place, over every exponent of a number below zero."""
    from llama_layers.backends.numba.kernels.pointwise import exp

    numbers = -np.arange(0, 0x7F800001, 0x1FFF, dtype=np.uint32).view(np.float32)
    numbers = np.concatenate([numbers, np.linspace(-105, -86, 5000, dtype=np.float32)])
    numbers = np.concatenate([numbers, np.float32([0.0, -0.0, -np.inf])])
    found = np.array([exp(number) for number in numbers])  # numba gives Python's floats back
    assert (found == found.astype(np.float32)).all()
    exact = np.exp(numbers.astype(np.float64))
    assert (abs(found - exact) <= 1.5 * np.spacing(exact.astype(np.float32))).all()
    assert np.isnan(exp(np.float32(np.nan)))


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("swapped", ["x", "weight", "both"])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_bytes_in_the_other_order(tokens, swapped, kind, monkeypatch):
    monkeypatch.setattr(fast_linear, "SMALL", 0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, 24)).astype(np.float32)
    weight = rng.standard_normal((8, 24)).astype(kind)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    if swapped != "weight":
        x = x.astype(x.dtype.newbyteorder())
    if swapped != "x":
        weight = weight.astype(weight.dtype.newbyteorder())
    with compiled_first():
        np.testing.assert_allclose(dispatched(np, x, weight, None), exact, atol=1e-4)


def test_kernels_work_where_nothing_can_be_kept(monkeypatch):
    from llama_layers.backends.numba.kernels import jit

    real = jit.njit

    def njit(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(jit, "njit", njit)

    def double(x):
        return 2 * x

    found = None
    with contextlib.suppress(RuntimeError):
        found = jit.compiled(double)(21)
    assert found == 42
