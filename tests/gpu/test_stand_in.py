"""The stand-in for CuPy computes as NumPy does, and fails where a GPU would fail or go wrong."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from llama_layers.backends.cupy import compile as kernels
from tests.support import cupy_stand_in as stand_in
from tests.support.emulator import EmulatedError, emulated
from tests.support.installed import stand_in_alone

pytestmark = emulated

SCALE = r"""
extern "C" __global__ void scale(const float* x, float* y, float by) {
  y[threadIdx.x] = by * x[threadIdx.x];
}
"""


@pytest.fixture
def scale(cupy, tmp_path, monkeypatch):
    """A function that multiplies two numbers by another into an array, by `launch`."""
    (tmp_path / "common.cuh").write_text("")
    (tmp_path / "scale.cu").write_text(SCALE)
    monkeypatch.setattr(kernels, "KERNELS", tmp_path)

    def call(x, y, by, threads=2):
        kernels.launch("scale", "scale", (1,), (threads,), (x, y, by))

    return call


@stand_in_alone
def test_the_two_kinds_of_arrays_do_not_mix(cupy):
    x = cupy.asarray(np.ones(3))
    for mix in (lambda: np.asarray(x), lambda: x + np.ones(3), lambda: np.ones(3) + x,
                lambda: cupy.exp(np.ones(3)), lambda: x.__setitem__(0, np.ones(1))):  # fmt: skip
        with pytest.raises(TypeError):
            mix()


@stand_in_alone
def test_new_memory_is_nan(cupy):
    assert np.isnan(cupy.empty((3, 2), np.float32).get()).all()


@stand_in_alone
def test_a_kernel(cupy, scale):
    x, y = cupy.asarray(np.array([3, 4], np.float32)), cupy.empty(2, np.float32)
    scale(x, y, np.float32(2))
    np.testing.assert_array_equal(y.get(), [6, 8])


@stand_in_alone
def test_a_kernel_gets_what_it_reads(cupy, scale):
    x = cupy.asarray(np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match=r"C-contiguous.* \[2\] with strides \[8\]"):
        scale(x[:, 0], x[0], np.float32(2))
    for number in (2, 2.0, np.float64(2), np.int32(2)):
        with pytest.raises((AssertionError, AttributeError)):
            scale(x, x, number)


@stand_in_alone
def test_a_kernel_beyond_an_array(cupy, scale):
    y = cupy.empty(2, np.float32)
    scale(cupy.asarray(np.ones(3, np.float32)), y, np.float32(2), threads=3)
    with pytest.raises(EmulatedError, match="beyond an array"):
        y.get()


@stand_in_alone
def test_work_runs_when_somebody_waits(cupy, scale):
    stream = cupy.cuda.Stream(non_blocking=True)
    x, y = cupy.asarray(np.ones(2, np.float32)), cupy.asarray(np.zeros(2, np.float32))
    with stream:
        scale(x, y, np.float32(2))
        event = stream.record()
    assert (y.get() == 0).all()  # the null stream does not wait for this one
    assert not event.done
    cupy.cuda.get_current_stream().wait_event(event)
    assert (y.get() == 2).all()
    host = np.zeros(2, np.float32)
    with stream:
        y.get(out=host, blocking=False)
    assert (host == 0).all()
    stream.synchronize()
    assert (host == 2).all()


@stand_in_alone
def test_a_blocking_stream_and_the_null_stream_wait_for_each_other(cupy, scale):
    stream = cupy.cuda.Stream()
    x, y = cupy.asarray(np.ones(2, np.float32)), cupy.empty(2, np.float32)
    with stream:
        scale(x, y, np.float32(2))
    assert (y.get() == 2).all()


@stand_in_alone
def test_a_graph(cupy, scale):
    stream = cupy.cuda.Stream(non_blocking=True)
    x = cupy.asarray(np.ones(2, np.float32))
    y = cupy.asarray(np.zeros(2, np.float32))
    with stream:
        stream.begin_capture()
        scale(x, x, np.float32(2))
        scale(x, y, np.float32(10))
        graph = stream.end_capture()
        stream.synchronize()
        assert (y.get() == 0).all()
        for expected in (20, 40, 80):
            graph.launch()
            assert (y.get() == expected).all()


@stand_in_alone
@pytest.mark.parametrize(
    "work",
    [
        lambda cupy, x: cupy.empty(2),
        lambda cupy, x: x + x,
        lambda cupy, x: x.get(),
        lambda cupy, x: x.set(np.zeros(2, np.float32)),
        lambda cupy, x: cupy.asarray(np.zeros(2)),
        lambda cupy, x: x.__setitem__(0, 1),
        lambda cupy, x: bool(x[0]),
        lambda cupy, x: cupy.cuda.get_current_stream().synchronize(),
    ],
)
def test_what_cannot_be_captured(cupy, work):
    x = cupy.asarray(np.ones(2, np.float32))
    with (stream := cupy.cuda.Stream(non_blocking=True)):
        stream.begin_capture()
        try:
            with pytest.raises(EmulatedError, match="while a stream captures"):
                work(cupy, x)
        finally:
            stream.end_capture()


@stand_in_alone
def test_a_graph_of_freed_memory(cupy, scale):
    x, y = cupy.asarray(np.ones(2, np.float32)), cupy.empty(2, np.float32)
    with (stream := cupy.cuda.Stream(non_blocking=True)):
        stream.begin_capture()
        scale(x, y, np.float32(2))
        graph = stream.end_capture()
        del x
        graph.launch()
        with pytest.raises(EmulatedError, match="an array of this graph was freed"):
            stream.synchronize()


def test_the_library_is_the_real_one_again():
    assert stand_in is not sys.modules.get("cupy")
