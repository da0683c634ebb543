#include "fast_backward_launch.cuh"

namespace dicekernels {
namespace cuda {

void fast_backward_f32(const Problem& problem, const FastPlan& plan, const double* coef,
                       const Grad& grad, const View& gradient, Stream stream) {
  launch_fast_backward<float>(problem, plan, coef, grad, gradient, stream);
}

}  // namespace cuda
}  // namespace dicekernels
