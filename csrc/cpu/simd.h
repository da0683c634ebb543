// Vectors of float and double as wide as the instruction set of this translation unit, with the
// few functions that the kernels need. Compiled once per instruction set (namespace DK_ISA).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../common/problem.h"

#if defined(__AVX512F__)
#define DK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DK_VECTOR_BYTES 32
#else
#define DK_VECTOR_BYTES 16
#endif

namespace dicekernels {
namespace DK_ISA {

typedef float FloatVector __attribute__((vector_size(DK_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(DK_VECTOR_BYTES)));
typedef int32_t IntVector __attribute__((vector_size(DK_VECTOR_BYTES)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = DK_VECTOR_BYTES / sizeof(T);

template <class T>
DK_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
DK_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
DK_INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

template <class M, class V>
DK_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}

#if defined(__AVX512F__)

// 2^(x log2 e) for x <= 88: the nearest integer out, a polynomial of degree 5 (minimax on [-1/2,
// 1/2], relative error 9.2e-8), the integer back in. Below 2^-149 the result is 0; NaN stays NaN.
DK_INLINE FloatVector exp(FloatVector x) {
  const __m512 log2e = _mm512_set1_ps(1.44269504088896341f);
  // The operand that may be NaN stands second: maxps returns it.
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-110.0f), reinterpret_cast<__m512>(x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(clamped, log2e),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_fmsub_ps(clamped, log2e, n);
  __m512 y = _mm512_set1_ps(1.32647271e-3f);
  for (const float coefficient :
       {9.67151286e-3f, 5.55073375e-2f, 2.40222421e-1f, 6.93146978e-1f, 1.0f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(coefficient));
  return reinterpret_cast<FloatVector>(_mm512_scalef_ps(y, n));
}

// Significand and exponent by instruction, then as below; right for denormals, too.
DK_INLINE void split(FloatVector x, FloatVector* m, FloatVector* e) {
  const __m512 v = reinterpret_cast<__m512>(x);
  *m = reinterpret_cast<FloatVector>(_mm512_getmant_ps(v, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_src));
  *e = reinterpret_cast<FloatVector>(_mm512_getexp_ps(v)) + 1.0f;
}

// The instructions above give 0, inf and NaN what log needs.
DK_INLINE FloatVector specials(FloatVector, FloatVector result) {
  return result;
}

// 1/x of normal numbers: 14 bits by table, squared twice by Newton's step.
DK_INLINE FloatVector reciprocal(FloatVector x) {
  const FloatVector r = reinterpret_cast<FloatVector>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return r + r * (1.0f - x * r);
}

#else

// exp for x <= 88: nearest multiple of ln 2 out, a polynomial of degree 6 (Cephes expf), the
// exponent back in by multiplication, so that NaN stays NaN. Below 2^-126 the result is 0.
DK_INLINE FloatVector exp(FloatVector x) {
  const float lowest = -87.33654f;
  const FloatVector clamped = select(x < lowest, splat(lowest), x);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const FloatVector shifted = clamped * 1.44269504088896341f + magic;
  const FloatVector n = shifted - magic;
  FloatVector r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  FloatVector y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  IntVector bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);
  FloatVector scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return select(x < lowest, splat(0.0f), y * scale);
}

DK_INLINE void split(FloatVector x, FloatVector* m, FloatVector* e) {
  IntVector bits;
  std::memcpy(&bits, &x, sizeof bits);
  const IntVector exponent = (bits >> 23) - 126;
  bits = (bits & 0x007fffff) | 0x3f000000;
  std::memcpy(m, &bits, sizeof bits);
  *e = __builtin_convertvector(exponent, FloatVector);
}

DK_INLINE FloatVector specials(FloatVector x, FloatVector result) {
  const float infinity = std::numeric_limits<float>::infinity();
  return select(x < infinity, select(x > 0.0f, result, splat(-infinity)), x);
}

DK_INLINE FloatVector reciprocal(FloatVector x) {
  return 1.0f / x;
}

#endif

// log of normal numbers (Cephes logf); 0 gives -inf, NaN and +inf give themselves.
DK_INLINE FloatVector log(FloatVector x) {
  FloatVector m, e;
  split(x, &m, &e);
  const auto low = m < 0.707106781186547524f;
  e = select(low, e - 1.0f, e);
  m = select(low, m + m, m) - 1.0f;
  FloatVector y = m * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  const FloatVector square = m * m;
  y = y * m * square;
  y = y + e * -2.12194440e-4f - square * 0.5f;
  return specials(x, m + y + e * 0.693359375f);
}

template <double (*F)(double)>
DK_INLINE DoubleVector map(DoubleVector x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = F(x[i]);
  return x;
}
DK_INLINE DoubleVector reciprocal(DoubleVector x) {
  return 1.0 / x;
}
DK_INLINE DoubleVector exp(DoubleVector x) {
  return map<std::exp>(x);
}
DK_INLINE DoubleVector log(DoubleVector x) {
  return map<std::log>(x);
}
DK_INLINE DoubleVector log1p(DoubleVector x) {
  return map<std::log1p>(x);
}

// log(1 + x) for x in [0, 1]: x times a polynomial of degree 8 in x - 1/2, minimax of relative
// error 3e-8 (1.6e-7 with its rounding).
DK_INLINE FloatVector log1p(FloatVector x) {
  const FloatVector t = x - 0.5f;
  FloatVector y = splat(5.23262378e-3f);
  for (const float coefficient : {-8.57446156e-3f, 1.15865115e-2f, -2.02282462e-2f, 3.66338529e-2f,
                                  -6.77114502e-2f, 1.32609084e-1f, -2.88526654e-1f, 8.10930192e-1f})
    y = y * t + coefficient;
  return x * y;
}

}  // namespace DK_ISA
}  // namespace dicekernels

#include "../common/voxel_math.h"  // after the functions that its templates look up
