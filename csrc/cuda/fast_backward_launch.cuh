// The launch of fast_backward, in the file of each dtype.
#pragma once
#include "fast_backward.cuh"
#include "fast_launch.cuh"
#include "fast_passes.h"

namespace dicekernels {
namespace cuda {

template <class S>
void launch_fast_backward(const Problem& problem, const FastPlan& plan, const double* coef,
                          const Grad& grad, const View& gradient, Stream stream) {
  const bool masked = problem.mask.data != nullptr;
  const int bytes = plan_backward_memory(plan, sizeof(S), masked).bytes;
  const unsigned blocks =
      blocks_of(problem.batch * ((problem.voxels + kRunVoxels - 1) / kRunVoxels));
  with_instance<S>(problem, plan, [&](auto held, auto split, auto focal, auto last) {
    const auto kernel = fast_backward<S, held(), split(), focal(), last()>;
    if (!allow_shared(kernel, bytes)) return;
    DK_LAUNCH((kernel), blocks, plan.threads(), bytes, static_cast<cudaStream_t>(stream), problem,
              plan, coef, grad, gradient);
  });
}

}  // namespace cuda
}  // namespace dicekernels
