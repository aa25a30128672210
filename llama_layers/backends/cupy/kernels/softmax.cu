// Probabilities of float32 scores, for a block of queries: a block of threads a row, which it reads
// three times, from the cache but for the first. For each score 4 bytes are read from DRAM and 4
// (float32) or 6 (three bfloat16 parts) are written.
//
// MASK 0: every key; 1: `allowed` [queries, columns]; 2: slots of queries and keys, and `keep`.
// SPLIT 1: parts of each probability, high, middle and low, in planes of their own.

// The largest of all threads, always in the same order; every thread gets it.
__device__ __forceinline__ float largest_of_block(float value, float* of_warps) {
  for (int bits = 16; bits; bits /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, bits));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  for (int i = 0; i < THREADS / 32; ++i) value = fmaxf(value, of_warps[i]);
  return value;
}

__device__ __forceinline__ float sum_of_block(float value, float* of_warps) {
  for (int bits = 16; bits; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < THREADS / 32; ++i) sum += of_warps[i];
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
softmax(float* scores, unsigned short* parts, const unsigned char* allowed, const int* queries,
        const int* keys, const unsigned char* keep, int columns, int rows, int group, int window) {
  __shared__ float largest_of_warps[THREADS / 32];
  __shared__ float sum_of_warps[THREADS / 32];
  const long long first = static_cast<long long>(blockIdx.x) * columns;
  float* row = scores + first;

  const auto visible = [&](int key) {
#if MASK
    const int query = blockIdx.x % rows / group;
#endif
#if MASK == 1
    return allowed[static_cast<long long>(query) * columns + key] != 0;
#elif MASK == 2
    const int slot = keys[key], own = queries[query];
    return slot >= 0 && slot <= own && own - slot < window && (!keep || keep[key]);
#else
    return true;
#endif
  };

  // fmaxf passes NaN over, but the sum of exponentials does not.
  const float none = __uint_as_float(0xff800000);  // minus infinity
  float largest = none;
  for (int key = threadIdx.x; key < columns; key += THREADS)
    if (visible(key)) largest = fmaxf(largest, row[key]);
  largest = largest_of_block(largest, largest_of_warps);
#if MASK
  if (largest == none) largest = 0;  // nothing to see
#endif

  float sum = 0;
  for (int key = threadIdx.x; key < columns; key += THREADS)
    if (visible(key)) sum += expf(row[key] - largest);
  sum = sum_of_block(sum, sum_of_warps);
  if (sum == 0) sum = 1;

  for (int key = threadIdx.x; key < columns; key += THREADS) {
    const float p = visible(key) ? expf(row[key] - largest) / sum : 0;
#if SPLIT
    const long long plane = static_cast<long long>(gridDim.x) * columns;
    const unsigned short high = to_bfloat16(p);
    const float rest = p - from_bfloat16(high);
    const unsigned short middle = to_bfloat16(rest);
    parts[first + key] = high;
    parts[plane + first + key] = middle;
    parts[2 * plane + first + key] = to_bfloat16(rest - from_bfloat16(middle));
#else
    row[key] = p;
#endif
  }
}
