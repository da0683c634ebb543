// Reading and writing elements of a dtype that is known at run time.
#pragma once
#include "convert.h"
#include "device_math.h"

namespace dicekernels {
namespace cuda {

// Calls f with a null pointer of the element type that `dtype` names.
template <class F>
__device__ __forceinline__ void with_dtype(DType dtype, F f) {
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

template <class P>
using Pointee = std::remove_const_t<std::remove_pointer_t<P>>;

template <class T>
__device__ __forceinline__ T read_as(const View& view, int64_t at) {
  T value{};
  with_dtype(view.dtype, [&](auto* tag) {
    using S = Pointee<decltype(tag)>;
    value = static_cast<T>(widen(static_cast<const S*>(view.data)[at]));
  });
  return value;
}

// A label of a voxel: in [0, C), or -1 with `bad` telling whether it is an error or ignored.
struct Label {
  int value;
  bool bad;
};

// An integer label as read, in any width.
template <class I>
__device__ __forceinline__ Label checked_label(const Problem& p, I y) {
  const bool ignored = p.ignore_index == static_cast<int64_t>(y);
  const bool inside = y >= 0 && static_cast<int64_t>(y) < p.classes;
  return {inside && !ignored ? static_cast<int>(y) : -1, !inside && !ignored};
}

// Float labels are truncated as MONAI's labels.long(), but only numbers that have such a value, and
// compared with ignore_index as they are: 0.7 is not 0.
__device__ __forceinline__ Label checked_label(const Problem& p, double y) {
  if (p.ignore_index && y == static_cast<double>(*p.ignore_index)) return {-1, false};
  const bool inside = y > -1 && y < static_cast<double>(p.classes);
  return {inside ? static_cast<int>(y) : -1, !inside};
}

__device__ __forceinline__ Label read_label(const Problem& p, int64_t at) {
  Label label{};
  with_dtype(p.target.dtype, [&](auto* tag) {
    using S = Pointee<decltype(tag)>;
    const auto y = widen(static_cast<const S*>(p.target.data)[at]);
    if constexpr (std::is_integral_v<S>)
      label = checked_label(p, sizeof(S) < 4 ? static_cast<int>(y) : y);
    else
      label = checked_label(p, static_cast<double>(y));
  });
  return label;
}

}  // namespace cuda
}  // namespace dicekernels
