// RoPE and the gate, by a thread for each pair or number. Each number is read once and written once,
// so that the time is that of the bytes: 2 x 2 for a number of q or k (in 16 bits), 3 x 2 for a gated
// one.

// x and y [tokens, heads, 2 * half]; cos and sin [rows, half], the same for each `rows` tokens.
// Pair i are the channels i and i + half, or with INTERLEAVED 2 i and 2 i + 1.
extern "C" __global__ void rotate(const Number* x, const float* cos, const float* sin, Number* y,
                                long long pairs, int heads, int half, int rows) {
  const long long pair = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pair >= pairs) return;
  const int i = pair % half;
  const long long head = pair / half;
  const long long angle = head / heads % rows * half + i;
#if INTERLEAVED
  const long long first = 2 * pair, second = first + 1;
#else
  const long long first = head * 2 * half + i, second = first + half;
#endif
  const float a = wide(x[first]), b = wide(x[second]);
  y[first] = narrow(a * cos[angle] - b * sin[angle]);
  y[second] = narrow(b * cos[angle] + a * sin[angle]);
}

// y = gate / (1 + exp(-gate)) * up. e^-|g| never overflows; for a negative gate 1 / (1 + e^-g) is
// e^g / (1 + e^g).
extern "C" __global__ void gate_with_silu(const Number* gate, const Number* up, Number* y,
                                          long long count) {
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float g = wide(gate[i]);
  const float decay = expf(-fabsf(g));
  y[i] = narrow(g * ((g >= 0 ? 1 : decay) / (1 + decay)) * wide(up[i]));
}
