// dLoss/dsums of a class, times the incoming gradient.
#pragma once
#include "elements.h"
#include "launch.h"

namespace dicekernels {
namespace cuda {

// dLoss/dsums of one class, zero for the rows that are off.
template <class T>
struct Slopes {
  T i, fp, fn, pos, neg, ls;
};

// What the slopes of one class are multiplied by.
__device__ inline double grad_of(const Grad& grad, int64_t sample, int64_t c) {
  if (grad.data == nullptr || c < grad.skipped) return 1;  // without an output they are zero
  return read_as<double>(View{grad.data, grad.dtype, 0, 0, 0},
                         sample * grad.batch + (c - grad.skipped) * grad.output);
}

// Multiplied in double, where no gradient scale of AMP underflows.
template <class T>
__device__ Slopes<T> slopes_of(const Problem& problem, const double* coef, const Grad& grad,
                               int64_t sample, int64_t c) {
  const double* rows = coef + (sample * problem.classes + c) * row_count(problem.rows);
  const double factor = grad_of(grad, sample, c);
  const auto at = [&](Row row) {
    return has_row(problem.rows, row) ? factor * rows[row_index(problem.rows, row)] : 0;
  };
  // (1 - p)(1 - g) of TN falls where p (1 - g) of FP rises.
  return {static_cast<T>(at(kI)),   static_cast<T>(at(kFP) - at(kTN)), static_cast<T>(at(kFN)),
          static_cast<T>(at(kPos)), static_cast<T>(at(kNeg)),          static_cast<T>(at(kLs))};
}

}  // namespace cuda
}  // namespace dicekernels
