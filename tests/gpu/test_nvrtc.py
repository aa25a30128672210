"""Every kernel compiles for the GPUs that we mean, and keeps all it computes with in registers."""

from __future__ import annotations

import nvrtc
import pytest


@pytest.fixture(params=["12", "13"])
def cuda(request):
    if nvrtc.library(request.param) is None:
        pytest.skip(f"needs {nvrtc.PACKAGES[request.param]}, of the extra nvrtc")
    return request.param


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_what_the_assembler_says_is_read(cuda, architecture):
    source = """
    extern "C" __global__ void plain(float* x) { x[threadIdx.x] += 1; }
    extern "C" __global__ void shares(float* x) {
      __shared__ float y[300];
      y[threadIdx.x] = x[threadIdx.x];
      __syncthreads();
      x[threadIdx.x] = y[299 - threadIdx.x];
    }
    extern "C" __global__ void __launch_bounds__(1024) spills(float* x, const int* n) {
      float y[100];
      for (int i = 0; i < 100; ++i) y[i] = x[i * threadIdx.x];
      for (int i = 0; i < *n; ++i) y[n[i]] += y[n[i + 1]];
      for (int i = 0; i < 100; ++i) x[i] = y[i];
    }
    """
    found = nvrtc.compile_kernels(cuda, architecture, source)
    assert sorted(found) == ["plain", "shares", "spills"]
    assert 0 < found["plain"].registers < 32
    assert (found["plain"].local, found["plain"].shared) == (0, 0)
    assert found["shares"].shared == 1200
    assert found["spills"].local >= 400


def test_errors_and_warnings_are_raised(cuda):
    for source in ("__global__ void f() { nothing(); }", "__global__ void f() { int unused; }"):
        with pytest.raises(RuntimeError, match=r"(?s)NVRTC.*(nothing|unused)"):
            nvrtc.compile_kernels(cuda, "sm_90", source)
