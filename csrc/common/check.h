// Torch tensors into Views: dtype and strides looked at once, the rare layout copied.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "problem.h"

namespace dicekernels {

using torch::stable::Device;
using torch::stable::Tensor;

// As torch prints it: cuda:1.
inline std::string name_of(const Device& device) {
  using D = torch::headeronly::DeviceType;
  const auto numbered = [&](const char* type) {
    return device.index() < 0 ? type : std::string(type) + ":" + std::to_string(device.index());
  };
  switch (device.type()) {
    case D::CPU:
      return "cpu";
    case D::CUDA:
      return numbered("cuda");
    case D::MPS:
      return numbered("mps");
    case D::XPU:
      return numbered("xpu");
    case D::Meta:
      return "meta";
    default:
      return "a device of another kind";
  }
}

// Without an index any device of the type will do.
inline bool is_on(const Tensor& tensor, const Device& expected) {
  const Device device = tensor.device();
  return device.type() == expected.type() &&
         (expected.index() < 0 || device.index() == expected.index());
}

// The dispatcher goes by all tensors of a call together: one on a GPU brings those of the CPU
// along, whose addresses mean nothing there.
inline void check_device(const Tensor& tensor, const char* name, const Device& expected) {
  STD_TORCH_CHECK(is_on(tensor, expected), name, ": got a tensor on ", name_of(tensor.device()),
                  ", expected one on ", name_of(expected),
                  " as the others of the call; move it with ", name, ".to('", name_of(expected),
                  "')");
}
inline void check_device(const std::optional<Tensor>& tensor, const char* name,
                         const Device& expected) {
  if (tensor) check_device(*tensor, name, expected);
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  using S = torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case S::Bool:
    case S::Byte:
      return DType::u8;
    case S::Char:
      return DType::i8;
    case S::Short:
      return DType::i16;
    case S::Int:
      return DType::i32;
    case S::Long:
      return DType::i64;
    case S::Half:
      return DType::f16;
    case S::BFloat16:
      return DType::bf16;
    case S::Float:
      return DType::f32;
    case S::Double:
      return DType::f64;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name,
                  ": this dtype has no kernel; convert it to float32 (logits, mask) "
                  "or uint8 (labels)");
  return DType::f32;
}

// The stride of the space (dimensions `from` and on) seen as one dimension, or nothing if it is
// not one. Dimensions of size 1 have any stride.
inline std::optional<int64_t> flat_stride(const Tensor& tensor, int64_t from) {
  int64_t expected = 0, stride = 1;
  bool first = true;
  for (int64_t d = tensor.dim() - 1; d >= from; --d) {
    if (tensor.size(d) == 1) continue;
    if (first)
      stride = tensor.stride(d);
    else if (tensor.stride(d) != expected)
      return std::nullopt;
    first = false;
    expected = tensor.stride(d) * tensor.size(d);
  }
  return stride;
}

// `spatial_from`: 2 for (B, C, *S) and (B, 1, *S), 1 for labels (B, *S). `held` keeps the copy of a
// layout that has no single voxel stride (a spatial crop) alive.
inline View view_of(const Tensor& tensor, int64_t spatial_from, const char* name, Tensor* held) {
  *held = tensor;
  std::optional<int64_t> voxel = flat_stride(tensor, spatial_from);
  if (!voxel) {
    *held = torch::stable::contiguous(tensor);
    voxel = 1;
  }
  View view;
  view.data = held->data_ptr();
  view.dtype = dtype_of(tensor, name);
  view.voxel = *voxel;
  view.batch = held->dim() > 0 && held->size(0) > 1 ? held->stride(0) : 0;
  view.channel = spatial_from == 2 && held->size(1) > 1 ? held->stride(1) : 0;
  return view;
}

}  // namespace dicekernels
