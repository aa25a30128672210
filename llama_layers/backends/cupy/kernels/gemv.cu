// Products of a few rows x [TOKENS, K] with a weight [N, K] as it lies: y = x W^T. Of all bytes those
// of the weight count, N x K numbers, each read once; x, which every warp reads, stays in the caches.
// A warp has ROWS rows of the weight, and of these 8 loads of 16 bytes a lane under way: 128 bytes a
// thread, with the 512 threads and more that a multiprocessor holds 64 KiB and more.
//
// A sum is added up in one order whatever TOKENS, ROWS and the grid are: each lane its numbers from
// left to right, then the lanes in pairs. So a row of y does not depend on what else is in the batch.
//
// FORMAT as in common.cuh; COUNT: numbers that a lane reads at once; FLOATS: y is float32. With ROWS
// more rows of x share a load and a widening of x, which is what counts beside the weight's bytes
// when there are many tokens: ROWS numbers of the weight cost TOKENS x (ROWS + 1) + ROWS operations.

#define WARPS 4
constexpr int PART = TOKENS > 4 && COUNT > 4 ? 4 : COUNT;  // widened at a time: registers are short

#if FLOATS
typedef float Result;
__device__ __forceinline__ float widened(Result x) { return x; }
__device__ __forceinline__ Result rounded(float x) { return x; }
#else
typedef Number Result;
__device__ __forceinline__ float widened(Result x) { return wide(x); }
__device__ __forceinline__ Result rounded(float x) { return narrow(x); }
#endif

// The products of this warp's rows of a weight with all rows of x, in each lane.
template <int R>
__device__ __forceinline__ void multiply(const Number* __restrict__ x,
                                         const Number* const (&rows)[R], int columns,
                                         float (&sums)[R][TOKENS]) {
  constexpr int LOADS = 8 / R;  // of a row, at a time
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int m = 0; m < TOKENS; ++m) sums[r][m] = 0;
  for (int first = threadIdx.x % 32 * COUNT; first < columns; first += 32 * COUNT * LOADS) {
    Piece<COUNT> pieces[LOADS][R];
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (first + i * 32 * COUNT < columns)
          pieces[i][r] = read_once<COUNT>(rows[r] + first + i * 32 * COUNT);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int at = first + i * 32 * COUNT;
      if (at >= columns) break;
#pragma unroll
      for (int part = 0; part < COUNT; part += PART)
#pragma unroll
        for (int m = 0; m < TOKENS; ++m) {
          const Piece<PART> own = read<PART>(x + (m * columns + at + part));
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int j = 0; j < PART; ++j)
              sums[r][m] = fmaf(wide(own.of[j]), wide(pieces[i][r].of[part + j]), sums[r][m]);
        }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int m = 0; m < TOKENS; ++m) sums[r][m] = sum_of_warp(sums[r][m]);
}

// y = x W^T + bias + residual, each of the last two or neither; residual may be y itself. A row of W
// that is not there is taken for the last one, and its sums go nowhere.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)
gemv(const Number* __restrict__ x, const Number* __restrict__ weight, const Number* bias,
     const Result* residual, Result* y, int outputs, int columns) {
  const int first = (blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
  const Number* rows[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
    rows[r] = weight + static_cast<long long>(min(first + r, outputs - 1)) * columns;
  float sums[ROWS][TOKENS];
  multiply(x, rows, columns, sums);
  if (threadIdx.x % 32) return;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (first + r >= outputs) break;
#pragma unroll
    for (int m = 0; m < TOKENS; ++m) {
      const long long at = static_cast<long long>(m) * outputs + first + r;
      float sum = sums[r][m];
      if (bias) sum += wide(bias[first + r]);
      if (residual) sum += widened(residual[at]);
      y[at] = rounded(sum);
    }
  }
}

// y = silu(x Wg^T + bg) * (x Wu^T + bu), nothing rounded in between: a warp's rows are of both
// weights by turns, so that x is read once for both.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)
gemv_swiglu(const Number* __restrict__ x, const Number* __restrict__ gate,
            const Number* __restrict__ up, const Number* gate_bias, const Number* up_bias,
            Number* y, int outputs, int columns) {
  constexpr int R = ROWS < 2 ? 2 : ROWS;
  const int first = (blockIdx.x * WARPS + threadIdx.x / 32) * (R / 2);
  const Number* rows[R];
#pragma unroll
  for (int r = 0; r < R; ++r)
    rows[r] = (r % 2 ? up : gate) + static_cast<long long>(min(first + r / 2, outputs - 1)) * columns;
  float sums[R][TOKENS];
  multiply(x, rows, columns, sums);
  if (threadIdx.x % 32) return;
#pragma unroll
  for (int r = 0; r < R; r += 2) {
    const int output = first + r / 2;
    if (output >= outputs) break;
#pragma unroll
    for (int m = 0; m < TOKENS; ++m) {
      float g = sums[r][m], u = sums[r + 1][m];
      if (gate_bias) g += wide(gate_bias[output]);
      if (up_bias) u += wide(up_bias[output]);
      // e^-|g| never overflows; for a negative gate 1 / (1 + e^-g) is e^g / (1 + e^g).
      const float decay = expf(-fabsf(g));
      y[static_cast<long long>(m) * outputs + output] =
          narrow(g * ((g >= 0 ? 1 : decay) / (1 + decay)) * u);
    }
  }
}
