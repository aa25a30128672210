"""The compiled product of many tokens: values, order of the sums, edges, what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.compiled_route import compiled_first

pytest.importorskip("numba", reason="needs numba, of the extra fast")

import llama_layers
from llama_layers import linear
from llama_layers.backends.numba.kernels import gemm, processor
from llama_layers.model.embedding import activations
from llama_layers.testing import arrays, assert_same_bits, assert_within_bound
from llama_layers.verify import Bound, linear_bound

BFLOAT16 = ml_dtypes.bfloat16
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": BFLOAT16}
FLOAT32_TINY = 2.0**-126  # the smallest normal number, of bfloat16 too


def kernel(x, weight):
    reason = gemm.problem(x, weight)
    return pytest.param(x, weight, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


FORMATS = [
    kernel("float32", "float32"),
    kernel("float32", "float16"),
    kernel("float32", "bfloat16"),
    kernel("bfloat16", "bfloat16"),
]
every_format = pytest.mark.parametrize(("dtype", "weight_dtype"), FORMATS)
pairs_only = pytest.mark.skipif(
    gemm.problem("bfloat16", "bfloat16") is not None,
    reason=str(gemm.problem("bfloat16", "bfloat16")),
)
# Sizes on both sides of what tiles, vectors, panels and blocks of them hold.
TOKENS = st.integers(1, 30)
ROWS = st.integers(1, 80)
COUNTS = st.integers(1, 40) | st.sampled_from(
    [255, 1100, 2047, 2049, *(gemm.DEPTH + more for more in (-1, 0, 1, 80))]
)


def run(x, weight, bias=None, team=1):
    """All threads' parts, one after another."""
    y = np.full((len(x), len(weight)), 7, x.dtype)
    sync, product = np.zeros(3, np.int64), gemm.product(x, weight, bias, y, team)
    for thread in range(team):
        gemm.multiply(thread, team, sync, product)
    return y


def exact(x, weight, bias):
    """In float64, column after column of x; no order of the sums that BLAS would choose."""
    y = np.zeros((len(x), len(weight)))
    with np.errstate(all="ignore"):
        for k in range(x.shape[1]):
            y += np.multiply.outer(x[:, k].astype(np.float64), weight[:, k].astype(np.float64))
        return y if bias is None else y + bias


def assert_within(y, x, weight, bias):
    """Of the limit alone: sums of equal terms may be rounded in one direction again and again."""
    bound = linear_bound(x, weight, bias, flushes=x.dtype == BFLOAT16)
    assert_within_bound(y, Bound(exact(x, weight, bias), bound.limit, bound.limit))


@st.composite
def problems(draw, dtype, weight_dtype, max_magnitude=1024.0):
    tokens, rows, count = draw(TOKENS), draw(ROWS), draw(COUNTS)
    options = {"max_magnitude": max_magnitude}
    x = draw(arrays((tokens, count), dtype=dtype, **options))
    weight = draw(arrays((rows, count), dtype=weight_dtype, **options))
    return x, weight, draw(st.none() | arrays((rows,), **options))


@every_format
@given(data=st.data(), team=st.integers(1, 4))
def test_within_bound_of_naive_sums(dtype, weight_dtype, data, team):
    x, weight, bias = data.draw(problems(dtype, weight_dtype))
    assert_within(run(x, weight, bias, team), x, weight, bias)


@every_format
@given(data=st.data())
def test_within_bound_at_every_magnitude(dtype, weight_dtype, data):
    """Subnormal numbers among them, and products and sums that overflow or underflow."""
    x, weight, bias = data.draw(problems(dtype, weight_dtype, max_magnitude=np.inf))
    assert_within(run(x, weight, bias), x, weight, bias)


@every_format
@pytest.mark.parametrize(("tokens", "rows", "count"), [(533, 300, 70), (1061, 33, 1030)])
def test_more_tokens_than_pass_a_panel(dtype, weight_dtype, tokens, rows, count, rng):
    x = rng.standard_normal((tokens, count)).astype(DTYPES[dtype])
    weight = rng.standard_normal((rows, count)).astype(DTYPES[weight_dtype])
    bound = linear_bound(x, weight, flushes=dtype == "bfloat16")
    assert_within_bound(run(x, weight, team=2), bound)


@every_format
@given(data=st.data())
def test_nan_and_infinity_stay_in_their_rows_and_columns(dtype, weight_dtype, data):
    x, weight, _ = data.draw(problems(dtype, weight_dtype, max_magnitude=8.0))
    x, weight = (
        np.where(abs(a.astype(np.float64)) < 0.01, 1, a).astype(a.dtype) for a in (x, weight)
    )
    for a in (x, weight):
        place = tuple(data.draw(st.integers(0, size - 1)) for size in a.shape)
        a[place] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 0.0]))
    y, expected = run(x, weight).astype(np.float64), exact(x, weight, None)
    odd = ~np.isfinite(expected)
    np.testing.assert_array_equal(y[odd], expected[odd])
    assert np.isfinite(y[~odd]).all()


@every_format
@given(data=st.data(), team=st.integers(1, 4))
def test_a_token_does_not_depend_on_its_neighbours_or_on_threads(dtype, weight_dtype, data, team):
    x, weight, bias = data.draw(problems(dtype, weight_dtype))
    token, row = (data.draw(st.integers(0, len(a) - 1)) for a in (x, weight))
    y = run(x, weight, bias, team)
    assert_same_bits(y[token : token + 1], run(x[token : token + 1], weight, bias))
    one_bias = None if bias is None else bias[row : row + 1]
    assert_same_bits(y[:, row : row + 1], run(x, weight[row : row + 1], one_bias))


@every_format
def test_memory_in_any_order_and_place(dtype, weight_dtype, rng):
    """Read-only weights at odd addresses with rows that are apart; x by columns or in steps."""
    x = rng.standard_normal((19, 37)).astype(DTYPES[dtype])
    weight = rng.standard_normal((45, 37)).astype(DTYPES[weight_dtype])
    apart = np.zeros((45, 64), weight.dtype)
    apart[:, 3:40] = weight
    apart.flags.writeable = False
    steps = np.zeros((38, 74), x.dtype)
    steps[::2, ::2] = x
    y = run(x, weight)
    assert_same_bits(run(np.asfortranarray(x), apart[:, 3:40]), y)
    assert_same_bits(run(steps[::2, ::2], weight), y)


@every_format
def test_a_thread_writes_its_own_columns_only(dtype, weight_dtype):
    x, weight = np.ones((3, 5), DTYPES[dtype]), np.ones((70, 5), DTYPES[weight_dtype])
    y = np.zeros((3, 70), x.dtype)
    written = np.zeros(70, int)
    sync, product = np.zeros(3, np.int64), gemm.product(x, weight, None, y, 3)
    for thread in range(3):
        y[:] = 0
        gemm.multiply(thread, 3, sync, product)
        np.testing.assert_array_equal(y[1:], y[:-1])
        written += y[0] != 0
    np.testing.assert_array_equal(written, 1)


@every_format
def test_a_thread_waits_for_what_others_pack(dtype, weight_dtype):
    """Another has taken the only part of x and has not finished it."""
    x, weight = np.ones((3, 5), DTYPES[dtype]), np.ones((2, 5), DTYPES[weight_dtype])
    y = np.zeros((3, 2), x.dtype)
    sync, product = np.zeros(3, np.int64), gemm.product(x, weight, None, y, 1)
    sync[0] = 1
    product.packed[:] = product.packed.dtype.type(0x3F803F80 if dtype == "bfloat16" else 1)
    thread = threading.Thread(target=gemm.multiply, args=(0, 1, sync, product))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    np.testing.assert_array_equal(y, 0)
    sync[1] = 1
    thread.join()
    np.testing.assert_array_equal(y, 5)


@pytest.mark.skipif(
    gemm.problem("float32", "float32") is not None, reason=str(gemm.problem("float32", "float32"))
)
def test_numbers_of_a_token_are_adjacent(rng):
    """All arrays of a forward pass in one order: to add two of different ones is slow."""
    x = rng.standard_normal((1, 40, 8)).astype(np.float32)
    with compiled_first():
        y = linear(x, rng.standard_normal((24, 8)).astype(np.float32))
        begun = activations(np, x.astype(np.float16))
    assert y.flags.c_contiguous
    assert begun.flags.c_contiguous


def test_numbers_of_a_token_are_not_adjacent_where_blas_multiplies(rng, monkeypatch):
    monkeypatch.setattr(gemm, "problem", lambda x, weight: "none here")
    x = rng.standard_normal((1, 40, 8)).astype(np.float32)
    with compiled_first():
        y = linear(x, rng.standard_normal((24, 8)).astype(np.float32))
        begun = activations(np, x)
    assert y[0].flags.f_contiguous
    assert begun[0].flags.f_contiguous


@every_format
@pytest.mark.parametrize(("tokens", "rows", "count"), [(0, 3, 2), (3, 0, 2), (3, 40, 0)])
def test_nothing_to_multiply(dtype, weight_dtype, tokens, rows, count):
    x = np.ones((tokens, count), DTYPES[dtype])
    bias = np.arange(rows, dtype=np.float32)
    y = run(x, np.ones((rows, count), DTYPES[weight_dtype]), bias)
    np.testing.assert_array_equal(y.astype(np.float32), np.ones((tokens, 1)) * (bias + count))


GUARDED = """
import ctypes, mmap, sys
import ml_dtypes, numpy as np
from llama_layers.backends.numba.kernels import processor
if "avx2" in sys.argv:  # whatever the processor has beyond it
    missing = processor.missing
    processor.missing = lambda *features: (
        features[0] if features[0].startswith("avx512") else missing(*features)
    )
from llama_layers.backends.numba.kernels import gemm
x_dtype, w_dtype = (np.dtype(getattr(ml_dtypes, n, n)) for n in sys.argv[1:3])
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0):
    sys.exit("mprotect failed")
for rows, count in ((1, 1), (3, 7), (17, 16), (33, 19)):
    size = rows * count * w_dtype.itemsize
    weight = np.frombuffer(memory, w_dtype, rows * count, page - size).reshape(rows, count)
    weight[:] = 1
    y = np.zeros((2, rows), x_dtype)
    x = np.ones((2, count), x_dtype)
    gemm.multiply(0, 1, np.zeros(3, np.int64), gemm.product(x, weight, None, y, 1))
    assert (y == count).all()
print("read nothing else")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page of memory as Linux does")
@every_format
@pytest.mark.parametrize("tiles", ["own", "avx2"])
def test_reads_nothing_beyond_the_weight(dtype, weight_dtype, tiles, tmp_path):
    """The page after it may not be read: to do so ends the process."""
    if tiles == "avx2" and dtype == "bfloat16":
        pytest.skip("AVX2 multiplies no pairs of bfloat16")
    own = {"PYTHONPATH": str(Path(llama_layers.__file__).parents[1])}
    if tiles == "avx2":
        own["NUMBA_CACHE_DIR"] = str(tmp_path)  # its files do not tell the tiles apart
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, dtype, weight_dtype, tiles],
        env=os.environ | own, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "read nothing else\n", (done.returncode, done.stderr)


def one_term_at_a_time(x, weight, bias):
    """Of each pair the second product first, each sum rounded to float32.

    For numbers whose sums float64 holds, so that nothing is rounded twice.
    """
    total = np.zeros((len(x), len(weight)), np.float32)
    for first in range(0, x.shape[1], 2):
        for k in (first + 1, first):
            if k < x.shape[1]:
                term = np.multiply.outer(
                    x[:, k].astype(np.float64), weight[:, k].astype(np.float64)
                )
                total = (total + term).astype(np.float32)
    return (bias + total).astype(BFLOAT16)


@pairs_only
@settings(max_examples=100)
@given(data=st.data(), count=st.integers(1, 12))
def test_pairs_are_summed_as_documented(data, count):
    """Large terms cancel and small ones are lost, if only in that order."""
    numbers = st.sampled_from([0.0, 1.0, -1.0, 2.0**-13, -(2.0**-13), 3 * 2.0**-13])
    x, weight = (
        np.array(data.draw(st.lists(st.lists(numbers, min_size=count, max_size=count),
                                    min_size=3, max_size=3))).astype(BFLOAT16)
        for _ in range(2)
    )  # fmt: skip
    bias = np.array(data.draw(st.lists(numbers, min_size=3, max_size=3)), np.float32)
    np.testing.assert_array_equal(run(x, weight, bias), one_term_at_a_time(x, weight, bias))


@pairs_only
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
@example(bits=[0x3F808000, 0x3F818000, 0x3F808001, 0x7F7F8000, 0x7FFFFFFF, 0xFF800001, 0x80800000])
def test_results_are_rounded_to_bfloat16(bits):
    """To nearest, ties to even, as ml_dtypes rounds; NaN stays NaN."""
    bias = np.array(bits, np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        expected = bias.astype(BFLOAT16).astype(np.float32)
    zeros = np.zeros((1, 1), BFLOAT16), np.zeros((len(bits), 1), BFLOAT16)
    y = run(*zeros, bias).astype(np.float32)
    np.testing.assert_array_equal(y[0], expected)


@pairs_only
def test_what_flushing_makes_of_subnormal_numbers():
    """The documented difference: infinity times a subnormal number is NaN, and not infinite."""
    tiny, normal = BFLOAT16(FLOAT32_TINY / 2), BFLOAT16(FLOAT32_TINY)
    x = np.array([[np.inf], [2.0**100], [0.5]], BFLOAT16)
    y = run(x, np.array([[tiny], [normal]])).astype(np.float64)
    np.testing.assert_array_equal(y, [[np.nan, np.inf], [0, 2.0**-26], [0, 0]])


def test_problems_are_named(monkeypatch):
    assert gemm.problem("float16", "float16") == (
        "no kernel for x of float16 and a weight of float16"
    )
    assert gemm.problem("bfloat16", "float32") is not None

    def numba_has(features):
        codegen = SimpleNamespace(magic_tuple=lambda: ("triple", "cpu", features))
        context = SimpleNamespace(codegen=lambda: codegen)
        monkeypatch.setattr(processor, "cpu_target", SimpleNamespace(target_context=context))

    numba_has("+avx2,+fma,+f16c,+avx512f,+avx512bw,-avx512bf16")
    assert gemm.problem("float32", "bfloat16") is None
    assert gemm.problem("bfloat16", "bfloat16") == (
        "the processor has no avx512bf16, or numba is told not to use it"
    )
    numba_has("+avx2,+fma,-f16c")
    assert gemm.problem("float32", "float32") == (
        "the processor has no f16c, or numba is told not to use it"
    )
