"""The emulator computes what CUDA C says, and reports what a GPU would not forgive."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.emulator import Emulated, EmulatedError, emulated

pytestmark = emulated

# Each block sums a row: lanes by shuffles, warps through shared memory.
SUM = r"""
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int by = 16; by; by /= 2) x += __shfl_xor_sync(0xffffffff, x, by);
  return x;
}
extern "C" __global__ void __launch_bounds__(128) total(const float* __restrict__ x, float* y,
                                                        int n, float scale) {
  __shared__ float part[4];
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  BARRIER
  if (threadIdx.x == 0) y[blockIdx.x] = scale * (part[0] + part[1] + part[2] + part[3]);
}
"""


def summed(barrier, seed=1):
    x = np.random.default_rng(0).integers(-9, 9, (20, 300)).astype(np.float32)
    y = np.full(20, np.nan, np.float32)
    values = [x.ctypes.data, y.ctypes.data, 300, 0.5]
    Emulated(SUM.replace("BARRIER", barrier)).run("total", (20,), (128,), values, seed=seed)
    return x, y


def test_sum():
    x, y = summed("__syncthreads();")
    np.testing.assert_array_equal(y, x.sum(axis=1) / 2)  # of integers, so exact in any order


def test_missing_barrier():
    _, y = summed("")
    assert np.isnan(y).any()


@pytest.mark.parametrize(
    ("barrier", "message"),
    {
        "if (threadIdx.x < 100) __syncthreads();": "ended, while thread .* waits at __syncthreads",
        "if (threadIdx.x == 3) return; __syncthreads();": "thread 3 ended",
        "if (threadIdx.x < 64)\n__syncthreads(); else\n__syncthreads();": "another __syncthreads",
        "if (threadIdx.x < 7) warp_sum(sum);": "waits for lane .*, which ended|that never come",
        "if (threadIdx.x < 7) warp_sum(sum); __syncthreads();": "waits for lanes 0xffffffff",
        "__shfl_sync(0xff, sum, 0);": "is not in its own mask",
        "part[threadIdx.x] = 0; __syncthreads();": "index .* is beyond its array",
        "*(float4*)(y + 1) = make_float4(0, 0, 0, 0);": "misaligned or null address",
        "*(float*)(nullptr + threadIdx.z) = 0;": "misaligned or null address",
        "if (blockIdx.x == 5) __trap();": "__trap.*block .5, 0, 0.",
    }.items(),
)
def test_what_a_gpu_would_not_forgive(barrier, message):
    with pytest.raises(EmulatedError, match=message):
        summed(barrier.replace("nullptr + threadIdx.z", "(float*)(size_t)threadIdx.z"))


EVERY = r"""
extern "C" __global__ void every(unsigned* y, const int* n) {
  DYNAMIC_SHARED(unsigned, mine);
  const unsigned lane = threadIdx.x;
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  unsigned* out = y + (block * 32 + lane) * 14;
  mine[lane] = lane + 1;
  __syncwarp();
  out[0] = mine[31 - lane];
  out[1] = __shfl_sync(0xffffffff, lane, 5);
  out[2] = __shfl_xor_sync(0xffffffff, lane, 3);
  out[3] = __shfl_down_sync(0xffffffff, lane, 4);
  out[4] = __shfl_up_sync(0xffffffff, lane, 4);
  out[5] = __ballot_sync(0xffffffff, lane % 3 == 0);
  out[6] = __any_sync(0xffffffff, lane == 40) * 2 + __all_sync(0xffffffff, lane < 32);
  out[7] = lane < 16 ? __shfl_sync(0x0000ffff, lane, 2) : __shfl_sync(0xffff0000, lane, 20);
  out[8] = __umulhi(0x80000000u + lane, 6u);
  out[9] = __float_as_uint(__uint_as_float(0x3f800000u + lane) * 2.0f);
  out[10] = blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z;
  out[11] = n ? n[lane] : 77;
  out[12] = __syncthreads_count(lane % 5 == 0);
  out[13] = __syncthreads_or(lane == 9) * 2 + __syncthreads_and(lane < 30);
}
"""


def test_every_intrinsic():
    y = np.zeros((2, 3, 2, 32, 14), np.uint32)  # blocks [z, y, x]
    Emulated(EVERY).run("every", (2, 3, 2), (32,), [y.ctypes.data, 0], shared=128)
    lane = np.arange(32)
    expected = [
        32 - lane,
        np.full(32, 5),
        lane ^ 3,
        np.where(lane + 4 < 32, lane + 4, lane),
        np.where(lane >= 4, lane - 4, lane),
        np.full(32, sum(1 << i for i in range(0, 32, 3))),
        np.full(32, 1),
        np.where(lane < 16, 2, 20),
        (0x80000000 + lane) * 6 >> 32,
        0x40000000 + lane,
        None,
        np.full(32, 77),
        np.full(32, 7),
        np.full(32, 2),
    ]
    for i, numbers in enumerate(expected):
        if numbers is not None:
            np.testing.assert_array_equal(y[..., i], np.broadcast_to(numbers, (2, 3, 2, 32)))
    z, row, x = np.indices((2, 3, 2))
    np.testing.assert_array_equal(y[..., 10], np.repeat((x + 10 * row + 100 * z)[..., None], 32, 3))


def test_orders_depend_on_the_seed():
    order = 'extern "C" __global__ void order(int* y, int* n) { y[atomicAdd(n, 1)] = blockIdx.x; }'
    kernel = Emulated(order)
    seen = set()
    for seed in (0, 1, 0):
        y, n = np.full(50, -1, np.int32), np.zeros(1, np.int32)
        kernel.run("order", (50,), (1,), [y.ctypes.data, n.ctypes.data], seed=seed)
        assert sorted(y) == list(range(50))
        seen.add(tuple(y))
    assert len(seen) == 2


def test_a_name_that_the_c_library_has_too():
    kernel = Emulated('extern "C" __global__ void advance(int* y) { y[threadIdx.x] = 5; }')
    y = np.zeros(2, np.int32)
    kernel.run("advance", (1,), (2,), [y.ctypes.data])
    assert (y == 5).all()


def test_an_address_that_is_none():
    kernel = Emulated('extern "C" __global__ void f(int* y) { y[1 << 30] = 5; }')
    y = np.zeros(2, np.int32)
    for _ in range(2):
        with pytest.raises(EmulatedError, match=r"an access to .*, which is no memory"):
            kernel.run("f", (1,), (2,), [y.ctypes.data])


def test_wrong_arguments():
    kernel = Emulated(SUM.replace("BARRIER", ""))
    assert kernel.kinds == {"total": "PPif"}
    with pytest.raises(TypeError, match="expected 4 arguments, got 1"):
        kernel.run("total", (1,), (32,), [0])
    with pytest.raises(ValueError, match="no GPU has blocks of"):
        kernel.run("total", (1,), (2048,), [0, 0, 1, 1.0])


def test_what_does_not_compile():
    with pytest.raises(EmulatedError, match=r"(?s)does not compile.*nothing_known"):
        Emulated('extern "C" __global__ void f() { nothing_known(); }')
