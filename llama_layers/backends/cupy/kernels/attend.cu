// Attention of one query a sequence, over pieces of its context: a block takes CHUNK keys, with all
// or some of the query heads that read them, so that each key and each value is read once for HEADS
// heads. Keys and values are [M, capacity, kv_heads, WIDTH]; of what lies in DRAM they are all that
// counts: 2 x 2 bytes x kv_heads x WIDTH a token in 16 bits. A second kernel joins the pieces.
//
// A lane reads COUNT numbers at once, 16 bytes where they begin so; for 128 channels of 16 bits a
// warp so reads two keys, and up to 16 of them, all that it has, before it needs the first: up to 128
// bytes a thread are under way.
//
// Pieces begin at multiples of CHUNK and are joined in an order of their own, so that a row's bits
// depend on nothing but the row.

constexpr int PIECES = WIDTH / COUNT;  // of a key
__device__ constexpr int lanes_of(int pieces) {
  int lanes = 1;
  while (lanes < 32 && lanes < pieces) lanes *= 2;
  return lanes;
}
constexpr int LANES = lanes_of(PIECES);                // of a key
constexpr int SLICES = (PIECES + LANES - 1) / LANES;   // of a key, pieces that a lane has
constexpr int KEYS = 32 / LANES;                       // that a warp reads at once
constexpr int STEPS = (CHUNK + WARPS * KEYS - 1) / (WARPS * KEYS);
// Steps whose loads are under way at once; with many heads, registers are short.
constexpr int MAX_LOADS = HEADS * COUNT > 32 ? 4 : 8;
constexpr int LOADS =
    SLICES > MAX_LOADS ? 1 : MAX_LOADS / SLICES < STEPS ? MAX_LOADS / SLICES : STEPS;

// Which keys the query may see: `length` tokens came before it, and place p of the ring holds the
// latest token that falls on it.
__device__ __forceinline__ bool visible(int place, int length, int capacity, int window,
                                        const unsigned char* keep) {
  const int back = (length - place) % capacity;
  const int slot = length - (back < 0 ? back + capacity : back);
  return slot >= 0 && length - slot < window && (!keep || keep[place]);
}

// This lane's part of some of the block's keys or values; zeros for those that are not seen.
__device__ __forceinline__ void read_steps(const Number* __restrict__ from, long long token,
                                           const bool* seen, int first_step,
                                           Piece<COUNT> (&pieces)[LOADS][SLICES]) {
  const int own = threadIdx.x % LANES, row = threadIdx.x / LANES;  // a row of keys for each step
  bool there[LOADS];
#pragma unroll
  for (int i = 0; i < LOADS; ++i) {
    const int t = (first_step + i) * WARPS * KEYS + row;
    there[i] = seen[min(t, CHUNK - 1)] && t < CHUNK;
  }
  from += (first_step * WARPS * KEYS + row) * token + own * COUNT;
#pragma unroll
  for (int i = 0; i < LOADS; ++i, from += WARPS * KEYS * token)
#pragma unroll
    for (int s = 0; s < SLICES; ++s) {
      pieces[i][s] = {};
      if (there[i] && s * LANES + own < PIECES)
        pieces[i][s] = read_once<COUNT>(from + s * LANES * COUNT);
    }
}

// sums [M, heads, chunks, WIDTH], and of each chunk the largest score and the sum of exponentials,
// ends [M, heads, chunks].
extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)
attend_split(const Number* __restrict__ q, const Number* __restrict__ keys,
             const Number* __restrict__ values, const int* length_of, const unsigned char* keep,
             float* sums, float2* ends, int heads, int kv_heads, int capacity, int window,
             float scale) {
  __shared__ __align__(16) float queries[HEADS][WIDTH];
  __shared__ float scores[HEADS][CHUNK];
  __shared__ float parts[WARPS][HEADS][WIDTH];
  __shared__ bool seen[CHUNK];
  const int chunk = blockIdx.x, chunks = gridDim.x, m = blockIdx.z;
  const int first_head = blockIdx.y * HEADS, kv_head = first_head / (heads / kv_heads);
  const int length = *length_of, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int start = chunk * CHUNK;
  const int stop = min(start + CHUNK, min(length + 1, capacity));
  if (start >= stop) return;  // all threads: the second kernel does not look at this chunk
  const long long first_row = static_cast<long long>(m) * heads + first_head;

  if (keep) keep += static_cast<long long>(m) * capacity;
  bool sees = false;
  if (threadIdx.x < CHUNK) {
    const int place = start + threadIdx.x;
    seen[threadIdx.x] = sees = place < stop && visible(place, length, capacity, window, keep);
  }
  for (int i = threadIdx.x; i < HEADS * WIDTH; i += 32 * WARPS)
    queries[i / WIDTH][i % WIDTH] = wide(q[first_row * WIDTH + i]);
  if (!__syncthreads_or(sees)) {
    if (threadIdx.x < HEADS) ends[(first_row + threadIdx.x) * chunks + chunk] = make_float2(0, 0);
    return;  // all threads
  }

  const long long token = static_cast<long long>(kv_heads) * WIDTH;
  const long long first = (static_cast<long long>(m) * capacity + start) * token + kv_head * WIDTH;
  Piece<COUNT> pieces[LOADS][SLICES];
#pragma unroll 1
  for (int step = 0; step < STEPS; step += LOADS) {
    read_steps(keys + first, token, seen, step, pieces);
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float products[LOADS] = {};
#pragma unroll
      for (int s = 0; s < SLICES; ++s) {
        const float* query = queries[h] + min(s * LANES + lane % LANES, PIECES - 1) * COUNT;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
          float key[COUNT];
          widen(pieces[i][s], 0, key);
#pragma unroll
          for (int j = 0; j < COUNT; ++j) products[i] = fmaf(query[j], key[j], products[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
#pragma unroll
        for (int bits = LANES / 2; bits; bits /= 2)
          products[i] += __shfl_xor_sync(~0u, products[i], bits);
        const int t = ((step + i) * WARPS + warp) * KEYS + lane / LANES;
        if (lane % LANES == 0 && t < CHUNK) scores[h][t] = products[i] * scale;
      }
    }
  }
  __syncthreads();

  // fmaxf passes NaN over, but the sum of exponentials does not.
  const float none = __uint_as_float(0xff800000);  // minus infinity
  for (int h = warp; h < HEADS; h += WARPS) {
    float largest = none;
    for (int t = lane; t < CHUNK; t += 32)
      if (seen[t]) largest = fmaxf(largest, scores[h][t]);
    for (int bits = 16; bits; bits /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, bits));
    const float above = largest == none ? 0 : largest;
    float sum = 0;
    for (int t = lane; t < CHUNK; t += 32) {
      const float weight = seen[t] ? expf(scores[h][t] - above) : 0;
      scores[h][t] = weight;
      sum += weight;
    }
    sum = sum_of_warp(sum);
    if (lane == 0) ends[(first_row + h) * chunks + chunk] = make_float2(above, sum);
  }
  __syncthreads();

  float weighed[HEADS][SLICES][COUNT] = {};
#pragma unroll 1
  for (int step = 0; step < STEPS; step += LOADS) {
    read_steps(values + first, token, seen, step, pieces);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int t = min(((step + i) * WARPS + warp) * KEYS + lane / LANES, CHUNK - 1);
#pragma unroll
      for (int s = 0; s < SLICES; ++s) {
        float value[COUNT];
        widen(pieces[i][s], 0, value);
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
#pragma unroll
          for (int j = 0; j < COUNT; ++j)
            weighed[h][s][j] = fmaf(scores[h][t], value[j], weighed[h][s][j]);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < HEADS; ++h)
#pragma unroll
    for (int s = 0; s < SLICES; ++s)
#pragma unroll
      for (int j = 0; j < COUNT; ++j) {
        float sum = weighed[h][s][j];
#pragma unroll
        for (int bits = LANES; bits < 32; bits *= 2) sum += __shfl_xor_sync(~0u, sum, bits);
        const int piece = s * LANES + lane;
        if (lane < LANES && piece < PIECES) parts[warp][h][piece * COUNT + j] = sum;
      }
  __syncthreads();
  for (int i = threadIdx.x; i < HEADS * WIDTH; i += 32 * WARPS) {
    const int h = i / WIDTH, c = i % WIDTH;
    float sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += parts[w][h][c];
    sums[((first_row + h) * chunks + chunk) * WIDTH + c] = sum;
  }
}

// y [M, heads * WIDTH]: a block a head of a sequence, of JOINING warps. Warp w adds up every
// JOINING-th chunk from chunk w on.
extern "C" __global__ void __launch_bounds__(32 * JOINING)
attend_join(const float* __restrict__ sums, const float2* __restrict__ ends, const int* length_of,
            Number* y, int chunks, int capacity) {
  constexpr int EACH = (WIDTH + 31) / 32;
  __shared__ float parts[JOINING][WIDTH];
  __shared__ float largest_of[JOINING], total_of[JOINING];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int used = (min(*length_of + 1, capacity) + CHUNK - 1) / CHUNK;
  const long long first = static_cast<long long>(blockIdx.x) * chunks;

  float largest = __uint_as_float(0xff800000);
  for (int i = threadIdx.x; i < used; i += 32 * JOINING)
    if (ends[first + i].y != 0) largest = fmaxf(largest, ends[first + i].x);
  for (int bits = 16; bits; bits /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, bits));
  if (lane == 0) largest_of[warp] = largest;
  __syncthreads();
  for (int w = 0; w < JOINING; ++w) largest = fmaxf(largest, largest_of[w]);

  float total = 0, own[EACH] = {};
#pragma unroll 4
  for (int i = warp; i < used; i += JOINING) {
    const float2 end = ends[first + i];
    const bool any = end.y != 0;  // or nothing in it is seen, and its sums were not written
    const float share = any ? expf(end.x - largest) : 0;
    total = fmaf(share, end.y, total);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int c = 32 * k + lane;
      if (any && c < WIDTH) own[k] = fmaf(share, sums[(first + i) * WIDTH + c], own[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < EACH; ++k)
    if (32 * k + lane < WIDTH) parts[warp][32 * k + lane] = own[k];
  if (lane == 0) total_of[warp] = total;
  __syncthreads();
  for (int c = threadIdx.x; c < WIDTH; c += 32 * JOINING) {
    float sum = 0, of_all = 0;
    for (int w = 0; w < JOINING; ++w) sum += parts[w][c], of_all += total_of[w];
    y[static_cast<long long>(blockIdx.x) * WIDTH + c] = narrow(of_all == 0 ? 0 : sum / of_all);
  }
}
