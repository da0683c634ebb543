// CUDA's qualifiers, vector types, runtime types and the intrinsics that concern one thread only,
// for a host compiler.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
// Empty, because libstdc++ writes __attribute__((__noinline__)).
#define __noinline__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// Vectors of two and four are aligned to their size, at most to 16 bytes; the others to an element.
#define DK_EMULATOR_VECTORS(NAME, T)                                \
  struct NAME##1 {                                                  \
    T x;                                                            \
  };                                                                \
  struct alignas(2 * sizeof(T)) NAME##2 {                           \
    T x, y;                                                         \
  };                                                                \
  struct NAME##3 {                                                  \
    T x, y, z;                                                      \
  };                                                                \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) NAME##4 { \
    T x, y, z, w;                                                   \
  };                                                                \
  constexpr NAME##1 make_##NAME##1(T x) {                           \
    return {x};                                                     \
  }                                                                 \
  constexpr NAME##2 make_##NAME##2(T x, T y) {                      \
    return {x, y};                                                  \
  }                                                                 \
  constexpr NAME##3 make_##NAME##3(T x, T y, T z) {                 \
    return {x, y, z};                                               \
  }                                                                 \
  constexpr NAME##4 make_##NAME##4(T x, T y, T z, T w) {            \
    return {x, y, z, w};                                            \
  }

DK_EMULATOR_VECTORS(char, signed char)
DK_EMULATOR_VECTORS(uchar, unsigned char)
DK_EMULATOR_VECTORS(short, short)
DK_EMULATOR_VECTORS(ushort, unsigned short)
DK_EMULATOR_VECTORS(int, int)
DK_EMULATOR_VECTORS(uint, unsigned int)
DK_EMULATOR_VECTORS(longlong, long long)
DK_EMULATOR_VECTORS(ulonglong, unsigned long long)
DK_EMULATOR_VECTORS(float, float)
DK_EMULATOR_VECTORS(double, double)
#undef DK_EMULATOR_VECTORS

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1)
      : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

constexpr int warpSize = 32;

// The errors that a launch can have, with the values of the CUDA runtime.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
using cudaStream_t = void*;
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

namespace emulator {

// The bits of a value, under another type.
template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace emulator

inline float __uint_as_float(unsigned int v) {
  return emulator::bit_cast<float>(v);
}
inline float __int_as_float(int v) {
  return emulator::bit_cast<float>(v);
}
inline unsigned int __float_as_uint(float v) {
  return emulator::bit_cast<unsigned int>(v);
}
inline int __float_as_int(float v) {
  return emulator::bit_cast<int>(v);
}
inline double __longlong_as_double(long long v) {
  return emulator::bit_cast<double>(v);
}
inline long long __double_as_longlong(double v) {
  return emulator::bit_cast<long long>(v);
}

inline int __clz(int v) {
  return v ? __builtin_clz(static_cast<unsigned int>(v)) : 32;
}
inline int __clzll(long long v) {
  return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64;
}
inline int __popc(unsigned int v) {
  return __builtin_popcount(v);
}
inline int __popcll(unsigned long long v) {
  return __builtin_popcountll(v);
}
inline int __ffs(int v) {
  return __builtin_ffs(v);
}
inline int __ffsll(long long v) {
  return __builtin_ffsll(v);
}
inline unsigned int __brev(unsigned int v) {
  unsigned int reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (v >> i & 1u) << (31 - i);
  return reversed;
}
// Four of the eight bytes of y:x, chosen by the low three bits of each of the selector's nibbles.
inline unsigned int __byte_perm(unsigned int x, unsigned int y, unsigned int selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned int result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned int from = selector >> (4 * i) & 7u;
    result |= static_cast<unsigned int>(bytes >> (8 * from) & 0xffu) << (8 * i);
  }
  return result;
}
inline unsigned int __funnelshift_l(unsigned int lo, unsigned int hi, unsigned int shift) {
  return static_cast<unsigned int>((uint64_t{hi} << 32 | lo) << (shift & 31) >> 32);
}
inline unsigned int __funnelshift_r(unsigned int lo, unsigned int hi, unsigned int shift) {
  return static_cast<unsigned int>((uint64_t{hi} << 32 | lo) >> (shift & 31));
}

// Operations that the device's compiler must not contract. The host's may, where it has an FMA.
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float a) {
  return 1.0f / a;
}
inline float __fsqrt_rn(float a) {
  return std::sqrt(a);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float rsqrtf(float a) {
  return 1.0f / std::sqrt(a);
}
// Saturates NaN to 0, as the hardware does.
inline float __saturatef(float a) {
  return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f;
}
// Macros, because glibc declares functions of these names and exports none. The hardware's versions
// are less exact than these.
#define __expf(x) ::expf(x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)

// min and max without std::, for the pairs of types for which CUDA has them.
#define DK_EMULATOR_MIN_MAX(T, A, B)                                                      \
  constexpr T min(A a, B b) {                                                             \
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a); \
  }                                                                                       \
  constexpr T max(A a, B b) {                                                             \
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a); \
  }
DK_EMULATOR_MIN_MAX(int, int, int)
DK_EMULATOR_MIN_MAX(unsigned int, unsigned int, unsigned int)
DK_EMULATOR_MIN_MAX(unsigned int, unsigned int, int)
DK_EMULATOR_MIN_MAX(unsigned int, int, unsigned int)
DK_EMULATOR_MIN_MAX(long, long, long)
DK_EMULATOR_MIN_MAX(unsigned long, unsigned long, unsigned long)
DK_EMULATOR_MIN_MAX(long long, long long, long long)
DK_EMULATOR_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef DK_EMULATOR_MIN_MAX
// Of a number and NaN these are the number, unlike std::min and std::max.
inline float min(float a, float b) {
  return std::fmin(a, b);
}
inline float max(float a, float b) {
  return std::fmax(a, b);
}
inline double min(double a, double b) {
  return std::fmin(a, b);
}
inline double max(double a, double b) {
  return std::fmax(a, b);
}
inline double min(float a, double b) {
  return std::fmin(double{a}, b);
}
inline double max(float a, double b) {
  return std::fmax(double{a}, b);
}
inline double min(double a, float b) {
  return std::fmin(a, double{b});
}
inline double max(double a, float b) {
  return std::fmax(a, double{b});
}

// Loads and stores with a hint for the cache.
#define DK_EMULATOR_LOAD(NAME)   \
  template <typename T>          \
  inline T NAME(const T* from) { \
    return *from;                \
  }
#define DK_EMULATOR_STORE(NAME)             \
  template <typename T>                     \
  inline void NAME(T* to, const T& value) { \
    *to = value;                            \
  }
DK_EMULATOR_LOAD(__ldg)
DK_EMULATOR_LOAD(__ldca)
DK_EMULATOR_LOAD(__ldcg)
DK_EMULATOR_LOAD(__ldcs)
DK_EMULATOR_LOAD(__ldcv)
DK_EMULATOR_LOAD(__ldlu)
DK_EMULATOR_STORE(__stcg)
DK_EMULATOR_STORE(__stcs)
DK_EMULATOR_STORE(__stwb)
DK_EMULATOR_STORE(__stwt)
#undef DK_EMULATOR_LOAD
#undef DK_EMULATOR_STORE
