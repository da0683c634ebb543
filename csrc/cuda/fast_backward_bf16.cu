#include "fast_backward_launch.cuh"

namespace dicekernels {
namespace cuda {

void fast_backward_bf16(const Problem& problem, const FastPlan& plan, const double* coef,
                        const Grad& grad, const View& gradient, Stream stream) {
  launch_fast_backward<Bfloat16>(problem, plan, coef, grad, gradient, stream);
}

}  // namespace cuda
}  // namespace dicekernels
