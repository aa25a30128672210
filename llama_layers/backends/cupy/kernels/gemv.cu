// Products of a few rows x [TOKENS, K] with a weight [N, K] as it lies: y = x W^T. Of all bytes those
// of the weight count, N x K numbers, each read once; x, which every warp reads, stays in the caches.
// A warp has ROWS rows of the weight, and asks for the next 4 loads of 16 bytes a lane before it
// multiplies those that came: 64 bytes a thread are always under way, with the 512 threads and more
// that a multiprocessor holds 32 KiB and more.
//
// A sum is added up in one order whatever TOKENS, ROWS and the grid are: each lane its numbers from
// left to right, then the lanes in pairs. So a row of y does not depend on what else is in the batch.
//
// FORMAT as in common.cuh; COUNT: numbers that a lane reads at once; FLOATS: y is float32. With ROWS
// more rows of x share a load and a widening of x, which is what counts beside the weight's bytes
// when there are many tokens: ROWS numbers of the weight cost TOKENS x (ROWS + 1) + ROWS operations.

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

template <int R> __device__ constexpr int loads() { return 4 / R; }  // of a row at a time

// A lane's part of its warp's rows from number `first` on.
template <int R>
__device__ __forceinline__ void read_rows(const Number* const (&rows)[R], int first, int columns,
                                          Piece<COUNT> (&pieces)[loads<R>()][R]) {
#pragma unroll
  for (int i = 0; i < loads<R>(); ++i)
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (first + i * 32 * COUNT < columns)
        pieces[i][r] = read_once<COUNT>(rows[r] + first + i * 32 * COUNT);
}

// Adds their products with x. WHOLE: rows do not end before the pieces do, so that there are no
// branches, and all of x is asked for before the first of it is used.
template <int R, bool WHOLE>
__device__ __forceinline__ void add_products(const Number* __restrict__ x, int first, int columns,
                                             const Piece<COUNT> (&pieces)[loads<R>()][R],
                                             float (&sums)[R][TOKENS]) {
#pragma unroll
  for (int i = 0; i < loads<R>(); ++i) {
    const int at = first + i * 32 * COUNT;
    if (!WHOLE && at >= columns) break;
#pragma unroll
    for (int part = 0; part < COUNT; part += PART) {
      float weights[R][PART];
#pragma unroll
      for (int r = 0; r < R; ++r) widen(pieces[i][r], part, weights[r]);
#pragma unroll
      for (int m = 0; m < TOKENS; ++m) {
        float own[PART];
        widen(read<PART>(x + (m * columns + at + part)), 0, own);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int j = 0; j < PART; ++j) sums[r][m] = fmaf(own[j], weights[r][j], sums[r][m]);
      }
    }
  }
}

// The products of this warp's rows of a weight with all rows of x, in each lane.
template <int R>
__device__ __forceinline__ void multiply(const Number* __restrict__ x,
                                         const Number* const (&rows)[R], int columns,
                                         float (&sums)[R][TOKENS]) {
  constexpr int STEP = 32 * COUNT * loads<R>();
  const int lane = threadIdx.x % 32 * COUNT;
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int m = 0; m < TOKENS; ++m) sums[r][m] = 0;
  Piece<COUNT> now[loads<R>()][R], next[loads<R>()][R];
  read_rows(rows, lane, columns, next);
  int first = 0;
#pragma unroll 1
  for (; first + STEP <= columns; first += STEP) {
#pragma unroll
    for (int i = 0; i < loads<R>(); ++i)
#pragma unroll
      for (int r = 0; r < R; ++r) now[i][r] = next[i][r];
    read_rows(rows, first + STEP + lane, columns, next);
    add_products<R, true>(x, first + lane, columns, now, sums);
  }
  if (first < columns) add_products<R, false>(x, first + lane, columns, next, sums);
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

// y = silu(x Wg^T + b_g) * (x Wu^T + b_u), nothing rounded in between: a warp's rows are of both
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
