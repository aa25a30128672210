// RMSNorm, a block a row of x, which its threads keep in registers: x is read once, 2 + 2 bytes a
// number in 16 bits. A few kilobytes a row: what it takes is the time of a launch and of one load, so
// that the weight is asked for before the sum is known.
//
// COUNT: numbers that a thread reads at once; EACH: how often.

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(const Number* __restrict__ x, const Number* __restrict__ weight, Number* y, int columns,
     float eps) {
  __shared__ float of_warps[THREADS / 32];
  const long long row = static_cast<long long>(blockIdx.x) * columns;
  Piece<COUNT> own[EACH], scale[EACH];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = (i * THREADS + threadIdx.x) * COUNT;
    if (at >= columns) break;
    own[i] = read<COUNT>(x + row + at);
    scale[i] = read<COUNT>(weight + at);
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    if ((i * THREADS + threadIdx.x) * COUNT >= columns) break;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) sum = fmaf(wide(own[i].of[j]), wide(own[i].of[j]), sum);
  }
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  float squares = 0;
  for (int i = 0; i < THREADS / 32; ++i) squares += of_warps[i];
  const float root = sqrtf(squares / columns + eps);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = (i * THREADS + threadIdx.x) * COUNT;
    if (at >= columns) break;
    Piece<COUNT> result;
#pragma unroll
    for (int j = 0; j < COUNT; ++j)
      result.of[j] = narrow(wide(own[i].of[j]) / root * wide(scale[i].of[j]));
    *reinterpret_cast<Piece<COUNT>*>(y + row + at) = result;
  }
}
