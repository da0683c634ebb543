// The functions that common/voxel_math.h looks up, for the device: base-2 exponentials, one
// instruction each, and the approximate reciprocal for float; exact functions for double.
#pragma once
#include <cmath>
#include <cstdint>

#include "../common/problem.h"
#include "device.h"

#define DK_ISA cuda

namespace dicekernels {
namespace cuda {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

template <class T>
DK_INLINE T select(bool mask, T a, T b) {
  return mask ? a : b;
}
template <class T>
DK_INLINE T splat(T x) {
  return x;
}

__device__ __forceinline__ float exp2_fast(float x) {
#if defined(DK_EMULATED)
  return ::exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float reciprocal(float x) {
#if defined(DK_EMULATED)
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ double reciprocal(double x) {
  return 1.0 / x;
}

__device__ __forceinline__ float exp(float x) {
  return exp2_fast(x * kLog2E);
}
__device__ __forceinline__ double exp(double x) {
  return ::exp(x);
}
__device__ __forceinline__ float log(float x) {
  return ::logf(x);
}
__device__ __forceinline__ double log(double x) {
  return ::log(x);
}

// log(1 + x) for x in [0, 1]: x times a polynomial of degree 8 in x - 1/2, as cpu/simd.h.
__device__ __forceinline__ float log1p(float x) {
  const float t = x - 0.5f;
  float y = 5.23262378e-3f;
  y = y * t - 8.57446156e-3f;
  y = y * t + 1.15865115e-2f;
  y = y * t - 2.02282462e-2f;
  y = y * t + 3.66338529e-2f;
  y = y * t - 6.77114502e-2f;
  y = y * t + 1.32609084e-1f;
  y = y * t - 2.88526654e-1f;
  y = y * t + 8.10930192e-1f;
  return x * y;
}
__device__ __forceinline__ double log1p(double x) {
  return ::log1p(x);
}

// log2 of a sum of exponentials, at least 1/2. The approximate instruction has no digits left near
// 1, where a confident voxel lies; this polynomial has a relative error of 1.4e-7 there, and is 0
// at 1.
// `less` is taken off: one instruction with the exponent, which stays where it stands in the bits.
__device__ __forceinline__ float log2_sum(float x, float less = 0) {
  // Exponent of the mantissa in [sqrt(1/2), sqrt(2)), times 2^23.
  const int32_t exponent = (__float_as_int(x) - 0x3F3504F3) & ~0x7FFFFF;
  const float f = x * __int_as_float(0x3F800000 - exponent) - 1.0f;  // NaN stays NaN
  float y = 0.12583689391613007f;
  y = y * f - 0.20726968348026276f;
  y = y * f + 0.21571561694145203f;
  y = y * f - 0.23894482851028442f;
  y = y * f + 0.28791624307632446f;
  y = y * f - 0.3607036769390106f;
  y = y * f + 0.48091062903404236f;
  y = y * f - 0.7213473320007324f;
  y = y * f + 1.4426950216293335f;
  return y * f + (static_cast<float>(exponent) * (1.0f / (1 << 23)) - less);
}
__device__ __forceinline__ float log_sum(float x) {
  return log2_sum(x) * kLn2;
}
__device__ __forceinline__ double log_sum(double x) {
  return ::log(x);
}

}  // namespace cuda
}  // namespace dicekernels

#include "../common/voxel_math.h"  // after the functions that its templates look up
