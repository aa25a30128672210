// Between two tokens: from logits [M, vocabulary] to ids [M] to embeddings, and the counts.
// Logits take 4 bytes each, 0.5 MB for 128k of them: too many for one block. So a block takes SHARE
// of a row, and then one block a row puts the shares together.
//
// Every sum and every choice has one order, whatever the grid is.

#define SHARE (THREADS * OWN)  // OWN logits for each thread

// The largest of some logits, and the first place where it is. NaN is larger than all, at -1.
struct Largest { float value; int at; };

__device__ __forceinline__ Largest larger(Largest a, Largest b) {
  return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a;
}

__device__ __forceinline__ Largest largest_of_warp(Largest own) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2)
    own = larger(own, {__shfl_xor_sync(~0u, own.value, bits), __shfl_xor_sync(~0u, own.at, bits)});
  return own;
}

__device__ __forceinline__ Largest nothing() { return {__uint_as_float(0xff800000), 0x7fffffff}; }

// The largest of all shares of a row; every warp finds it.
__device__ __forceinline__ Largest largest_of_row(const Largest* shares, int count) {
  Largest own = nothing();
  for (int i = threadIdx.x % 32; i < count; i += 32) own = larger(own, shares[i]);
  return largest_of_warp(own);
}

__device__ __forceinline__ double weight_of(float logit, float largest, float temperature) {
  return exp((static_cast<double>(logit) - largest) / temperature);
}

// shares [M, gridDim.x]
extern "C" __global__ void __launch_bounds__(THREADS)
largest_of_shares(const float* __restrict__ logits, Largest* shares, int vocabulary) {
  __shared__ Largest of_warps[THREADS / 32];
  const float* row = logits + static_cast<long long>(blockIdx.y) * vocabulary;
  Largest own = nothing();
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int at = blockIdx.x * SHARE + i * THREADS + threadIdx.x;
    if (at >= vocabulary) break;
    const float logit = row[at];
    own = larger(own, logit == logit ? Largest{logit, at} : Largest{__uint_as_float(0x7f800000), -1});
  }
  own = largest_of_warp(own);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < THREADS / 32; ++i) own = larger(own, of_warps[i]);
  shares[blockIdx.y * gridDim.x + blockIdx.x] = own;
}

// ids = the first of the largest logits; -1 if one is NaN. A warp a row.
extern "C" __global__ void argmax(const Largest* __restrict__ shares, int* ids, int count) {
  const Largest all = largest_of_row(shares + blockIdx.x * count, count);
  if (threadIdx.x == 0) ids[blockIdx.x] = all.at;
}

// sums [M, gridDim.x] of exp((logit - largest) / temperature), a share each; in float64, as on the
// host: sums over a vocabulary that decide on a token.
extern "C" __global__ void __launch_bounds__(THREADS)
weigh(const float* __restrict__ logits, const Largest* __restrict__ shares, float temperature,
      double* sums, int vocabulary) {
  __shared__ double of_warps[THREADS / 32];
  const float* row = logits + static_cast<long long>(blockIdx.y) * vocabulary;
  const float largest = largest_of_row(shares + blockIdx.y * gridDim.x, gridDim.x).value;
  double sum = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int at = blockIdx.x * SHARE + i * THREADS + threadIdx.x;
    if (at < vocabulary) sum += weight_of(row[at], largest, temperature);
  }
#pragma unroll
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < THREADS / 32; ++i) sum += of_warps[i];
  sums[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// ids = the first token at which the sum of the weights exceeds the share uniforms[*step] of the sum
// of all; -1 if a logit is NaN or the largest is infinite. A block a row: the first share of logits
// that leads beyond, and in it the first token.
extern "C" __global__ void __launch_bounds__(THREADS)
draw(const float* __restrict__ logits, const Largest* __restrict__ shares,
     const double* __restrict__ sums, const double* __restrict__ uniforms, const int* step,
     float temperature, int* ids, int vocabulary, int count) {
  __shared__ double of_warps[THREADS / 32];
  __shared__ double reached, target;
  __shared__ int share, first, last;
  const float* row = logits + static_cast<long long>(blockIdx.x) * vocabulary;
  const Largest largest = largest_of_row(shares + blockIdx.x * count, count);
  if (largest.at < 0 || isinf(largest.value)) {  // all threads
    if (threadIdx.x == 0) ids[blockIdx.x] = -1;
    return;
  }
  if (threadIdx.x == 0) {
    sums += blockIdx.x * count;
    double total = 0, before = 0;
    for (int i = 0; i < count; ++i) total += sums[i];
    target = uniforms[static_cast<long long>(*step) * gridDim.x + blockIdx.x] * total;
    share = 0, reached = 0;
    for (int i = 0; i < count; ++i) {  // the last share with a weight, should rounding lead beyond it
      if (sums[i] > 0) share = i, reached = before;
      before += sums[i];
      if (before > target) break;
    }
    first = vocabulary, last = 0;
  }
  __syncthreads();

  const int start = share * SHARE + threadIdx.x * OWN;  // a thread's tokens follow each other here
  double weights[OWN], own = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int at = start + i;
    weights[i] = at < vocabulary ? weight_of(row[at], largest.value, temperature) : 0;
    own += weights[i];
  }
  double upto = own;  // the lanes' before, and own
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const double other = __shfl_up_sync(~0u, upto, by);
    if (threadIdx.x % 32 >= by) upto += other;
  }
  if (threadIdx.x % 32 == 31) of_warps[threadIdx.x / 32] = upto;
  __syncthreads();
  const double before = __shfl_up_sync(~0u, upto, 1);
  double sum = reached;
  for (int i = 0; i < threadIdx.x / 32; ++i) sum += of_warps[i];
  if (threadIdx.x % 32) sum += before;
  int own_first = vocabulary, own_last = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    sum += weights[i];
    if (weights[i] > 0) own_last = start + i;
    if (weights[i] > 0 && sum > target) own_first = min(own_first, start + i);
  }
  atomicMin(&first, own_first);
  atomicMax(&last, own_last);
  __syncthreads();
  if (threadIdx.x == 0) ids[blockIdx.x] = first < vocabulary ? first : last;
}

// y [M, columns] = rows of a table; zeros for an id that is not in it.
extern "C" __global__ void embed(const int* ids, const Number* __restrict__ table, Number* y,
                                 int columns, int rows) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, id = ids[blockIdx.y];
  if (i >= columns) return;
  y[static_cast<long long>(blockIdx.y) * columns + i] =
      id >= 0 && id < rows ? table[static_cast<long long>(id) * columns + i] : narrow(0);
}

// One token more, in the cache and in each sequence.
extern "C" __global__ void advance(int* length, int* rows, int* step, int sequences) {
  const int i = threadIdx.x;
  if (i < sequences) rows[i] += 1;
  if (i == 0) *length += 1, *step += 1;
}
