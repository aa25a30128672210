// In front of every kernel: numbers of 16 bits, which are `unsigned short` here, so that NVIDIA's
// headers are not needed. Rounded to nearest, ties to even; NaN stays NaN.
//
// FORMAT says what a kernel's numbers are. It and the constants of each source come from compile.py.
#ifndef FORMAT
#define FORMAT FLOAT32
#endif

__device__ __forceinline__ float from_bfloat16(unsigned short x) {
  return __uint_as_float(static_cast<unsigned>(x) << 16);
}

__device__ __forceinline__ unsigned short to_bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return (bits >> 16) | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#ifdef EMULATED
__device__ __forceinline__ float from_float16(unsigned short x) {
  return emulated::bits<_Float16>(x);
}

__device__ __forceinline__ unsigned short to_float16(float x) {
  return emulated::bits<unsigned short>(static_cast<_Float16>(x));
}
#else
__device__ __forceinline__ float from_float16(unsigned short x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

__device__ __forceinline__ unsigned short to_float16(float x) {
  unsigned short y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
#endif

#if FORMAT == FLOAT32
typedef float Number;
__device__ __forceinline__ float wide(Number x) { return x; }
__device__ __forceinline__ Number narrow(float x) { return x; }
#elif FORMAT == BFLOAT16
typedef unsigned short Number;
__device__ __forceinline__ float wide(Number x) { return from_bfloat16(x); }
__device__ __forceinline__ Number narrow(float x) { return to_bfloat16(x); }
#else
typedef unsigned short Number;
__device__ __forceinline__ float wide(Number x) { return from_float16(x); }
__device__ __forceinline__ Number narrow(float x) { return to_float16(x); }
#endif

// N numbers side by side, which a thread reads by one load of at most 16 bytes.
template <int N> struct alignas(N * sizeof(Number)) Piece { Number of[N]; };

template <int N> __device__ __forceinline__ Piece<N> read(const Number* from) {
  return *reinterpret_cast<const Piece<N>*>(from);
}

// N numbers of a piece, from one of them on. Of two bfloat16 in a register one is shifted and the
// other masked: an operation each, where numbers of 16 bits by themselves take two or three.
template <int N, int M>
__device__ __forceinline__ void widen(const Piece<M>& piece, int from, float (&to)[N]) {
  if constexpr (FORMAT == BFLOAT16 && N % 2 == 0) {
    const unsigned* pairs = reinterpret_cast<const unsigned*>(&piece);
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const unsigned pair = pairs[(from + i) / 2];
      to[i] = __uint_as_float(pair << 16);
      to[i + 1] = __uint_as_float(pair & 0xffff0000);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = wide(piece.of[from + i]);
  }
}

// Numbers that only one thread reads leave the caches first, and those that many read stay.
template <int N> __device__ __forceinline__ Piece<N> read_once(const Number* from) {
  if constexpr (N * sizeof(Number) == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
    return *reinterpret_cast<const Piece<N>*>(&bits);
  } else {
    return read<N>(from);
  }
}

// The sum of all lanes, for each of them, always in the same order.
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}
