// The ops on tensors of a GPU: checked, allocated, launched on the current stream. Nothing here
// waits for the device. Schemas with shapes: dicekernels/ops.py.
#if !defined(DK_EMULATED)
#include <cuda_runtime.h>
#include <dlfcn.h>
#endif

#include <string>
#include <tuple>

#include "../common/check.h"
#include "finish_op.h"
#include "launch.h"
#include "torch_cuda.h"

namespace dicekernels {
namespace cuda {
namespace {

// grad_loss is a scalar or broadcasts to (B, outputs); outputs counts from the last class.
Grad grad_of(const std::optional<Tensor>& grad_loss, const Problem& problem) {
  Grad grad;
  if (!grad_loss) return grad;
  STD_TORCH_CHECK(grad_loss->dim() == 0 || grad_loss->dim() == 2, "grad_loss: got ",
                  grad_loss->dim(), " dimensions, expected 0 or 2");
  grad.data = grad_loss->data_ptr();
  grad.dtype = dtype_of(*grad_loss, "grad_loss");
  if (grad_loss->dim() == 0) return grad;
  const int64_t groups = grad_loss->size(0), outputs = grad_loss->size(1);
  STD_TORCH_CHECK((groups == 1 || groups == problem.batch) && outputs <= problem.classes,
                  "grad_loss: its shape does not broadcast to (B, outputs)");
  grad.batch = groups > 1 ? grad_loss->stride(0) : 0;
  grad.output = outputs > 1 ? grad_loss->stride(1) : 0;
  grad.skipped = outputs > 1 ? problem.classes - outputs : 0;
  return grad;
}

}  // namespace

Tensor sums(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
            bool dense, int64_t activation, int64_t overlap, int64_t voxel_term, int64_t rows,
            std::optional<int64_t> ignore_index, bool product_mask, double focal_gamma,
            int64_t first_class) {
  check_device(logits, "logits", kDevice);
  const DeviceGuard guard(logits.get_device_index());
  const Inputs in = inputs_of(logits, target, mask, dense, activation, overlap, voxel_term, rows,
                              ignore_index, product_mask, focal_gamma, first_class);
  const Problem& p = in.problem;
  Tensor slots =
      torch::stable::new_empty(logits, {p.batch, chunk_count(p.voxels), p.classes, row_count(rows)},
                               torch::headeronly::ScalarType::Double);
  launch_sums(p, static_cast<double*>(slots.mutable_data_ptr()),
              current_stream(logits.get_device_index()));
  check_launch("sums");
  return slots;
}

Tensor sums_backward(const std::optional<Tensor>& grad_loss, const Tensor& logits,
                     const Tensor& target, const std::optional<Tensor>& mask, const Tensor& coef,
                     bool dense, int64_t activation, int64_t overlap, int64_t voxel_term,
                     int64_t rows, std::optional<int64_t> ignore_index, bool product_mask,
                     double focal_gamma, int64_t first_class) {
  check_device(logits, "logits", kDevice);
  const DeviceGuard guard(logits.get_device_index());
  const Inputs in = inputs_of(logits, target, mask, dense, activation, overlap, voxel_term, rows,
                              ignore_index, product_mask, focal_gamma, first_class);
  const Problem& p = in.problem;
  check_device(coef, "coef", logits.device());
  check_device(grad_loss, "grad_loss", logits.device());
  const int64_t width = p.classes * row_count(rows);
  STD_TORCH_CHECK(coef.numel() == p.batch * width, "coef: got ", coef.numel(), " values, expected ",
                  p.batch * width);
  const Tensor slopes =
      torch::stable::contiguous(torch::stable::to(coef, torch::headeronly::ScalarType::Double));
  Tensor gradient = torch::stable::empty_like(logits);
  // Permuted space has no single voxel stride: written contiguous, then copied.
  const bool flat = flat_stride(gradient, 2).has_value();
  Tensor written = flat ? gradient : torch::stable::new_empty(logits, logits.sizes()), held;
  const View out = view_of(written, 2, "gradient", &held);
  launch_sums_backward(p, static_cast<const double*>(slopes.const_data_ptr()),
                       grad_of(grad_loss, p), out, current_stream(logits.get_device_index()));
  check_launch("sums_backward");
  if (!flat) torch::stable::copy_(gradient, written);
  return gradient;
}

}  // namespace cuda
}  // namespace dicekernels

#if defined(DK_EMULATED)
#define DK_NAMESPACE dicekernels_emulated
#define DK_KEY CPU
#else
#define DK_NAMESPACE dicekernels
#define DK_KEY CUDA

namespace {

// What the library was compiled for, as CMake lists it.
std::string architectures() {
  return DK_ARCHITECTURES;
}

// "" or why no kernel can run here, whatever the GPU is.
std::string obstacle() {
  // Asked of the driver itself: the runtime would initialise it for that, and a process that
  // imports this package could neither fork nor choose its GPUs any more.
  int driver = 0;
  if (void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL))
    if (void* symbol = dlsym(library, "cuDriverGetVersion"))
      reinterpret_cast<int (*)(int*)>(symbol)(&driver);
  // A driver runs what was built with any toolkit of its own major version or an older one.
  if (driver / 1000 >= CUDART_VERSION / 1000) return "";
  return "the library was built with CUDA " + std::to_string(CUDART_VERSION / 1000) +
         ", the driver here supports CUDA " + std::to_string(driver / 1000) +
         "; update the driver, or build with an older toolkit";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dicekernels, m) {
  m.def("cuda_architectures() -> str");
  m.def("cuda_obstacle() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dicekernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&architectures));
  m.impl("cuda_obstacle", TORCH_BOX(&obstacle));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(DK_NAMESPACE, DK_KEY, m) {
  m.impl("sums", TORCH_BOX(&dicekernels::cuda::sums));
  m.impl("finish", TORCH_BOX(&dicekernels::cuda::finish_op));
  m.impl("sums_backward", TORCH_BOX(&dicekernels::cuda::sums_backward));
}
