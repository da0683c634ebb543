// The 16-bit floating types: read as float, written from float to the nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

#include "../common/problem.h"
#include "device.h"
#if !defined(DK_EMULATED)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace dicekernels {
namespace cuda {

// Elements as they lie in memory. CUDA's own types do not exist under g++.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

#if defined(DK_EMULATED)

namespace portable {
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
}  // namespace portable

inline float to_float(Half h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31;
  const uint32_t mantissa = h.bits & 0x3FFu;
  if (exponent == 31) return portable::float_of(sign | 0x7F800000u | mantissa << 13);
  if (exponent > 0) return portable::float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}
inline float to_float(Bfloat16 b) {
  return portable::float_of(static_cast<uint32_t>(b.bits) << 16);
}

inline uint16_t half_bits(float x) {
  const uint32_t bits = portable::bits_of(x), magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7F800000u) return 0x7FFF;
  // From the midpoint of the largest half and the next power of two on: infinity.
  if (magnitude >= 0x477FF000u) return sign | 0x7C00;
  if (magnitude < 0x38800000u) {
    // Subnormal halves are multiples of 2^-24: so are floats beside 0.5, which the sum rounds to.
    const float shifted = portable::float_of(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(portable::bits_of(shifted) - 0x3F000000u);
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xFFFu + odd) >> 13);
}
inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = portable::bits_of(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

// Two values in one word, `lo` at the lower address.
inline uint32_t pack_half2(float lo, float hi) {
  return half_bits(lo) | static_cast<uint32_t>(half_bits(hi)) << 16;
}
inline uint32_t pack_bfloat162(float lo, float hi) {
  return bfloat16_bits(lo) | static_cast<uint32_t>(bfloat16_bits(hi)) << 16;
}

#else

__device__ __forceinline__ float to_float(Half h) {
  return __half2float(__ushort_as_half(h.bits));
}
__device__ __forceinline__ float to_float(Bfloat16 b) {
  return __uint_as_float(static_cast<uint32_t>(b.bits) << 16);
}

__device__ __forceinline__ uint16_t half_bits(float x) {
  return __half_as_ushort(__float2half_rn(x));
}
__device__ __forceinline__ uint16_t bfloat16_bits(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Two values in one word, `lo` at the lower address: one instruction for both conversions.
__device__ __forceinline__ uint32_t pack_half2(float lo, float hi) {
  const __half2 pair = __floats2half2_rn(lo, hi);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ __forceinline__ uint32_t pack_bfloat162(float lo, float hi) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

#endif

__device__ __forceinline__ void unpack_half2(uint32_t bits, float& lo, float& hi) {
  lo = to_float(Half{static_cast<uint16_t>(bits)});
  hi = to_float(Half{static_cast<uint16_t>(bits >> 16)});
}
__device__ __forceinline__ void unpack_bfloat162(uint32_t bits, float& lo, float& hi) {
  lo = to_float(Bfloat16{static_cast<uint16_t>(bits)});
  hi = to_float(Bfloat16{static_cast<uint16_t>(bits >> 16)});
}

// An element as a number that arithmetic exists for.
template <class T>
__device__ __forceinline__ T widen(T x) {
  return x;
}
__device__ __forceinline__ float widen(Half x) {
  return to_float(x);
}
__device__ __forceinline__ float widen(Bfloat16 x) {
  return to_float(x);
}

// A number as an element. As Tensor::to rounds: to 16 bits by way of float.
template <class T>
struct Narrow {
  static __device__ __forceinline__ T from(double x) { return static_cast<T>(x); }
};
template <>
struct Narrow<Half> {
  static __device__ __forceinline__ Half from(double x) {
    return {half_bits(static_cast<float>(x))};
  }
};
template <>
struct Narrow<Bfloat16> {
  static __device__ __forceinline__ Bfloat16 from(double x) {
    return {bfloat16_bits(static_cast<float>(x))};
  }
};
template <class T, class X>
__device__ __forceinline__ T narrow(X x) {
  return Narrow<T>::from(x);
}

}  // namespace cuda
}  // namespace dicekernels
