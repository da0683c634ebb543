// The launch of fast_sums, in the file of each dtype.
#pragma once
#include "fast_launch.cuh"
#include "fast_passes.h"
#include "fast_sums.cuh"

namespace dicekernels {
namespace cuda {

template <class S>
void launch_fast_sums(const Problem& problem, const FastPlan& plan, double* slots, Stream stream) {
  const int bytes = plan_memory(plan, sizeof(S), problem.mask.data != nullptr).bytes;
  const unsigned blocks = blocks_of(problem.batch * chunk_count(problem.voxels));
  with_instance<S>(problem, plan, [&](auto held, auto split, auto focal, auto last) {
    const auto kernel = fast_sums<S, held(), split(), focal(), last()>;
    if (!allow_shared(kernel, bytes)) return;
    DK_LAUNCH((kernel), blocks, plan.threads(), bytes, static_cast<cudaStream_t>(stream), problem,
              plan, slots);
  });
}

}  // namespace cuda
}  // namespace dicekernels
