// The fast passes for the host, for each dtype of the logits.
#pragma once
#include "convert.h"
#include "fast.h"
#include "launch.h"

namespace dicekernels {
namespace cuda {

#define DK_DECLARE(element, type)                                                             \
  namespace element {                                                                         \
  using Element = type;                                                                       \
  void launch_fast_sums(const Problem&, const FastPlan&, double* slots, Stream);              \
  void launch_fast_backward(const Problem&, const FastPlan&, const double* coef, const Grad&, \
                            const View& gradient, Stream);                                    \
  }

DK_DECLARE(f32, float)
DK_DECLARE(f16, Half)
DK_DECLARE(bf16, Bfloat16)

}  // namespace cuda
}  // namespace dicekernels
