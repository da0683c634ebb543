// The choice of the backward kernel and its launch.
#include "fast_launch.cuh"
#include "fast_passes.h"
#include "general_backward.cuh"

namespace dicekernels {
namespace cuda {
namespace {

template <class T>
void launch_general(const Problem& problem, const double* coef, const Grad& grad,
                    const View& gradient, Stream stream) {
  const TilePlan plan = plan_tile(problem.classes, problem.dense, sizeof(T));
  const unsigned blocks = blocks_of(problem.batch * ((problem.voxels + kSpan - 1) / kSpan));
  if (!allow_shared(general_backward<T>, plan.bytes)) return;
  DK_LAUNCH((general_backward<T>), blocks, plan.threads, plan.bytes,
            static_cast<cudaStream_t>(stream), problem, plan, coef, grad, gradient);
}

}  // namespace

void launch_sums_backward(const Problem& problem, const double* coef, const Grad& grad,
                          const View& gradient, Stream stream) {
  if (problem.batch == 0 || problem.voxels == 0) return;
  FastPlan plan;
  if (plan_fast(problem, &gradient, &plan)) {
    const auto launch = problem.logits.dtype == DType::f32   ? f32::launch_fast_backward
                        : problem.logits.dtype == DType::f16 ? f16::launch_fast_backward
                                                             : bf16::launch_fast_backward;
    launch(problem, plan, coef, grad, gradient, stream);
  } else if (problem.logits.dtype == DType::f64) {
    launch_general<double>(problem, coef, grad, gradient, stream);
  } else {
    launch_general<float>(problem, coef, grad, gradient, stream);
  }
}

}  // namespace cuda
}  // namespace dicekernels
