// The launch of fast_backward for the logits of one dtype; compiled once for each (DK_ELEMENT).
#include "fast_backward.cuh"

#include "fast_launch.cuh"
#include "fast_passes.h"

namespace dicekernels {
namespace cuda {

void DK_ELEMENT::launch_fast_backward(const Problem& problem, const FastPlan& plan,
                                      const double* coef, const Grad& grad, const View& gradient,
                                      Stream stream) {
  const bool masked = problem.mask.data != nullptr;
  const int bytes = plan_backward_memory(plan, sizeof(Element), masked).bytes;
  const unsigned blocks =
      blocks_of(problem.batch * ((problem.voxels + kRunVoxels - 1) / kRunVoxels));
  with_instance<Element>(problem, plan, [&](auto held, auto split, auto focal, auto last) {
    const auto kernel = fast_backward<Element, held(), split(), focal(), last()>;
    if (!allow_shared(kernel, bytes)) return;
    DK_LAUNCH((kernel), blocks, plan.threads(), bytes, static_cast<cudaStream_t>(stream), problem,
              plan, coef, grad, gradient);
  });
}

}  // namespace cuda
}  // namespace dicekernels
