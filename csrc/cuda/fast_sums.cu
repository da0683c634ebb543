// The launch of fast_sums for the logits of one dtype; compiled once for each (DK_ELEMENT).
#include "fast_sums.cuh"

#include "fast_launch.cuh"
#include "fast_passes.h"

namespace dicekernels {
namespace cuda {

void DK_ELEMENT::launch_fast_sums(const Problem& problem, const FastPlan& plan, double* slots,
                                  Stream stream) {
  const int bytes = plan_memory(plan, sizeof(Element), problem.mask.data != nullptr).bytes;
  const unsigned blocks = blocks_of(problem.batch * chunk_count(problem.voxels));
  with_instance<Element>(problem, plan, [&](auto held, auto split, auto focal, auto last) {
    const auto kernel = fast_sums<Element, held(), split(), focal(), last()>;
    if (!allow_shared(kernel, bytes)) return;
    DK_LAUNCH((kernel), blocks, plan.threads(), bytes, static_cast<cudaStream_t>(stream), problem,
              plan, slots);
  });
}

}  // namespace cuda
}  // namespace dicekernels
