#include "fast_sums_launch.cuh"

namespace dicekernels {
namespace cuda {

void fast_sums_f32(const Problem& problem, const FastPlan& plan, double* slots, Stream stream) {
  launch_fast_sums<float>(problem, plan, slots, stream);
}

}  // namespace cuda
}  // namespace dicekernels
