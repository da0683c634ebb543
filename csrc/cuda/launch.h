// The kernels' entry points for the host: no torch, no CUDA headers.
#pragma once
#include "../common/problem.h"

namespace dicekernels {
namespace cuda {

using Stream = void*;  // cudaStream_t

// dLoss of the incoming gradient: what the slopes of output (sample, class) are multiplied by.
struct Grad {
  const void* data = nullptr;  // null: 1
  DType dtype = DType::f32;
  int64_t batch = 0, output = 0;  // strides in elements, 0 where it is broadcast
  int64_t skipped = 0;            // leading classes without an output of their own
};

// slots: (B, K, C, R) of chunk_count(voxels) chunks.
void launch_sums(const Problem& problem, double* slots, Stream stream);

// coef: (B, C, R); gradient: as the logits.
void launch_sums_backward(const Problem& problem, const double* coef, const Grad& grad,
                          const View& gradient, Stream stream);

}  // namespace cuda
}  // namespace dicekernels
