// The mathematics of one voxel on arrays, for tests/ops/test_common_headers.py. Compiled twice:
// over functions of the host that are as exact as they can be, and, with DK_EMULATED, over those of
// the CUDA kernels.
#include <cmath>
#include <cstdint>

#if defined(DK_EMULATED)
#include "../../csrc/cuda/device_math.h"
#define VOXEL_MATH(type) device_voxel_math_##type
#else
#include "../../csrc/common/problem.h"
#define DK_ISA scalar
#define VOXEL_MATH(type) scalar_voxel_math_##type

namespace dicekernels {
namespace scalar {

template <class T>
T select(bool mask, T a, T b) {
  return mask ? a : b;
}
template <class T>
T splat(T x) {
  return x;
}
template <class T>
T exp(T x) {
  return std::exp(x);
}
template <class T>
T log(T x) {
  return std::log(x);
}
template <class T>
T log1p(T x) {
  return std::log1p(x);
}
template <class T>
T reciprocal(T x) {
  return 1 / x;
}

}  // namespace scalar
}  // namespace dicekernels

#include "../../csrc/common/voxel_math.h"
#endif

namespace dicekernels {
namespace DK_ISA {
namespace {

// The numbers are those of FUNCTIONS in the test.
enum Function : int {
  kOverlap = 0,
  kSigmoid = 4,
  kSigmoidFocal,
  kHardFocal,
  kSoftmaxFocal,
  kExp,
  kLog1p,
  kLogSum,
  kLog2Sum
};

template <Overlap O, class T>
void overlap(T p, T g, const T* slopes, T* out, int64_t n) {
  const OverlapTerms<T> terms = overlap_terms<O>(p, g);
  out[0] = terms.tp, out[n] = terms.fp, out[2 * n] = terms.fn;
  out[3 * n] = overlap_slope<O>(p, g, slopes[0], slopes[1], slopes[2]);
}

template <class T>
void evaluate(int function, T a, T b, const T* parameters, T* out, int64_t n) {
  const auto write = [&](const Term<T>& f) { out[0] = f.loss, out[n] = f.slope; };
  switch (function) {
    case kOverlap:
      return overlap<Overlap::product>(a, b, parameters, out, n);
    case kOverlap + 1:
      return overlap<Overlap::min>(a, b, parameters, out, n);
    case kOverlap + 2:
      return overlap<Overlap::squared>(a, b, parameters, out, n);
    case kOverlap + 3:
      return overlap<Overlap::voxel_squared>(a, b, parameters, out, n);
    case kSigmoid: {
      const Sigmoid<T> s = sigmoid<true>(a), fewer = sigmoid<false>(a);
      out[0] = s.p, out[n] = s.q, out[2 * n] = s.softplus, out[3 * n] = s.softneg;
      out[4 * n] = fewer.p - s.p + fewer.q - s.q + fewer.softplus + fewer.softneg;
      return;
    }
    case kSigmoidFocal:
      return write(sigmoid_focal(a, b, parameters[0]));
    case kHardFocal:
      return write(hard_focal(a, parameters[0]));
    case kSoftmaxFocal:
      return write(softmax_focal(a, parameters[0]));
    case kExp:
      out[0] = exp(a);
      return;
    case kLog1p:
      out[0] = log1p(a);
      return;
#if defined(DK_EMULATED)
    case kLogSum:
      out[0] = log_sum(a);
      return;
    case kLog2Sum:
      out[0] = log2_sum(static_cast<float>(a));
      return;
#endif
  }
}

template <class T>
void evaluate_all(int function, int64_t n, const T* a, const T* b, const T* parameters, T* out) {
  for (int64_t at = 0; at < n; ++at) evaluate(function, a[at], b[at], parameters, out + at, n);
}

}  // namespace
}  // namespace DK_ISA
}  // namespace dicekernels

// out: (5, n), the rows that a function has.
#define EXPORT(type)                                                                      \
  extern "C" void VOXEL_MATH(type)(int function, int64_t n, const type* a, const type* b, \
                                   const type* parameters, type* out) {                   \
    dicekernels::DK_ISA::evaluate_all(function, n, a, b, parameters, out);                \
  }
EXPORT(float)
EXPORT(double)
