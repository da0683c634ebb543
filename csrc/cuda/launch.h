// The kernels' entry points for the host: no torch, no CUDA headers.
#pragma once
#include "../common/problem.h"

namespace dicekernels {
namespace cuda {

using Stream = void*;  // cudaStream_t

// slots: (B, K, C, R) of chunk_count(voxels) chunks.
void launch_sums(const Problem& problem, double* slots, Stream stream);

// coef: (B, C, R); gradient: as the logits.
void launch_sums_backward(const Problem& problem, const double* coef, const Grad& grad,
                          const View& gradient, Stream stream);

}  // namespace cuda
}  // namespace dicekernels
