#include "fast_sums_launch.cuh"

namespace dicekernels {
namespace cuda {

void fast_sums_f16(const Problem& problem, const FastPlan& plan, double* slots, Stream stream) {
  launch_fast_sums<Half>(problem, plan, slots, stream);
}

}  // namespace cuda
}  // namespace dicekernels
