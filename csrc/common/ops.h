// What the op functions of cpu/ops.cpp and cuda/ops.cpp share: their arguments checked, their
// outputs.
#pragma once
#include "check.h"
#include "finish.h"

namespace dicekernels {

using torch::headeronly::ScalarType;
using TensorArgument = const Tensor&;
using OptionalTensor = const std::optional<Tensor>&;

// A call of one of the two passes, checked but for the device of the logits.
struct Inputs {
  Problem problem;
  Tensor logits, target, mask;  // what the views point into
};

inline Inputs inputs_of(TensorArgument logits, TensorArgument target, OptionalTensor mask,
                        const SumsSpec& spec) {
  check_device(target, "target", logits.device());
  check_device(mask, "mask", logits.device());
  Inputs in;
  Problem& p = in.problem;
  static_cast<SumsSpec&>(p) = spec;
  p.batch = logits.size(0);
  p.classes = logits.size(1);
  p.voxels = 1;
  for (int64_t d = 2; d < logits.dim(); ++d) p.voxels *= logits.size(d);
  const int64_t values = p.batch * p.voxels * (p.dense ? p.classes : 1);
  STD_TORCH_CHECK(p.classes > 0, "logits: got no classes, expected (B, C, *S) with C >= 1");
  STD_TORCH_CHECK(target.numel() == values, "target: got ", target.numel(), " values, expected ",
                  values);
  STD_TORCH_CHECK(!mask || mask->numel() == p.batch * p.voxels, "mask: got ",
                  mask ? mask->numel() : 0, " values, expected ", p.batch * p.voxels);
  p.logits = view_of(logits, 2, "logits", &in.logits);
  const bool labels_without_channel = !p.dense && target.dim() == logits.dim() - 1;
  p.target = view_of(target, labels_without_channel ? 1 : 2, "target", &in.target);
  if (mask) p.mask = view_of(*mask, 2, "mask", &in.mask);
  return in;
}

// The values in the order of the tensor's indices. What is so already takes no way through torch,
// which costs more than all else that is done to a small tensor.
inline Tensor in_order(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline Tensor doubles(const Tensor& tensor) {
  const bool is_double = tensor.scalar_type() == ScalarType::Double;
  return in_order(is_double ? tensor : torch::stable::to(tensor, ScalarType::Double));
}
inline const double* data_of(const Tensor& doubles) {
  return static_cast<const double*>(doubles.const_data_ptr());
}

// dLoss/dsums (B, C, R).
inline Tensor slopes_of(const Tensor& coef, const Tensor& logits, const Problem& p) {
  check_device(coef, "coef", logits.device());
  const int64_t expected = p.batch * p.classes * row_count(p.rows);
  STD_TORCH_CHECK(coef.numel() == expected, "coef: got ", coef.numel(), " values, expected ",
                  expected);
  return doubles(coef);
}

// grad_loss is a scalar or broadcasts to (B, outputs); outputs counts from the last class.
inline Grad grad_of(const Tensor& grad_loss, const Problem& problem) {
  STD_TORCH_CHECK(grad_loss.dim() == 0 || grad_loss.dim() == 2, "grad_loss: got ", grad_loss.dim(),
                  " dimensions, expected 0 or 2");
  Grad grad;
  grad.data = grad_loss.data_ptr();
  grad.dtype = dtype_of(grad_loss, "grad_loss");
  STD_TORCH_CHECK(grad.dtype >= DType::f16,
                  "grad_loss: expected float64, float32, float16 or bfloat16");
  if (grad_loss.dim() == 0) return grad;
  const int64_t groups = grad_loss.size(0), outputs = grad_loss.size(1);
  STD_TORCH_CHECK((groups == 1 || groups == problem.batch) && outputs <= problem.classes,
                  "grad_loss: its shape does not broadcast to (B, outputs)");
  grad.batch = groups > 1 ? grad_loss.stride(0) : 0;
  grad.output = outputs > 1 ? grad_loss.stride(1) : 0;
  grad.skipped = outputs > 1 ? problem.classes - outputs : 0;
  return grad;
}

// The gradient, as `write` writes it into a View. Permuted space has no single voxel stride:
// written contiguous, then copied.
template <class F>
Tensor gradient_like(const Tensor& logits, F write) {
  Tensor gradient = torch::stable::empty_like(logits);
  const bool flat = flat_stride(gradient, 2).has_value();
  Tensor written = flat ? gradient : torch::stable::new_empty(logits, logits.sizes()), held;
  write(view_of(written, 2, "gradient", &held));
  if (!flat) torch::stable::copy_(gradient, written);
  return gradient;
}

// A call of finish, checked but for its weights, and what it returns, to be written.
struct FinishInputs {
  FinishSpec spec;
  int64_t samples, chunks, classes, width;  // width: rows that are on
  Tensor slots, loss, coef;
  DType loss_dtype;
};

inline FinishInputs finish_inputs_of(const Tensor& sums, ScalarType dtype, const FinishSpec& f) {
  const int64_t samples = sums.size(0), classes = sums.size(2), width = row_count(f.rows);
  STD_TORCH_CHECK(sums.size(3) == width, "sums: got ", sums.size(3), " rows, expected ", width);
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double, "sums: got ",
                  torch::headeronly::toString(sums.scalar_type()), ", expected float64");
  const Tensor loss =
      f.reduction == Reduction::none
          ? torch::stable::new_empty(sums, {f.groups(samples), f.outputs(classes)}, dtype)
          : torch::stable::new_empty(sums, {}, dtype);
  const DType loss_dtype = dtype_of(loss, "dtype");
  STD_TORCH_CHECK(loss_dtype >= DType::f16,
                  "dtype: expected float64, float32, float16 or bfloat16");
  const Tensor coef = torch::stable::new_empty(sums, {samples, classes, width});
  return {f, samples, sums.size(1), classes, width, in_order(sums), loss, coef, loss_dtype};
}

// An optional argument of finish with a fixed number of values, on the device of the sums. One that
// lies on the CPU is copied there, which waits for the device: weights belong where the logits are.
inline std::optional<Tensor> values_of(OptionalTensor tensor, int64_t expected, const char* name,
                                       const Tensor& sums) {
  if (!tensor) return tensor;
  STD_TORCH_CHECK(tensor->numel() == expected, name, ": got ", tensor->numel(),
                  " values, expected ", expected);
  if (!tensor->is_cpu()) check_device(*tensor, name, sums.device());
  return is_on(*tensor, sums.device()) ? *tensor : torch::stable::to(*tensor, sums.device());
}

}  // namespace dicekernels
