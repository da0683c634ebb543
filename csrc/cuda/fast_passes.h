// The fast passes for the host, one function a dtype of the logits.
#pragma once
#include "fast.h"
#include "launch.h"

namespace dicekernels {
namespace cuda {

void fast_sums_f32(const Problem&, const FastPlan&, double* slots, Stream);
void fast_sums_f16(const Problem&, const FastPlan&, double* slots, Stream);
void fast_sums_bf16(const Problem&, const FastPlan&, double* slots, Stream);

void fast_backward_f32(const Problem&, const FastPlan&, const double* coef, const Grad&,
                       const View& gradient, Stream);
void fast_backward_f16(const Problem&, const FastPlan&, const double* coef, const Grad&,
                       const View& gradient, Stream);
void fast_backward_bf16(const Problem&, const FastPlan&, const double* coef, const Grad&,
                        const View& gradient, Stream);

}  // namespace cuda
}  // namespace dicekernels
