// The choice of the forward kernel and its launch.
#include "fast_launch.cuh"
#include "fast_passes.h"
#include "general_sums.cuh"

namespace dicekernels {
namespace cuda {
namespace {

template <class T>
void launch_general(const Problem& problem, double* slots, Stream stream) {
  const TilePlan plan = plan_tile(problem.classes, problem.dense, sizeof(T));
  const unsigned blocks = blocks_of(problem.batch * chunk_count(problem.voxels));
  if (!allow_shared(general_sums<T>, plan.bytes)) return;
  DK_LAUNCH((general_sums<T>), blocks, plan.threads, plan.bytes, static_cast<cudaStream_t>(stream),
            problem, plan, slots);
}

}  // namespace

void launch_sums(const Problem& problem, double* slots, Stream stream) {
  if (problem.batch == 0) return;
  FastPlan plan;
  if (plan_fast(problem, nullptr, &plan)) {
    const auto launch = problem.logits.dtype == DType::f32   ? f32::launch_fast_sums
                        : problem.logits.dtype == DType::f16 ? f16::launch_fast_sums
                                                             : bf16::launch_fast_sums;
    launch(problem, plan, slots, stream);
  } else if (problem.logits.dtype == DType::f64) {
    launch_general<double>(problem, slots, stream);
  } else {
    launch_general<float>(problem, slots, stream);
  }
}

}  // namespace cuda
}  // namespace dicekernels
