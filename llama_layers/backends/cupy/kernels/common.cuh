// In front of every kernel: numbers of 16 bits, which are `unsigned short` here, so that NVIDIA's
// headers are not needed. Rounded to nearest, ties to even; NaN stays NaN.

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
