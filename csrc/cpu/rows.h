// Rows of a tile: reading any dtype and stride into float or double, and writing it back.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "simd.h"

namespace dicekernels {
namespace DK_ISA {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

DK_INLINE float widen(Bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
DK_INLINE void narrow(float f, Bfloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = f == f ? static_cast<uint16_t>(rounded) : 0x7fc0;
}
#if defined(__F16C__)
DK_INLINE float widen(Half x) {
  return _cvtsh_ss(x.bits);
}
DK_INLINE void narrow(float f, Half* out) {
  out->bits = _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
}
#else
DK_INLINE float widen(Half x) {
  return torch::headeronly::detail::fp16_ieee_to_fp32_value(x.bits);
}
DK_INLINE void narrow(float f, Half* out) {
  out->bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(f);
}
#endif
template <class S>
DK_INLINE S widen(S x) {
  return x;
}
DK_INLINE void narrow(double x, float* out) {
  *out = static_cast<float>(x);
}
DK_INLINE void narrow(double x, double* out) {
  *out = x;
}
DK_INLINE void narrow(float x, float* out) {
  *out = x;
}
DK_INLINE void narrow(float x, double* out) {
  *out = x;
}

// Calls f with a pointer of the element type that `dtype` names.
template <class F>
DK_INLINE void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::u8:
      return f(static_cast<const uint8_t*>(nullptr));
    case DType::i8:
      return f(static_cast<const int8_t*>(nullptr));
    case DType::i16:
      return f(static_cast<const int16_t*>(nullptr));
    case DType::i32:
      return f(static_cast<const int32_t*>(nullptr));
    case DType::i64:
      return f(static_cast<const int64_t*>(nullptr));
    case DType::f16:
      return f(static_cast<const Half*>(nullptr));
    case DType::bf16:
      return f(static_cast<const Bfloat16*>(nullptr));
    case DType::f32:
      return f(static_cast<const float*>(nullptr));
    case DType::f64:
      return f(static_cast<const double*>(nullptr));
  }
}

template <class S, class T>
DK_INLINE void read_unit(const S* source, int64_t n, T* row) {
  for (int64_t i = 0; i < n; ++i) row[i] = static_cast<T>(widen(source[i]));
}
template <class S>
DK_INLINE void write_unit(const float* row, int64_t n, S* target) {
  for (int64_t i = 0; i < n; ++i) narrow(row[i], target + i);
}
#if defined(__F16C__)
DK_INLINE void read_unit(const Half* source, int64_t n, float* row) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(
        row + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  for (; i < n; ++i) row[i] = widen(source[i]);
}
DK_INLINE void write_unit(const float* row, int64_t n, Half* target) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(row + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) narrow(row[i], target + i);
}
#endif

// n elements from `source + offset` at `stride`, the rest of the row up to `padded` zero.
template <class T>
inline void read_row(const View& view, int64_t offset, int64_t n, int64_t padded, T* row) {
  with_dtype(view.dtype, [&](auto* tag) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(tag)>>;
    const S* source = static_cast<const S*>(view.data) + offset;
    if (view.voxel == 1)
      read_unit(source, n, row);
    else
      for (int64_t i = 0; i < n; ++i) row[i] = static_cast<T>(widen(source[i * view.voxel]));
  });
  for (int64_t i = n; i < padded; ++i) row[i] = 0;
}

template <class T>
inline void write_row(const View& view, int64_t offset, int64_t n, const T* row) {
  with_dtype(view.dtype, [&](auto* tag) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(tag)>>;
    if constexpr (!std::is_integral_v<S>) {
      S* target = static_cast<S*>(const_cast<void*>(view.data)) + offset;
      if constexpr (std::is_same_v<T, float>) {
        if (view.voxel == 1) return write_unit(row, n, target);
      }
      for (int64_t i = 0; i < n; ++i) {
        if constexpr (std::is_same_v<T, double> &&
                      (std::is_same_v<S, Half> || std::is_same_v<S, Bfloat16>))
          narrow(static_cast<float>(row[i]), target + i * view.voxel);
        else
          narrow(row[i], target + i * view.voxel);
      }
    }
  });
}

// Labels as T, exact for every class count that is allowed; ignored and bad ones become -1.
// Returns how many of the n are not in [0, C). A bad label counts only where `weights` (if any) is
// not zero.
template <class T>
inline int64_t read_labels(const Problem& problem, int64_t sample, int64_t first, int64_t n,
                           int64_t padded, const T* weights, T* labels, BadLabels* bad) {
  const View& view = problem.target;
  int64_t invalid = 0;
  with_dtype(view.dtype, [&](auto* tag) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(tag)>>;
    using W = std::conditional_t<(sizeof(S) < 4 && std::is_integral_v<S>), int32_t, int64_t>;
    const S* source = static_cast<const S*>(view.data) + sample * view.batch + first * view.voxel;
    const W classes = static_cast<W>(problem.classes);
    const W ignore = static_cast<W>(problem.ignore_index.value_or(0));
    // An index that the narrow type cannot hold is no label of it.
    const bool has_ignore = problem.ignore_index == ignore;
    // Float labels are truncated, but compared with ignore_index as they are: 0.7 is not 0.
    const auto ignored = [&](auto value) {
      if constexpr (std::is_same_v<W, int32_t>)
        return has_ignore & (value == ignore);
      else if constexpr (std::is_integral_v<S>)
        return has_ignore & (static_cast<int64_t>(value) == ignore);
      else
        return has_ignore & (static_cast<double>(value) == static_cast<double>(ignore));
    };
    // As MONAI's labels.long(), but of numbers alone that have such a value.
    const auto truncated = [&](auto value) {
      if constexpr (std::is_same_v<W, int32_t> || std::is_integral_v<S>)
        return static_cast<W>(value);
      else
        return value > -1 && value < 1e9 ? static_cast<W>(value) : W{-1};
    };
    const int64_t stride = view.voxel;
    const auto read = [&](auto unit) {
      for (int64_t i = 0; i < n; ++i) {
        const auto value = widen(source[unit() ? i : i * stride]);
        const W label = truncated(value);
        const bool valid = (label >= 0) & (label < classes) & !ignored(value);
        labels[i] = static_cast<T>(valid ? label : W{-1});
        invalid += !valid;
      }
    };
    stride == 1 ? read(std::true_type{}) : read(std::false_type{});
    if (invalid == 0) return;
    for (int64_t i = 0; i < n; ++i) {
      const auto value = widen(source[i * stride]);
      const W label = truncated(value);
      if ((label >= 0 && label < classes) || ignored(value)) continue;
      if (weights != nullptr && weights[i] == 0) continue;
      if (bad->count++ == 0) *bad = {1, sample, first + i, static_cast<double>(value)};
    }
  });
  for (int64_t i = n; i < padded; ++i) labels[i] = -1;
  return invalid;
}

}  // namespace DK_ISA
}  // namespace dicekernels
