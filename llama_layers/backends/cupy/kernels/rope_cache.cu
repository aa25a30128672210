// From the product for queries, keys and values [M, (heads + 2 kv_heads) * 2 half] to rotated queries
// [M, heads * 2 half], and keys (rotated) and values in their place in the cache
// [M, capacity, kv_heads, 2 half]. A block a head of a sequence, a thread a pair of channels.
//
// `length` tokens came before, and the cache is a ring; a sequence's angles are in row rows[m] of
// cos and sin.

extern "C" __global__ void rope_cache(const Number* __restrict__ qkv, const float* __restrict__ cos,
                                      const float* __restrict__ sin, const int* rows,
                                      const int* length, Number* keys, Number* values, Number* q,
                                      int heads, int kv_heads, int half, int capacity) {
  const int head = blockIdx.x, m = blockIdx.y, all = heads + 2 * kv_heads;
  const Number* x = qkv + (static_cast<long long>(m) * all + head) * 2 * half;
  const bool is_query = head < heads, is_value = head >= heads + kv_heads;
  const int kv_head = is_value ? head - heads - kv_heads : head - heads;
  const long long place = static_cast<long long>(m) * capacity + *length % capacity;
  Number* y = is_query ? q + (static_cast<long long>(m) * heads + head) * 2 * half
                       : (is_value ? values : keys) + (place * kv_heads + kv_head) * 2 * half;
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    if (is_value) {
      y[i] = x[i];
      y[i + half] = x[i + half];
      continue;
    }
    const long long angle = static_cast<long long>(rows[m]) * half + i;
    const float a = wide(x[i]), b = wide(x[i + half]);
    y[i] = narrow(a * cos[angle] - b * sin[angle]);
    y[i + half] = narrow(b * cos[angle] + a * sin[angle]);
  }
}
