"""cuBLAS through ctypes: what is asked of the library, and what comes of views of every layout."""

from __future__ import annotations

import ctypes.util
import itertools
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_layers.backends.cupy import cublas
from llama_layers.errors import BackendError
from llama_layers.testing import assert_within_bound
from llama_layers.verify import linear_bound
from tests.support.fake_cublas import replaced
from tests.support.installed import stand_in_alone

PAIRS = [  # operands, result
    *(("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")),
    *(("float16", "float32"), ("float32", "float32"), ("float64", "float64")),
]
LOAD = cublas._load
LAYOUTS = ("rows", "columns", "padded rows", "padded columns", "column slice", "row slice")
same_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def laid_out(cupy, numbers, layout):
    """An array of the device with the numbers, and their neighbours in memory NaN."""
    rows, columns = numbers.shape[-2:]
    batch = numbers.shape[:-2]
    shape, place, turned = {
        "rows": ((rows, columns), np.s_[:], False),
        "columns": ((columns, rows), np.s_[:], True),
        "padded rows": ((rows, columns + 3), np.s_[..., :columns], False),
        "padded columns": ((columns, rows + 5), np.s_[..., :rows], True),
        "column slice": ((rows, 2 * columns + 1), np.s_[..., columns : 2 * columns], False),
        "row slice": ((rows + 2, columns), np.s_[..., 1 : 1 + rows, :], False),
    }[layout]
    whole = cupy.empty((*batch, *shape), numbers.dtype)
    view = whole[place].swapaxes(-1, -2) if turned else whole[place]
    view[...] = cupy.asarray(numbers)
    return view


def drawn(seed, *shape, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS)
@pytest.mark.parametrize(("of_a", "of_b"), [*itertools.product(LAYOUTS, LAYOUTS)])
def test_products_of_every_layout(cupy, dtype, out_dtype, of_a, of_b):
    for rows, inner, columns in [(3, 5, 4), (1, 7, 2), (4, 1, 3), (2, 6, 1), (1, 1, 1)]:
        a, b = drawn(rows, rows, inner, dtype=dtype), drawn(columns, inner, columns, dtype=dtype)
        out = cupy.empty((rows, columns), out_dtype)
        cublas.matmul(laid_out(cupy, a, of_a), laid_out(cupy, b, of_b), out)
        assert_within_bound(out.get(), linear_bound(a, b.T, dtype=out_dtype))


@stand_in_alone
@pytest.mark.parametrize("of_out", ["rows", "padded rows", "column slice", "row slice"])
def test_results_leave_their_neighbours_alone(cupy, of_out):
    a, b = drawn(1, 3, 5), drawn(2, 5, 4)
    out = laid_out(cupy, np.zeros((3, 4)), of_out)
    cublas.matmul(cupy.asarray(a), cupy.asarray(b), out)
    np.testing.assert_allclose(out.get(), a @ b, rtol=1e-14)
    whole = out._memory.numbers((out._memory.size // 8,), np.float64)
    cupy.Device().synchronize()
    assert np.isfinite(whole).sum() == 12


@stand_in_alone
def test_one_row_without_a_stride_of_its_own(cupy):
    a, b = drawn(1, 5), drawn(2, 5, 4)
    out = cupy.empty(4, np.float64)
    row = cupy.asarray(a)[None]
    assert row.strides[0] == 0
    cublas.matmul(row, cupy.asarray(b), out[None])
    np.testing.assert_allclose(out.get(), a @ b, rtol=1e-14)


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 5, 6, 5))),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    pair=st.sampled_from(PAIRS),
)
@same_fixture
def test_batches(cupy, seed, sizes, layouts, pair):
    batch, rows, inner, columns = sizes
    a = drawn(seed, batch, rows, inner, dtype=pair[0])
    b = drawn(seed + 1, batch, inner, columns, dtype=pair[0])
    out = cupy.empty((batch, rows, columns), pair[1])
    cublas.matmul(laid_out(cupy, a, layouts[0]), laid_out(cupy, b, layouts[1]), out)
    for i in range(batch):
        assert_within_bound(out.get()[i], linear_bound(a[i], b[i].T, dtype=pair[1]))


@stand_in_alone
def test_one_operand_for_a_whole_batch(cupy):
    a, b = drawn(1, 3, 2, 5), drawn(2, 5, 4)
    out = cupy.empty((3, 2, 4), np.float64)
    shared = cupy.asarray(b)
    repeated = shared[None]
    repeated._numbers = np.broadcast_to(shared._numbers, (3, 5, 4))  # CuPy's broadcast_to
    cublas.matmul(cupy.asarray(a), repeated, out)
    np.testing.assert_allclose(out.get(), a @ b, rtol=1e-14)


def test_heads_of_a_cache_as_they_lie(cupy):
    """Keys [T, heads, D] of the first tokens of a cache: stride and leading dimension change
    places."""
    cache = cupy.asarray(drawn(1, 9, 2, 4))
    keys = cache[:6].transpose(1, 2, 0)
    q = drawn(2, 2, 3, 4)
    out = cupy.empty((2, 3, 6), np.float64)
    cublas.matmul(cupy.asarray(q), keys, out)
    np.testing.assert_allclose(out.get(), q @ keys.get(), rtol=1e-14)


@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS)
def test_alpha_and_beta(cupy, dtype, out_dtype):
    a, b = np.array([[1.0, 2.0]], dtype), np.array([[3.0], [4.0]], dtype)
    out = cupy.asarray(np.array([[10.0]], out_dtype))
    cublas.matmul(cupy.asarray(a), cupy.asarray(b), out, alpha=0.5, beta=2.0)
    assert out.get().item() == 25.5
    cublas.matmul(cupy.asarray(a), cupy.asarray(b), out, alpha=-1.0)
    assert out.get().item() == -11.0


def test_alpha_is_applied_to_sums(cupy):
    """Products that overflow float32 do so before they are scaled."""
    huge = cupy.asarray(np.full((1, 1), 1e20, np.float32))
    out = cupy.empty((1, 1), np.float32)
    cublas.matmul(huge, huge, out, alpha=1e-10)
    assert out.get().item() == np.inf


def test_sums_of_16_bits_that_cancel(cupy):
    """Halves of a sum that are rounded to 16 bits before they are added lose the small terms."""
    for dtype in ("bfloat16", "float16"):
        a = np.ones((1, 512), dtype)
        a[0, :256], a[0, 256:], a[0, 7] = 64, -64, 65
        b = np.ones((512, 1), dtype)
        out = cupy.empty((1, 1), dtype)
        cublas.matmul(cupy.asarray(a), cupy.asarray(b), out)
        assert out.get().item() == 1


@stand_in_alone
@pytest.mark.parametrize(("setting", "close"), [(None, True), ("0", True), ("1", False)])
def test_tf32_only_where_the_environment_asks_for_it(cupy, monkeypatch, setting, close):
    if setting is None:
        monkeypatch.delenv("CUPY_TF32", raising=False)
    else:
        monkeypatch.setenv("CUPY_TF32", setting)
    x, w = drawn(1, 2, 3, dtype="float32"), drawn(2, 3, 4, dtype="float32")
    out = cupy.empty((2, 4), np.float32)
    cublas.matmul(cupy.asarray(x), cupy.asarray(w), out)
    assert (linear_bound(x, w.T).ratio(out.get()) <= 1).all() == close


def product(cupy, dtype="float32"):
    a = cupy.asarray(np.ones((2, 2), dtype))
    out = cupy.empty((2, 2), dtype)
    cublas.matmul(a, a, out)
    return out


@stand_in_alone
def test_each_stream_has_a_handle_and_a_workspace_set_after_it(cupy, library):
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    for _ in range(2):
        for stream in streams:
            with stream:
                product(cupy)
        product(cupy)
    assert len(library.named("cublasCreate_v2")) == 3
    used = [arguments[0] for arguments in library.named("cublasGemmEx")]
    assert len(set(used)) == 3
    assert used[:3] == used[3:]
    contexts = [library.contexts[handle] for handle in used[:3]]
    assert [context.stream for context in contexts] == [streams[0].ptr, streams[1].ptr, 0]
    workspaces = [context.workspace for context in contexts]
    assert None not in workspaces
    assert [size for _, size in workspaces] == [32 << 20] * 3
    assert len({address for address, _ in workspaces}) == 3


@stand_in_alone
def test_threads_share_a_stream_but_not_the_one_of_each_thread(cupy, library, monkeypatch):
    def from_two_threads():
        for _ in range(2):
            thread = threading.Thread(target=product, args=(cupy,))
            thread.start()
            thread.join()

    from_two_threads()
    assert len(library.named("cublasCreate_v2")) == 1
    per_thread = cupy.cuda.Stream(non_blocking=True)
    per_thread.ptr = 2
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: per_thread)
    monkeypatch.setattr(threading, "get_ident", itertools.count().__next__)
    product(cupy)
    product(cupy)
    assert len(library.named("cublasCreate_v2")) == 3


def test_captured_and_replayed(cupy):
    stream = cupy.cuda.Stream(non_blocking=True)
    a, b = (cupy.asarray(drawn(seed, 3, 3)) for seed in (1, 2))
    out = cupy.empty((3, 3), np.float64)
    with stream:
        cublas._handle()
        stream.begin_capture()
        cublas.matmul(a, b, out, alpha=2.0)
        cublas.matmul(out, b, out[:, :], beta=1.0)
        graph = stream.end_capture()
    for seed in (3, 4):
        numbers = drawn(seed, 3, 3)
        a.set(numbers)
        cupy.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        twice = 2 * numbers @ b.get()
        np.testing.assert_allclose(out.get(), twice @ b.get() + twice, rtol=1e-12)


@stand_in_alone
def test_no_handle_in_a_capture(cupy):
    stream = cupy.cuda.Stream(non_blocking=True)
    a, out = cupy.asarray(np.ones((2, 2))), cupy.empty((2, 2), np.float64)
    with stream:
        stream.begin_capture()
        with pytest.raises(BackendError, match=r"in a capture; multiply once before"):
            cublas.matmul(a, a, out)
        stream.end_capture()


@stand_in_alone
@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        ("cublasCreate_v2", 1, "cublasCreate: CUBLAS_STATUS_NOT_INITIALIZED"),
        ("cublasSetStream_v2", 14, "cublasSetStream: CUBLAS_STATUS_INTERNAL_ERROR"),
        ("cublasSetWorkspace_v2", 7, "cublasSetWorkspace: CUBLAS_STATUS_INVALID_VALUE"),
        ("cublasSetMathMode", 15, "cublasSetMathMode: CUBLAS_STATUS_NOT_SUPPORTED"),
        ("cublasGemmEx", 13, "cublasGemmEx: CUBLAS_STATUS_EXECUTION_FAILED"),
    ],
)
def test_failures_are_named_and_leave_no_handle(cupy, library, function, status, message):
    library.fail[function] = status
    with pytest.raises(BackendError, match=f"^{message}$"):
        product(cupy)
    assert len(library.contexts) == (function == "cublasGemmEx")
    del library.fail[function]
    np.testing.assert_array_equal(product(cupy).get(), [[2, 2], [2, 2]])


@stand_in_alone
def test_a_failure_of_a_batch_is_named(cupy, library):
    library.fail["cublasGemmStridedBatchedEx"] = 3
    a, out = cupy.asarray(np.ones((2, 2, 2))), cupy.empty((2, 2, 2), np.float64)
    with pytest.raises(BackendError, match="BatchedEx: CUBLAS_STATUS_ALLOC_FAILED"):
        cublas.matmul(a, a, out)


@pytest.mark.parametrize(
    ("a", "b", "out", "error", "message"),
    [
        (((2, 3), "f4"), ((4, 5), "f4"), ((2, 5), "f4"), ValueError, r"shape \[3, 5\], got \[4, 5"),
        (((2, 3), "f4"), ((3, 5), "f4"), ((5, 2), "f4"), ValueError, r"shape \[2, 5\], got \[5, 2"),
        (((2, 2, 3), "f4"), ((3, 3, 5), "f4"), ((2, 2, 5), "f4"), ValueError, r"\[2, 3, 5\], got"),
        (
            ((2, 3), "f4"),
            ((3, 5), "f8"),
            ((2, 5), "f4"),
            TypeError,
            "float32 and float64 in",
        ),
        (
            ((2, 3), "f4"),
            ((3, 5), "f4"),
            ((2, 5), "f2"),
            TypeError,
            "float32 in float16",
        ),
        (
            ((2, 3), "f8"),
            ((3, 5), "f8"),
            ((2, 5), "f4"),
            TypeError,
            "float64 in float32",
        ),
    ],
)
def test_refuses(cupy, a, b, out, error, message):
    arrays = [cupy.empty(shape, dtype) for shape, dtype in (a, b, out)]
    with pytest.raises(error, match=message):
        cublas.matmul(*arrays)


def test_refuses_other_layouts(cupy):
    a, out = cupy.asarray(np.ones((4, 4))), cupy.empty((4, 4), np.float64)
    with pytest.raises(ValueError, match="out: expected the numbers of a row"):
        cublas.matmul(a, a, out.T)
    for view in (a[:, ::2], a[::-1], a[:, ::-1]):
        with pytest.raises(ValueError, match="a: expected a matrix with a leading"):
            cublas.matmul(view, a[: view.shape[1]], out[: len(view)])
        cublas.matmul(cublas.readable(view), a[: view.shape[1]], out[: len(view)])
        np.testing.assert_array_equal(out[: len(view)].get(), view.shape[1])
    assert cublas.readable(a.T) is not a
    assert cublas.readable(a) is a


def test_finds_the_library_as_cupy_does(monkeypatch):
    """Any library stands in for it: the C library is loaded by the path that pathfinder names."""
    asked = []
    path = ctypes.util.find_library("c")
    finder = SimpleNamespace(
        load_nvidia_dynamic_lib=lambda name: asked.append(name) or SimpleNamespace(abs_path=path)
    )
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", finder)
    assert LOAD()._name == path
    assert asked == ["cublas"]


@stand_in_alone
def test_no_library(cupy):
    assert cublas.available()
    with replaced(found=False):
        assert not cublas.available()
    assert cublas.available()
